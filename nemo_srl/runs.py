"""A run directory read back: what its stages left, for reports, exports and model cards.

Only what is published is seen, so a run under way can be read at any time; nothing is written or locked. Raises
`DataError` for a directory without any published stage.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_srl.artifacts import DATA, MANIFEST, SPEC, Artifact, Manifest, read_jsonl
from nemo_srl.errors import DataError
from nemo_srl.records import Metric, R

_ORDER = ("sft", "prompts", "candidates", "judgements", "pairs", "anchor", "policy", "eft", "own_answers", "refresh")


@dataclass(frozen=True, kw_only=True)
class StageRun:
    """One published stage; `name` is its directory's, which tells apart what one stage made twice."""

    iteration: int
    name: str
    path: Path
    manifest: Manifest


@dataclass(frozen=True, kw_only=True)
class Run:
    """The published stages of a run directory, by iteration and in the order in which they are made."""

    run_dir: Path
    stages: tuple[StageRun, ...]

    @property
    def iterations(self) -> list[int]:
        """The self-rewarding iterations that have begun to publish: 1, 2, ..."""
        return sorted({s.iteration for s in self.stages if s.iteration > 0})

    def find(self, iteration: int, name: str) -> StageRun | None:
        """The stage in `iter_XX/name`, if it is published."""
        return next((s for s in self.stages if (s.iteration, s.name) == (iteration, name)), None)

    def table(self, iteration: int, name: str, record: type[R]) -> list[R]:
        """The records of a stage; none when it is not published."""
        found = self.find(iteration, name)
        return read_jsonl(found.path / DATA, record) if found else []

    def evaluations(self) -> dict[str, list[Metric]]:
        """Metrics by model name, M0 first."""
        found = {"M0": self.table(0, "evaluation_m0", Metric)}
        for t in (0, *self.iterations):
            found[f"M{t + 1}"] = self.table(t, "evaluation", Metric)
        return {name: metrics for name, metrics in found.items() if metrics}

    def models(self) -> dict[str, StageRun]:
        """The stage that made each trained model, M1 first. A refreshed model takes the place of DPO's."""
        found = {"M1": self.find(0, "sft")}
        for t in self.iterations:
            found[f"M{t + 1}"] = self.find(t, "refresh") or self.find(t, "policy")
        return {name: stage for name, stage in found.items() if stage}

    def config(self) -> dict[str, Any]:
        """The whole configuration, as the last stage was given it."""
        spec: dict[str, Any] = self.spec(self.stages[-1])
        config: dict[str, Any] = spec["config"]
        return config

    def spec(self, stage: StageRun) -> dict[str, Any]:
        """What `stage` was asked for: its `stage.json`."""
        spec: dict[str, Any] = json.loads((stage.path / SPEC).read_text(encoding="utf-8"))
        return spec


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
            f"run_dir={run_dir}: no finished stage in it (no iter_*/*/{MANIFEST}). Give the run directory of "
            "recipes/iterate.py, after its first stage has ended."
        )
    return Run(run_dir=run_dir, stages=tuple(sorted(found, key=_place)))


def _place(stage: StageRun) -> tuple[int, int, str]:
    rank = _ORDER.index(stage.name) if stage.name in _ORDER else len(_ORDER)
    return stage.iteration, rank, stage.name
