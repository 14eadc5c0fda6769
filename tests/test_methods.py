"""Every method of conf/method/: what it sets, what is refused beside it, and a run of each through the loop."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_srl import combinations, preflight
from nemo_srl.artifacts import read_jsonl, to_line
from nemo_srl.config import Config
from nemo_srl.errors import ConfigError, DataError
from nemo_srl.records import EFTExample, Judgement, PreferencePair, Prompt
from tests.loopback import Loopback, ids_of
from tests.support import ROOT, composed
from tests.tiny_loop import published, start

METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "self_rewarding": {},
    "meta_rewarding": {
        "pairs.rule": "length_control", "pairs.rho": 0.32, "verdict_pairs.source": "meta_judge",
        "verdict_pairs.num_prompts": 1000, "verdict_pairs.last_iteration": 2, "verdict_pairs.max_chars": 1100,
    },
    "iterative_rpo": {
        "judge.mode": "verifier", "judge.verifier": "ifeval", "pairs.rule": "all_pairs", "pairs.num_pairs": 10,
        "dpo.sft_loss_weight": 1.0,
    },
    "cream": {"pairs.second_judge": "previous", "dpo.preference_loss": "cdpo"},
    "temporal": {"pairs.rule": "anchored", "pairs.anchor": "m1"},
    "self_taught_evaluator": {"verdict_pairs.source": "sampled", "verdict_pairs.num_prompts": 1000},
    "simpo_self_rewarding": {"dpo.preference_loss": "simpo", "dpo.beta": 2.0, "dpo.simpo_gamma": 1.0},
}  # fmt: skip
RECIPES = sorted(path.stem for path in (ROOT / "conf" / "recipe").glob("*.yaml"))


def flat(cfg: Config) -> dict[str, Any]:
    found = {}
    for section, value in asdict(cfg).items():
        for key, x in value.items() if isinstance(value, dict) else [("", value)]:
            found[f"{section}.{key}".rstrip(".")] = x
    return found


@pytest.mark.parametrize("method", METHODS)
def test_a_method_sets_what_it_says_and_nothing_else(method: str) -> None:
    plain, cfg = flat(composed()), flat(composed(f"method={method}"))
    changed = {key: value for key, value in cfg.items() if plain[key] != value}
    changed.pop("verdict_pairs.meta_rubric", None)
    assert changed == CHANGES[method]
    remedies = ["judge.verifier_path=x.jsonl"] if method == "iterative_rpo" else []
    combinations.check(composed(f"method={method}", *remedies))


def test_every_method_has_a_row_in_its_page() -> None:
    page = (ROOT / "docs" / "methods.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)
    assert sorted(rows) == METHODS


SCORE_ALONE = EFTExample(example_id="e", instruction="Why?", response="So.", justification="", score=3)


@pytest.mark.parametrize("recipe", RECIPES)
def test_methods_go_with_every_recipe(recipe: str) -> None:
    # The checked recipe reads one verdict as an expectation, and two methods need sampled ones.
    more = ["judge.num_judgements=3", "judge.temperature=0.7"] if "checked" in recipe else []
    for method in METHODS:
        verifier = "judge.verifier_path=x" if method == "iterative_rpo" else "seed=1"
        cfg = composed(f"method={method}", verifier, *more, recipe=recipe)
        combinations.check(cfg, [SCORE_ALONE] if more else [])


def test_the_remedy_for_verdict_pairs_is_one_that_the_run_accepts() -> None:
    overrides, recipe = ("+judge_mode=pairwise",), "srl-smollm2-135m-checked"
    with pytest.raises(ConfigError, match=r"judge\.mode='pairwise' gives none") as refused:
        combinations.check(composed(*overrides, recipe=recipe), [SCORE_ALONE])
    remedy = str(refused.value).rpartition("Set ")[2].rstrip(".").split()
    assert remedy[:3] == ["verdict_pairs.num_prompts=0", "verdict_pairs.num_seed=0", "dpo.verdict_weight=1"]
    assert remedy[3:] == ["dpo.compare_verdicts=true"]
    combinations.check(composed(*overrides, *remedy, recipe=recipe), [SCORE_ALONE])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("pairs.rule=anchored",), r"pairs\.anchor='': .*Set pairs\.anchor=m1"),
        (("pairs.anchor=m1",), r"pairs\.anchor='m1': pairs\.rule='best_worst' does not use it.*pairs\.rule=anchored"),
        (("pairs.rho=0.3",), r"pairs\.rho=0\.3: .*Set pairs\.rule=length_control"),
        (("pairs.num_pairs=3",), r"pairs\.num_pairs=3: .*Set pairs\.rule=all_pairs"),
        (("pairs.second_judge=m1",), r"dpo\.preference_loss='dpo' does not use that\. Set dpo\.preference_loss=cdpo"),
        (("method=cream", "judge.model=previous"), r"pairs\.second_judge='previous': judge\.model is the same"),
        (
            ("method=cream", "+engine@judge.engine=openai", "judge.engine.base_url=http://h/v1"),
            r"pairs\.second_judge='previous': judge\.engine answers for every judge",
        ),
        (("+judge_mode=verifier", "judge.verifier_path=x", "judge.model=m1"), r"judge\.model='m1': with judge\.mode="),
        (("method=self_taught_evaluator", "judge.temperature=0"), r"verdict_pairs\.source='sampled': .*Set judge\.num"),
        (("method=meta_rewarding", "judge.num_judgements=1"), r"verdict_pairs\.source='meta_judge': .*judge\.temp"),
        (("method=meta_rewarding", "verdict_pairs.meta_rubric="), r"verdict_pairs\.meta_rubric='': .*method=meta_rew"),
        (("method=meta_rewarding", "+judge_mode=pairwise"), r"judge\.mode='pairwise' gives none"),
        (("early_stopping.prompts_path=x",), r"judge\.pairwise_rubric='': a comparison needs a rubric"),
        (("early_stopping.model=m1",), r"early_stopping\.model='m1': .*turns early stopping off"),
    ],
)
def test_what_cannot_work_together_is_refused(overrides: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        combinations.check(composed(*overrides))


@pytest.mark.parametrize("key", ["judge.model", "pairs.anchor", "pairs.second_judge"])
def test_a_server_is_no_model_directory(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key}=.*\+engine@judge\.engine=openai"):
        composed(f"{key}=http://host/v1")


def test_prompts_whose_answers_cannot_be_checked_are_refused() -> None:
    cfg = composed("method=iterative_rpo", "judge.verifier_path=x")
    with pytest.raises(ConfigError, match=r"prompts\.path='': .*Set prompts\.path"):
        combinations.check_verifiable(cfg, {}, {"a"})
    prompts = {"p.jsonl": [Prompt(prompt_id="1", text="a"), Prompt(prompt_id="2", text="b")]}
    with pytest.raises(DataError, match=r"prompts\.path='p\.jsonl': 1 of 2 prompts .* The first is '2'"):
        combinations.check_verifiable(cfg, prompts, {"a"})
    combinations.check_verifiable(cfg, prompts, {"a", "b"})


def test_more_pairs_of_a_prompt_need_fewer_prompts() -> None:
    few = ("prompts.num_prompts=3", "dpo.global_batch_size=8")
    with pytest.raises(ConfigError, match="one pair at most"):
        preflight.check_prompts(composed(*few), {})
    preflight.check_prompts(composed(*few, "pairs.rule=all_pairs"), {})
    with pytest.raises(ConfigError, match="2 pairs at most"):
        preflight.check_prompts(composed(*few, "pairs.rule=all_pairs", "pairs.num_pairs=2"), {})


class Run:
    """A run of one method that begins with M1, answers and verdicts of the run that nobody disturbed."""

    def __init__(self, tiny_run: Path, base: Path, *, forget: tuple[str, ...]) -> None:
        self.run_dir, self.log = base / "run", base / "log"
        shutil.copytree(tiny_run / "run", self.run_dir, ignore=shutil.ignore_patterns("logs"))
        for name in ("iter_01/pairs", "iter_01/anchor", "iter_01/policy", "iter_01/evaluation", *forget):
            shutil.rmtree(self.run_dir / name)

    def finish(self, *overrides: str) -> set[str]:
        """Run it to its end. Returns the stages that it made."""
        before = set(published(self.run_dir))
        process = start(self.run_dir, overrides, self.log, prefix=("env", f"PYTHONPATH={ROOT}"))
        assert process.wait(600) == 0, self.log.read_text()[-4000:]
        return set(published(self.run_dir)) - before

    def figures(self, stage: str) -> dict[str, float]:
        found: dict[str, float] = json.loads((self.run_dir / stage / "manifest.json").read_text())["metrics"]
        return found

    def rows(self, stage: str = "policy") -> list[dict[str, Any]]:
        """What DPO was trained on."""
        text = (self.run_dir / "iter_01" / stage / "training/train.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def overrides(tiny_overrides: list[str]) -> list[str]:
    return [*tiny_overrides, "anchor.num_prompts=0", "tracking.tensorboard=false"]


EVALUATIONS = ("iter_00/evaluation", "iter_00/evaluation_m0")
"""They are made again with another judge or pair rule."""
MADE = {f"iter_01/{stage}" for stage in ("pairs", "policy", "evaluation")}


def test_cream_trains_with_the_agreement_of_two_judges(tiny_run: Path, overrides: list[str], tmp_path: Path) -> None:
    """In the first iteration M_{t-1} is M1, so another model stands for it: M1 with noise in its weights."""
    run = Run(tiny_run, tmp_path, forget=())
    other = shutil.copytree(tiny_run / "run/iter_00/sft/hf", tmp_path / "noisy")
    weights = load_file(other / "model.safetensors")
    noise = torch.Generator().manual_seed(1)
    noisy = {k: w + 0.03 * torch.randn(w.shape, generator=noise) for k, w in weights.items()}
    save_file(noisy, other / "model.safetensors", metadata={"format": "pt"})
    made = run.finish(*overrides, "method=cream", f"pairs.second_judge={other}")
    assert made == {*MADE, "iter_01/second_judgements"}
    confidence = run.figures("iter_01/pairs")["confidence"]
    assert 0 <= confidence < 1
    assert {row["confidence"] for row in run.rows()} == {confidence}


def test_temporal_rejects_answers_of_an_earlier_model(tiny_run: Path, overrides: list[str], tmp_path: Path) -> None:
    run = Run(tiny_run, tmp_path, forget=EVALUATIONS)
    other = tiny_run / "run/iter_01/policy/hf"
    made = run.finish(*overrides, "method=temporal", f"pairs.anchor={other}", "pairs.accumulate=true")
    assert made == {*MADE, *EVALUATIONS, "iter_01/anchor_candidates", "iter_01/anchor_judgements"}
    pairs = read_jsonl(run.run_dir / "iter_01/pairs/data.jsonl", PreferencePair)
    before = read_jsonl(tiny_run / "run/iter_01/pairs/data.jsonl", PreferencePair)
    assert all(a.rejected_score <= b.rejected_score for a, b in zip(pairs, before, strict=True) if a.key == b.key)


def test_simpo_needs_no_reference(tiny_run: Path, overrides: list[str], tmp_path: Path) -> None:
    run = Run(tiny_run, tmp_path, forget=())
    assert run.finish(*overrides, "method=simpo_self_rewarding") == MADE
    assert published(run.run_dir)["iter_01/pairs"] == published(tiny_run / "run")["iter_01/pairs"]
    assert not any("reference" in row for row in run.rows())


def test_pairs_of_verdicts_are_trained_with_those_of_answers(
    tiny_run: Path, overrides: list[str], tmp_path: Path
) -> None:
    """A server judges and compares, because nothing has taught the tiny model to compare. It also compares checkpoints,
    and always likes the first answer. So none is better than the one before, and the first one is chosen."""

    points = {"Off": 0, "Half": 2, "Right": 5}

    def judge(body: dict[str, Any], index: int) -> tuple[list[int], str]:
        text = body["messages"][0]["content"]
        if "or else" in text:
            return ids_of("Winner: A"), "stop"
        if "verdict" in text:
            first, second = (points[word] for word in re.findall(r"Off|Half|Right", text.partition("verdict")[2]))
            return ids_of(f"Winner: {'A' if first > second else 'B'}"), "stop"
        word = list(points)[(index**2 + len(text)) % 3]  # two different ones, and the mean depends on the text
        return ids_of(f"{word}.\nScore: {points[word]}"), "stop"

    validation = tmp_path / "validation.jsonl"
    validation.write_text("".join(json.dumps({"instruction": f"Name animal number {i}."}) + "\n" for i in range(2)))
    run = Run(tiny_run, tmp_path, forget=("iter_01/judgements", *EVALUATIONS))
    with Loopback(judge).running() as url:
        server = ("+engine@judge.engine=openai", f"judge.engine.base_url={url}", "judge.temperature=1.0")
        rubric = "verdict_pairs.meta_rubric='{instruction} {response} verdict {verdict_a} {verdict_b} Winner:'"
        early_stopping = (
            "judge.pairwise_rubric='{instruction} {response_a} or else {response_b} Winner:'",
            f"early_stopping.prompts_path={validation}",
        )
        made = run.finish(*overrides, *server, "method=meta_rewarding", rubric, *early_stopping)
    judged = {"iter_01/judgements", "iter_01/meta_judge", *EVALUATIONS}
    compared = {f"iter_01/{stage}" for stage in ("trained", "answers_000001", "answers_000002", "match_000002")}
    assert made == {*MADE, *judged, *compared}
    trained = run.run_dir / "iter_01/trained"
    num_steps = int(run.figures("iter_01/trained")["num_steps"])
    checkpoints = sorted(path.name for path in (trained / "checkpoints").iterdir())
    assert checkpoints == [f"step_{n:06d}" for n in range(1, num_steps + 1)]
    weights = [(path / "model.safetensors").read_bytes() for path in (
        run.run_dir / "iter_01/policy/hf", trained / "checkpoints/step_000001", trained / "hf",
        trained / f"checkpoints/step_{num_steps:06d}",
    )]  # fmt: skip
    assert weights[0] == weights[1] != weights[2] == weights[3]
    assert run.figures("iter_01/policy") == {"num_steps": 1}
    assert not (trained / "training/kept").exists()
    num_answers, num_verdicts = (run.figures(f"iter_01/{s}")["num_pairs"] for s in ("pairs", "meta_judge"))
    assert num_verdicts > 0
    assert len(run.rows("trained")) == num_answers + num_verdicts


def test_verdicts_with_a_known_order_are_trained_as_well(tiny_run: Path, overrides: list[str], tmp_path: Path) -> None:
    run = Run(tiny_run, tmp_path, forget=())
    made = run.finish(*overrides, "method=self_taught_evaluator")
    assert made == {*MADE, "iter_01/taught_verdicts"}
    num_answers, num_verdicts = (run.figures(f"iter_01/{s}")["num_pairs"] for s in ("pairs", "taught_verdicts"))
    assert len(run.rows()) == num_answers + num_verdicts


def half_of_it(instruction: str, response: str) -> float:
    """A check that answers of any length pass in part."""
    return min(1.0, len(response) / 40)


def test_iterative_rpo_trains_on_what_code_prefers(tiny_run: Path, overrides: list[str], tmp_path: Path) -> None:
    prompts = [Prompt(prompt_id=f"x{i}", text=f"Name color number {i}.") for i in range(8)]
    (tmp_path / "prompts.jsonl").write_text("".join(map(to_line, prompts)))
    run = Run(tiny_run, tmp_path, forget=("iter_00", "iter_01"))
    made = run.finish(
        *overrides, "method=iterative_rpo", f"judge.verifier={__name__}:half_of_it",
        f"prompts.path={tmp_path / 'prompts.jsonl'}",
    )  # fmt: skip
    assert {"iter_01/candidates", "iter_01/judgements", "iter_01/policy"} < made
    assert "judgements" not in {path.stem.split("-")[-1] for path in (run.run_dir / "logs").glob("iter_01-*.log")}
    answers = {j.candidate_key: j.score for j in read_jsonl(run.run_dir / "iter_01/judgements/data.jsonl", Judgement)}
    assert len(answers) == 32
    pairs = read_jsonl(run.run_dir / "iter_01/pairs/data.jsonl", PreferencePair)
    assert len(pairs) > len({p.prompt_id for p in pairs}), "a prompt gives several pairs"
    assert all(len(p.chosen) > len(p.rejected) for p in pairs)
