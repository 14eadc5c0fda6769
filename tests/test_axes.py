"""`make axes`: what each arm trains on, and what is counted of the models."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import axes
import axes_figures
import nltk
import pytest

from nemo_srl.artifacts import to_line
from nemo_srl.config import Config
from nemo_srl.data.checked.truth import CheckedInstruction
from nemo_srl.errors import ConfigError
from nemo_srl.records import Candidate, EFTExample, Judgement, Metric, PreferencePair
from nemo_srl.stages import Stage
from tests.punkt import make_punkt_tab
from tests.support import composed
from tests.tables import published

SCORES = {"p0/00": 1.0, "p0/01": 4.0, "p1/00": 2.0, "p1/01": 5.0}


def verdict_pair(answer: str, name: str) -> PreferencePair:
    return PreferencePair(
        prompt_id=f"{answer}/{name}", prompt="?", chosen=f"right {name}", rejected=f"wrong {name}", chosen_score=0.0,
        rejected_score=-1.0,
    )  # fmt: skip


class Recorder:
    """Stands in for an `Experiment`: it runs no stage, and keeps what each one was given."""

    def __init__(self, directory: Path, cfg: Config) -> None:
        self.cfg, self._directory = cfg, directory
        self.given_to: dict[str, dict[str, Any]] = {}
        verdicts = [
            Judgement(candidate_key=key, judgement_index=0, verdict="", score=score) for key, score in SCORES.items()
        ]  # fmt: skip
        pairs = [verdict_pair(f"p{i}", name) for i in range(8) for name in ("answer", "damaged")]
        self._made: dict[str, Any] = {
            "judgements": published(directory, "judgements", Judgement, verdicts),
            "verdict_pairs": published(directory, "verdict_pairs", PreferencePair, pairs),
        }

    def source(self, path: str, record: type) -> str:
        return path

    def given(self, name: str, records: list[Any], record: type) -> Any:
        return SimpleNamespace(read=lambda: records)

    def run(self, stage: Stage[Any], iteration: int, *, directory: str = "", **inputs: Any) -> Any:
        self.given_to[stage.name] = inputs
        return self._made.get(stage.name, SimpleNamespace(read=list))


@pytest.mark.parametrize("arm", axes.ARMS)
def test_each_arm_changes_what_it_says_and_nothing_else(arm: str, tmp_path: Path) -> None:
    cfg = composed("num_iterations=1", recipe="srl-smollm2-135m-checked")
    exp: Any = Recorder(tmp_path, cfg)
    axes.iterate(arm, exp, m1=SimpleNamespace())  # type: ignore[arg-type]
    scores = {j.candidate_key: j.score for j in exp.given_to["pairs"]["judgements"].read()}
    assert sorted(scores.values()) == sorted(SCORES.values()), "a control keeps the distribution of the scores"
    assert (scores == SCORES) == (arm != "random")
    pairs = exp.given_to["policy"]["verdict_pairs"]
    if arm == "no_verdict_pairs":
        assert pairs is None
    else:
        wrong = [p.chosen.startswith("wrong") for p in pairs.read()]
        assert sum(wrong) == (8 if arm == "random" else 0), "half of 16"
        assert wrong[::2] == wrong[1::2], "the two pairs of an answer say the same"
    assert "checked" in exp.given_to


def test_a_recipe_without_true_scores_is_refused(tmp_path: Path) -> None:
    cfg = axes.AxesConfig(run_dir=str(tmp_path), **{k: v for k, v in vars(composed()).items() if k != "run_dir"})
    with pytest.raises(ConfigError, match=r"it needs data\.checked_path \(''\).*recipe=srl-smollm2-135m-checked"):
        axes.run(cfg)
    with pytest.raises(ConfigError, match=r"axes\.arms=\['oracle'\]: no such arm"):
        axes.AxesSettings(arms=["oracle"])
    with pytest.raises(ConfigError, match=r"axes\.seeds=\[\]: there is nothing to run.*\[1\]"):
        axes.AxesSettings(seeds=[])


def write_evaluation(root: Path, run: str, model: int, *, answers: dict[str, str], judged: dict[str, float]) -> None:
    """What the stages `evaluation` and `checked` of a model leave, as far as it is read."""
    instructions = [
        CheckedInstruction(
            instruction_id=key, task_id=key, split="held_out", category="", instruction=f"About {key}?", asked=["bak"],
            constraints=[{"kind": "max_words", "value": 9}], topic=["bread", "flour"],
        )
        for key in answers
    ]  # fmt: skip
    examples = [
        EFTExample(
            example_id=f"{key}-{i}", instruction=f"About {key}?", response="x", justification="", score=4 - 2 * i
        )
        for key in answers
        for i in range(2)
    ]
    directory = axes_figures.run_dir_of(root, 1, run) / f"iter_{model - 1:02d}"
    for name in ("evaluation", "checked"):
        (directory / name).mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[Any]] = {
        "evaluation/answers": [
            Candidate(
                prompt_id=key, sample_index=0, prompt=f"About {key}?", response=text, num_tokens=9, finish_reason="stop"
            )
            for key, text in answers.items()
        ],
        "evaluation/judgements": [
            Judgement(candidate_key=key, judgement_index=0, verdict="", score=score) for key, score in judged.items()
        ],
        "checked/data": [Metric(name="surface_accuracy", value=0.5, n=4)],
        "instructions": instructions,
        "eft_eval": examples,
    }
    for name, records in rows.items():
        (directory / f"{name}.jsonl").write_text("".join(map(to_line, records)))
    inputs = {name: {"path": str(directory / f"{name}.jsonl")} for name in ("instructions", "eft_eval")}
    (directory / "checked" / "stage.json").write_text(json.dumps({"inputs": inputs}))


def test_the_table_has_both_axes_and_the_paired_gains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [])
    good, cut = "Baking makes bread of flour.", "Baking makes bread of flour and"
    better = {"a-0": 4.0, "a-1": 2.0, "b-0": 4.0, "b-1": 4.0, "c-0": 2.0, "c-1": 3.0}
    worse = {"a-0": 1.0, "a-1": 2.0, "b-0": 4.0, "c-0": 2.0, "c-1": 3.0}
    write_evaluation(tmp_path, "m1", 1, answers={"a": cut, "b": cut, "c": good}, judged=worse)
    write_evaluation(tmp_path, "self", 2, answers={"a": good, "b": cut, "c": good}, judged=better)
    write_evaluation(tmp_path, "random", 2, answers={"a": cut, "b": cut, "c": good}, judged=worse)
    text = axes_figures.write(tmp_path, [1], ["self", "random"], num_iterations=1)
    cells = {tuple(line.split("|")[1:3]): line for line in text.replace(" ", "").splitlines()}
    # True scores: 4, 4, 5 and 5, 4, 5. The pair of b has no verdict, or a tie; a is put right; c stays wrong.
    assert "4.33" in cells["answering", "self"]
    assert "4.67" in cells["answering", "self"]
    assert "+0.33[-1.07,+1.69]" in cells["answering", "self"]
    assert "+0.00[-4.30,+4.30]" in cells["answering", "random"], "three equal instructions prove nothing"
    assert "+0.333[" in cells["judging", "self"]
    assert "Surface baseline of judging: 0.500" in text
    assert (tmp_path / "results.md").read_text().rstrip() == text
    assert (tmp_path / "axes.png").stat().st_size > 10_000
    assert "Rules by IFEval's checks are not in the table: " in text
    assert "punkt_tab" in text


def test_ifevals_own_checks_are_a_second_opinion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nltk.data, "path", [make_punkt_tab(tmp_path / "nltk")])
    short, long = "Baking makes bread.", "Baking makes bread of flour, of water, and of salt, in an oven."
    judged = {f"{key}-{i}": 3.0 for key in "ab" for i in range(2)}
    write_evaluation(tmp_path, "m1", 1, answers={"a": long, "b": long}, judged=judged)
    write_evaluation(tmp_path, "self", 2, answers={"a": short, "b": long}, judged=judged)
    text = axes_figures.write(tmp_path, [1], ["self"], num_iterations=1)
    line = next(x for x in text.replace(" ", "").splitlines() if x.startswith("|rules(IFEval)|self"))
    assert "|+0.500[" in line, "one of two answers has at most nine words now"


def test_verdict_pairs_are_turned_round_for_half_of_the_answers() -> None:
    pairs = [verdict_pair(f"iter1-{i:06d}", name) for i in range(10) for name in ("answer", "damaged")]
    found = axes.turned(pairs, random.Random(3))
    assert [p.key for p in found] == [p.key for p in pairs]
    assert {p.chosen for p in found} == {"right answer", "right damaged", "wrong answer", "wrong damaged"}
    assert sum(a != b for a, b in zip(found, pairs, strict=True)) == 10
