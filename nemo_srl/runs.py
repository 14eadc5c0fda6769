"""Reads a run directory, for reports, exports and model cards.

Only published stages are seen, so a run can be read before it is finished. Nothing is written or locked.
Raises `DataError` for a directory without a published stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_srl.artifacts import MANIFEST, SPEC, Artifact, Manifest, file_of, read_json, read_jsonl
from nemo_srl.errors import DataError
from nemo_srl.judging.intervals import Sums, sums_in
from nemo_srl.records import GroupSum, Metric, R
from nemo_srl.stages import LOOP
from nemo_srl.trainers import WORK_DIR, read_metrics


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """One published stage. `name` is its directory's name, because one stage may run twice in an iteration."""

    iteration: int
    name: str
    path: Path
    manifest: Manifest


@dataclass(frozen=True, kw_only=True)
class Run:
    """The published stages of a run directory, by iteration and in the order of `stages.LOOP`."""

    run_dir: Path
    stages: tuple[StageRun, ...]

    @property
    def iterations(self) -> list[int]:
        """The self-rewarding iterations with a published stage: 1, 2, ..."""
        return sorted({s.iteration for s in self.stages if s.iteration > 0})

    def find(self, iteration: int, name: str) -> StageRun | None:
        """The stage in `iter_XX/name`; None when it is not published."""
        return next((s for s in self.stages if (s.iteration, s.name) == (iteration, name)), None)

    def table(self, iteration: int, name: str, record: type[R], part: str = "") -> list[R]:
        """The records of a stage, or of one of its named parts.

        Empty when the stage is not published, or when it has no such part: runs of older versions have no parts.
        """
        found = self.find(iteration, name)
        if found is None:
            return []
        path = file_of(found.path, part)
        return [] if part and not path.exists() else read_jsonl(path, record)

    def evaluated(self) -> dict[str, tuple[int, str]]:
        """The stage that evaluated each model: (iteration, name) by model name, M0 first."""
        return {"M0": (0, "evaluation_m0")} | {f"M{t + 1}": (t, "evaluation") for t in (0, *self.iterations)}

    def measured(self) -> dict[str, list[tuple[int, str]]]:
        """The stages that measured each model, as in `evaluated`: its evaluation, and what code knows of it."""
        return {
            name: [(t, stage), (t, stage.replace("evaluation", "checked"))]
            for name, (t, stage) in self.evaluated().items()
        }

    def evaluations(self) -> dict[str, list[Metric]]:
        """The metrics of each evaluated model by model name, M0 first, with those of the stage `checked`."""
        found = {
            name: [row for t, stage in places for row in self.table(t, stage, Metric)]
            for name, places in self.measured().items()
        }
        return {name: metrics for name, metrics in found.items() if metrics}

    def sums(self, places: Mapping[str, Sequence[tuple[int, str]]]) -> dict[str, dict[str, Sums]]:
        """What each item adds to each metric, by the name of the model. `places` has the stages that measured it.

        Empty for stages of older versions.
        """
        found = {
            model: sums_in(row for t, stage in stages for row in self.table(t, stage, GroupSum, "groups"))
            for model, stages in places.items()
        }
        return {model: {**metrics} for model, metrics in found.items() if metrics}

    def models(self) -> dict[str, StageRun]:
        """The stage that made each trained model, M1 first. A refreshed model replaces the one that DPO made."""
        found = {"M1": self.find(0, "sft")}
        for t in self.iterations:
            found[f"M{t + 1}"] = self.find(t, "refresh") or self.find(t, "policy")
        return {name: stage for name, stage in found.items() if stage}

    def config(self) -> dict[str, Any]:
        """The whole configuration of the last stage."""
        config: dict[str, Any] = read_spec(self.stages[-1].path)["config"]
        return config


def open_run(run_dir: Path) -> Run:
    """Read the manifests of a run directory."""
    found = []
    for path in run_dir.glob(f"iter_[0-9]*/*/{MANIFEST}"):
        manifest = Artifact(path.parent, {}).manifest()
        assert manifest is not None
        iteration = int(path.parent.parent.name.removeprefix("iter_"))
        found.append(StageRun(iteration=iteration, name=path.parent.name, path=path.parent, manifest=manifest))
    if not found:
        raise DataError(
            f"run_dir={run_dir}: there is no finished stage (no iter_*/*/{MANIFEST}). Give the run directory of "
            "recipes/iterate.py, after its first stage has ended."
        )
    return Run(run_dir=run_dir, stages=tuple(sorted(found, key=_place)))


def training_metrics(directory: Path) -> list[dict[str, Any]]:
    """The metrics of each training step in a stage's directory, which need not be published yet.

    The trainer that the stage was configured with reads them. Empty when there is no training.
    """
    work_dir = directory / WORK_DIR
    return read_metrics(read_spec(directory)["config"]["trainer"]["name"], work_dir) if work_dir.exists() else []


def read_spec(directory: Path) -> dict[str, Any]:
    """The content of the `stage.json` in a stage's directory: its settings and inputs."""
    path = directory / SPEC
    spec = read_json(path)
    try:
        return {**spec, "config": {**spec["config"]}, "inputs": {**spec["inputs"]}}
    except (KeyError, TypeError) as e:
        raise DataError(f"{path}: not the description of a stage of this version ({e!r}). Delete {directory}.") from e


def _place(stage: StageRun) -> tuple[int, int, str]:
    # Some directories are not named after their stage, e.g. `own_answers`. They stand beside the stage that made them.
    known = [name for name in (stage.name, stage.manifest.stage) if name in LOOP]
    return stage.iteration, LOOP.index(known[0]) if known else len(LOOP), stage.name
