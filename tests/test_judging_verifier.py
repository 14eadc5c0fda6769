"""Scores by code and by a reward model, and judges of one token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nemo_srl import judging
from nemo_srl.artifacts import BaseModel, SourceFile, to_line
from nemo_srl.config import Config, JudgeConfig
from nemo_srl.engines.openai.dialects import BadChoiceError, ClassifyDialect
from nemo_srl.errors import ConfigError, DataError
from nemo_srl.judging.verifier import VERIFIER, VerifierReader
from nemo_srl.protocols import GenerationRequest, SamplingParams
from nemo_srl.records import EFTExample, VerifiablePrompt
from nemo_srl.stages import judgements
from tests import tiny
from tests.loopback import Loopback
from tests.punkt import make_punkt_tab
from tests.support import composed, made, server
from tests.tables import answers_to

RUBRIC = "{instruction} {response} Score:"
MATERIAL: judging.Material = {"p/00": ("Say seven.", "seven"), "p/01": ("Say seven.", "eight"), "q/00": ("Why?", "So.")}


def says_it(instruction: str, response: str) -> float | None:
    """The user's own check."""
    return None if "Say" not in instruction else float(response in instruction)


def says_too_much(instruction: str, response: str) -> float:
    return 5.0


def settings(**changes: Any) -> JudgeConfig:
    return JudgeConfig(rubric=RUBRIC, mode="verifier", num_judgements=1, **changes)


def test_the_users_function_scores_what_it_knows_and_nothing_else() -> None:
    cfg = settings(verifier=f"{__name__}:says_it")
    VERIFIER.check(cfg)
    found = VERIFIER.judgements(MATERIAL, {}, cfg)
    assert [(j.candidate_key, j.score) for j in found] == [("p/00", 5.0), ("p/01", 0.0), ("q/00", None)]
    assert judging.reader(cfg) is VERIFIER
    assert not judging.asks_models(VERIFIER)


def test_a_function_that_returns_no_share_is_refused() -> None:
    with pytest.raises(DataError, match=r"says_too_much.*returned 5\.0.*a share, from 0 to 1"):
        VERIFIER.judgements(MATERIAL, {}, settings(verifier=f"{__name__}:says_too_much"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"judge\.verifier='': .*ifeval, or your own function"),
        ({"verifier": "ifeval"}, r"judge\.verifier_path='': .*needs a file of IFEval's prompts"),
        ({"verifier": "ifevil"}, r"unknown name\. Use one of ifeval"),
        ({"verifier": f"{__name__}:RUBRIC"}, r"judge\.verifier=.*this is a str\. Name a function"),
        ({"verifier": f"{__name__}:says_it", "verifier_path": "x"}, r"judge\.verifier_path='x': only .*ifeval"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: Mapping[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        VERIFIER.check(settings(**changes))


def test_ifevals_instructions_make_the_score_and_no_job_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    monkeypatch.setattr(nltk.data, "path", [make_punkt_tab(tmp_path / "nltk")])
    prompt = VerifiablePrompt(
        prompt_id="p",
        text="Say it.",
        instruction_ids=["startend:quotation", "punctuation:no_comma"],
        arguments=[{}, {}],
    )
    answers = answers_to(tmp_path, ("p", "Say it.", '"It is so"'), ("q", "Say it.", "It is, so"), ("r", "Else.", "No"))
    (tmp_path / "checked.jsonl").write_text(to_line(prompt))
    checked = SourceFile(tmp_path / "checked.jsonl", VerifiablePrompt)
    cfg = Config(run_dir=str(tmp_path), judge=settings(verifier="ifeval", verifier_path="elsewhere.jsonl"))
    table, figures = made(judgements.BY_CODE, cfg, tmp_path / "judgements", candidates=answers, checked=checked)
    assert [j.score for j in table.read()] == [5.0, 0.0, None]
    assert figures == {"num_judgements": 3, "valid_rate": pytest.approx(2 / 3)}
    assert not judgements.BY_CODE.engines
    assert VerifierReader([prompt]).judgements({"p/00": ("Say it.", "So")}, {}, cfg.judge)[0].score == 2.5


def test_a_reward_models_server_scores_conversations(tmp_path: Path) -> None:
    rewards = {"good": 2.0, "bad": -30.0}

    class Rewards(Loopback):
        def answer(self, path: str, body: dict[str, Any]) -> tuple[int, object]:
            assert path == "/classify"
            assert [m["role"] for m in body["messages"]] == ["user", "assistant"]
            assert (body["add_generation_prompt"], body["use_activation"]) == (False, False)
            probs = [rewards[body["messages"][1]["content"]]]
            return 200, {"object": "list", "data": [{"index": 0, "probs": probs, "num_classes": 1}]}

    answers = answers_to(tmp_path, ("p", "Say it.", "good"), ("q", "Say it.", "bad"))
    policy = BaseModel(tiny.make_model(tmp_path / "model", ["x"], vocab_size=300), "digest")
    with Rewards(lambda body, index: ([], "")).running() as url:
        engine = server(url.removesuffix("/v1"), api="classify", model="rm")
        judge = JudgeConfig(rubric=RUBRIC, mode="reward", num_judgements=1, temperature=0, engine=engine)
        cfg = Config(run_dir=str(tmp_path), judge=judge)
        table, _ = made(judgements.STAGE, cfg, tmp_path / "judgements", judge=policy, candidates=answers)
    good, bad = (j.score for j in table.read())
    assert good == pytest.approx(5 / (1 + math.exp(-2)))
    assert bad is not None
    assert 0 < bad < 1e-9


def test_a_reward_is_one_finite_number() -> None:
    request = GenerationRequest(key="k", prompt_token_ids=(1,), n=1, seed=1, earlier_turns=(("a", "b"),))
    params = SamplingParams(temperature=0, top_p=1, max_tokens=1)
    dialect = ClassifyDialect({"use_activation": None, "activation": False})
    body = dialect.body(request, params, model="rm", n=1, seed=1)
    assert "use_activation" not in body
    assert body["activation"] is False
    for probs in ([1.0, 2.0], [], None, ["x"], [float("nan")]):
        with pytest.raises(BadChoiceError, match="one finite number"):
            dialect.sample({"probs": probs}, params)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": None}, r"judge\.engine\.api=None: .*\+judge_mode=reward"),
        ({"num_judgements": 3}, r"judge\.num_judgements=3"),
        ({"temperature": 0.7}, r"judge\.temperature=0\.7"),
    ],
)
def test_a_reward_needs_its_server_and_is_not_sampled(changes: dict[str, Any], message: str) -> None:
    engine = server("http://host:1", api="classify", model="rm")
    cfg = JudgeConfig(
        **{"rubric": RUBRIC, "mode": "reward", "num_judgements": 1, "temperature": 0, "engine": engine} | changes
    )
    with pytest.raises(ConfigError, match=message):
        judging.reader(cfg).check(cfg)


def test_the_groups_of_the_configuration_set_what_their_readers_need() -> None:
    url = "judge.engine.base_url=http://host:8000"
    for overrides in (
        ("+judge_mode=reward", url, "judge.engine.model=rm"),
        ("+judge_mode=verifier", "judge.verifier_path=x.jsonl"),
        ("judge=score_only_5pt",),
    ):
        cfg = composed(*overrides).judge
        judging.reader(cfg).check(cfg)


@pytest.mark.parametrize("mode", ["sampled", "expected"])
def test_without_justifications_a_verdict_is_the_score_alone(mode: str) -> None:
    x = EFTExample(example_id="e", instruction="a", response="b", justification="It is short.", score=2)
    with_reasons, without = (JudgeConfig(rubric=RUBRIC, mode=mode, justification=flag) for flag in (True, False))
    assert judging.reader(with_reasons).lesson(x, with_reasons)[1] == "It is short.\nScore: 2"
    assert judging.reader(without).lesson(x, without)[1] == "Score: 2"
