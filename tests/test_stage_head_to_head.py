"""Comparing models: both orders, ties, the sign test and lengths; and the whole of recipes/evaluate.py on a server."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from nemo_srl.artifacts import Artifact, BaseModel, SourceFile, Table, to_line
from nemo_srl.config import Config, JudgeConfig, load
from nemo_srl.engines.embedded.settings import EmbeddedSettings
from nemo_srl.errors import ConfigError, DataError
from nemo_srl.experiment import Experiment
from nemo_srl.records import Candidate, Comparison, EFTExample, FinishReason, Order, Question
from nemo_srl.report.page import render
from nemo_srl.runs import open_run
from nemo_srl.stages import Context, answers, head_to_head
from nemo_srl.stages.head_to_head import Match, matches_of, metrics_of
from nemo_srl.worker import describe
from recipes import evaluate
from tests import tiny
from tests.loopback import Loopback, ids_of
from tests.punkt import make_punkt_tab
from tests.support import made, server

PAIRWISE = "{instruction} [A: {response_a}] [B: {response_b}] Winner:"


def match(first: float | None, second: float | None, difference: int = 0) -> Match:
    return Match(first=first, second=second, length_difference=difference)


@pytest.mark.parametrize(
    ("first", "second", "outcome"),
    [
        (1.0, 1.0, 1.0),
        (0.0, 0.0, 0.0),
        (1.0, 0.0, 0.5),  # whoever stands first wins: no one does
        (0.0, 1.0, 0.5),
        (1.0, 0.5, 0.5),
        (0.5, 0.5, 0.5),
        (0.75, 1.0, 1.0),
        (1.0, None, None),
        (None, None, None),
    ],
)
def test_only_who_wins_in_both_orders_wins(first: float | None, second: float | None, outcome: float | None) -> None:
    assert match(first, second).outcome == outcome


def test_the_figures_of_a_match() -> None:
    matches = [*[match(1, 1)] * 6, match(0, 0), *[match(1, 0)] * 2, match(1, None)]
    found = {m.name: m for m in metrics_of(matches)}
    assert [found[f"{x}_rate"].value for x in ("win", "tie", "loss")] == [6 / 9, 2 / 9, 1 / 9]
    assert found["win_rate"].n == 9
    assert found["win_rate"].low is not None
    assert found["sign_test_p"].value == pytest.approx(2 * (1 + 7) / 2**7)
    assert found["sign_test_p"].n == 7
    # First places: 6 of 12 where a won twice, 1 of 2 where it lost, 4 of 4 where the first won, and the lone verdict.
    assert found["first_position_rate"].value == pytest.approx((6 + 1 + 4 + 1) / (12 + 2 + 4 + 1))
    assert found["unjudged_rate"].value == pytest.approx(0.1)


def test_nothing_judged_is_nothing_measured() -> None:
    found = {m.name: m.value for m in metrics_of([match(None, None)])}
    assert found["unjudged_rate"] == 1
    assert {v for k, v in found.items() if k not in ("unjudged_rate", "cut_off_rate")} == {None}


def verdict(question: str, order: Order, share: float | None, index: int = 0) -> Comparison:
    return Comparison(question_id=question, order=order, verdict_index=index, verdict="", first_share=share)


def answer(question: str, reason: FinishReason = "stop") -> Candidate:
    return Candidate(
        prompt_id=question, sample_index=0, prompt="?", response="r", num_tokens=1, finish_reason=reason
    )  # fmt: skip


def test_a_judge_that_disagrees_with_itself_is_seen() -> None:
    """It knows the better answer of question 1, goes by the order in question 2, and throws dice in question 3."""
    said = [verdict("1", "ab", 1.0, i) for i in range(2)] + [verdict("1", "ba", 0.0, i) for i in range(2)]
    said += [verdict("2", order, 1.0, i) for order in ("ab", "ba") for i in range(2)]
    said += [verdict("3", order, float(i)) for order in ("ab", "ba") for i in range(2)]
    a = {q: answer(q, "length" if q == "3" else "stop") for q in "123"}
    matches = matches_of(a, {q: answer(q) for q in "123"}, said)
    assert [m.outcome for m in matches] == [1.0, 0.5, 0.5]
    assert [m.orders_agree for m in matches] == [True, False, True]
    assert [m.repeats for m in matches] == [(2, 2), (2, 2), (0, 2)]
    found = {m.name: m for m in metrics_of(matches)}
    assert (found["order_agreement_rate"].value, found["order_agreement_rate"].n) == (2 / 3, 3)
    assert (found["verdict_agreement_rate"].value, found["verdict_agreement_rate"].n) == (4 / 6, 6)
    assert (found["cut_off_rate"].value, found["cut_off_rate"].n) == (1 / 3, 3)
    once = {m.name: m for m in metrics_of(matches_of(a, a, said[:1]))}
    assert (once["verdict_agreement_rate"].value, once["order_agreement_rate"].value) == (None, None)


def test_a_single_sampled_verdict_is_refused() -> None:
    cfg = JudgeConfig(pairwise_rubric=PAIRWISE, num_judgements=1)
    with pytest.raises(ConfigError, match=r"judge\.num_judgements=1: with judge\.temperature=0\.7"):
        head_to_head.check(cfg)
    head_to_head.check(replace(cfg, temperature=0.0))
    head_to_head.check(replace(cfg, num_judgements=2))


class InProcess:
    """An experiment whose stages run at once, without processes."""

    given = Experiment.given

    def __init__(self, cfg: Config, models: dict[str, Path]) -> None:
        self.cfg, self.models = cfg, models
        self.run_dir = Path(cfg.run_dir)

    def base_model(self, path: str, *, key: str) -> BaseModel:
        return BaseModel(self.models[path], "digest")

    def source(self, path: str, record: type, *, key: str = "") -> SourceFile[Any]:
        return SourceFile(Path(path), record)

    def run(self, stage: Any, iteration: int, *, directory: str = "", **inputs: Any) -> Artifact:
        output: Artifact = stage.output(self.run_dir / "iter_00" / (directory or stage.name), {})
        given = stage.inputs(inputs)
        describe(stage, self.cfg, iteration, given, output)
        result = stage.steps[-1].run(Context(self.cfg, iteration, given, output, stage.model))
        output.publish(stage=stage.name, digest=result.digest, metrics=result.metrics, seconds=0, parts=result.parts)
        return output


def longer_is_better(body: dict[str, Any], index: int) -> tuple[list[int], str]:
    """The model "x" answers with one word. As a judge it prefers the longer answer, and gives every answer 3 points."""
    text = body["messages"][0]["content"]
    if found := re.search(r"\[A: (.*?)\] \[B: (.*?)\]", text):
        a, b = map(len, found.groups())
        return ids_of(f"Winner: {'A' if a > b else 'B' if b > a else 'tie'}"), "stop"
    return ids_of("Score: 3" if "Score" in text else "ok"), "stop"


def test_the_recipe_compares_a_server_with_given_answers_and_writes_every_file(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model", ["Winner: A"], vocab_size=300)
    texts = [f"Do {i}." for i in range(12)]
    (tmp_path / "q.json").write_text(json.dumps([{"instruction": t, "dataset": "d"} for t in texts]))
    given = [{"instruction": t, "output": "x" * (i % 4), "generator": "other"} for i, t in enumerate(texts)]
    (tmp_path / "other.json").write_text(json.dumps(given))
    held_out = tmp_path / "eft_eval.jsonl"
    held_out.write_text(
        "".join(
            to_line(EFTExample(example_id=f"{s}", instruction="Q", response=f"{s}", justification="j", score=s))
            for s in (1, 5)
        )
    )
    with Loopback(longer_is_better).running() as url:
        engine = server(url)
        judge = JudgeConfig(
            rubric="{instruction} {response} Score:", mode="pairwise", pairwise_rubric=PAIRWISE, num_judgements=2
        )
        cfg = Config(run_dir=str(tmp_path / "run"), engine=engine, judge=judge)
        cfg.data.eft_eval_path = str(held_out)
        settings = evaluate.EvaluateSettings(
            models={"x": "dir", "other": str(tmp_path / "other.json")}, questions=str(tmp_path / "q.json")
        )
        exp: Any = InProcess(cfg, {"dir": model})
        text = evaluate.evaluate(settings, exp, evaluate.open_given(settings, exp))
    # "ok" has two letters: it beats 0 and 1 of them, ties with 2 and loses against 3.
    assert re.search(r"\| x v other +\| 50.0% .* \| 25.0% .* \| 25.0% ", text)
    assert re.search(r"\| M2 v SFT +\| 49.2% +\| 36.3% +\| 14.5% ", text), "the paper's stand beside"
    assert "| valid verdicts" in text
    exports = tmp_path / "run" / "exports"
    rows = json.loads((exports / "x" / "alpaca_eval.json").read_text())
    assert rows[3] == {"dataset": "d", "instruction": "Do 3.", "output": "ok", "generator": "x"}
    assert len((exports / "other" / "mt_bench.jsonl").read_text().splitlines()) == 12
    assert "<th>x v other</th><td>50.0%" in render(open_run(tmp_path / "run"))
    with pytest.raises(ConfigError, match="'a/b' names directories"):
        evaluate.open_given(replace(settings, models={"a/b": "dir"}), exp)
    with pytest.raises(ConfigError, match="one or more Hugging Face directories"):
        evaluate.open_given(replace(settings, models={}), exp)


def test_the_recipe_measures_ifeval_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server answers in capitals and with commas: it follows one instruction and breaks the other."""
    import nltk

    monkeypatch.setattr(nltk.data, "path", [make_punkt_tab(tmp_path / "nltk")])
    model = tiny.make_model(tmp_path / "model", ["YES"], vocab_size=300)
    wanted = (["change_case:english_capital"], ["change_case:english_capital", "punctuation:no_comma"])
    rows = [
        {"key": i, "prompt": f"Do {i}.", "instruction_id_list": names, "kwargs": [{} for _ in names]}
        for i, names in enumerate(wanted)
    ]
    (tmp_path / "ifeval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shouting = Loopback(lambda body, index: (ids_of("YES, THIS IS ONLY A SENTENCE IN ENGLISH."), "stop"))
    with shouting.running() as url:
        cfg = Config(run_dir=str(tmp_path / "run"), engine=server(url))
        settings = evaluate.EvaluateSettings(
            models={"x": "dir"}, questions="", judging=False, ifeval=str(tmp_path / "ifeval.jsonl")
        )
        exp: Any = InProcess(cfg, {"dir": model})
        text = evaluate.evaluate(settings, exp, evaluate.open_given(settings, exp))
    assert re.search(r"\| x +\| 50\.0% \[.*\| 66\.7% \[.*\| 2 +\| 3 +\|", text)
    assert "Head to head" not in text
    assert "<th>x</th><td>50.0%" in render(open_run(tmp_path / "run"))
    (tmp_path / "ifeval.jsonl").write_text('{"key": 1}\n')
    with pytest.raises(DataError, match=r"ifeval\.jsonl, line 1: expected"):
        evaluate.evaluate(settings, exp, evaluate.open_given(settings, exp))


def test_the_shipped_configuration_composes_with_models_and_another_judge(tmp_path: Path) -> None:
    overrides = [
        f"run_dir={tmp_path}",
        "++evaluate.models={m1: a/hf, gpt4: b.json}",
        "+engine@judge.engine=openai",
        "judge.engine.base_url=https://host/v1",
        "judge.engine.model=big",
    ]
    with initialize_config_dir(str(Path(__file__).parents[1] / "conf"), version_base="1.3"):
        cfg = load(compose("evaluate", overrides=overrides), evaluate.EvaluateConfig)
    assert cfg.evaluate.models == {"m1": "a/hf", "gpt4": "b.json"}
    assert (cfg.engine_for("judge").model, cfg.engine_for("candidates").name) == ("big", "embedded")
    assert "{response_b}" in cfg.judge.pairwise_rubric
    head_to_head.check(cfg.judge)
    assert cfg.candidates.max_tokens == 1536


def test_a_second_turn_sees_the_first(tmp_path: Path) -> None:
    """With greedy decoding, the second prompt shows the first answer: another answer would change the prompt."""
    from nemo_srl.chat import ChatTemplate

    model = tiny.make_model(tmp_path / "model", ["Say a. Say b."], vocab_size=300)
    chat = ChatTemplate(model)
    both = chat.render("Say b.", after=[("Say a.", "a<|im_end|>")])
    assert both.startswith(chat.render("Say a.") + "a")
    assert both.endswith(chat.render("Say b."))
    assert both.count("<|im_end|>") == 3, "what a model wrote cannot end its turn"
    questions = Table(tmp_path / "questions", {}, Question)
    questions.write(
        [Question(question_id="1", turns=["Say a.", "Say b."]), Question(question_id="2", turns=["Say b."])]
    )
    cfg = Config(run_dir=str(tmp_path), engine=EmbeddedSettings(dtype="float32"))
    cfg.candidates = replace(cfg.candidates, temperature=0.0, max_tokens=4)
    policy = BaseModel(model, "digest")
    output, metrics = made(answers.STAGE, cfg, tmp_path / "answers", policy=policy, questions=questions)
    assert [a.key for a in output.read()] == ["1/00", "1/01", "2/00"]
    assert metrics["num_answers"] == 3


def test_a_chat_server_is_sent_the_turns_before(tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model", ["Say a."], vocab_size=300)
    questions = Table(tmp_path / "questions", {}, Question)
    questions.write([Question(question_id="1", turns=["First?", "Then?"])])
    chat = Loopback(lambda body, index: (ids_of(f"{len(body['messages'])} so far"), "stop"))
    with chat.running() as url:
        cfg = Config(run_dir=str(tmp_path), engine=server(url, api="chat"))
        policy = BaseModel(model, "digest")
        output, _ = made(answers.STAGE, cfg, tmp_path / "answers", policy=policy, questions=questions)
    assert [a.response for a in output.read()] == ["1 so far", "3 so far"]
    said = [("user", "First?"), ("assistant", "1 so far"), ("user", "Then?")]
    assert chat.requests[-1]["messages"] == [{"role": role, "content": text} for role, text in said]


def test_a_match_needs_a_rubric_and_the_same_questions(tmp_path: Path) -> None:
    def table(name: str, *keys: str) -> Table[Candidate]:
        found = Table(tmp_path / name, {}, Candidate)
        found.write(
            [
                Candidate(prompt_id=k, sample_index=0, prompt="?", response="r", num_tokens=1, finish_reason="stop")
                for k in keys
            ]
        )
        return found

    inputs = {"judge": BaseModel(tmp_path, "digest"), "a": table("a", "1", "2"), "b": table("b", "1")}
    with pytest.raises(ConfigError, match="pairwise_rubric=''"):
        made(head_to_head.STAGE, Config(run_dir="x"), tmp_path / "out", **inputs)
    cfg = Config(run_dir="x", judge=JudgeConfig(pairwise_rubric=PAIRWISE))
    with pytest.raises(DataError, match="different questions: 1 of them"):
        made(head_to_head.STAGE, cfg, tmp_path / "out", **inputs)
