"""The stages of the loop, one module each. A stage reads published artifacts and writes exactly one.

sft          M0, IFT and EFT seed            -> M1
prompts      M_t, IFT seed                   -> new instructions
candidates   M_t, prompts                    -> N responses each
judgements   M_t, candidates                 -> K verdicts each
pairs        candidates, judgements          -> best against worst
anchor       M1, candidates, judgements, pairs -> figures for the alarms
policy       M_t, pairs                      -> M_{t+1}
eft          M_{t+1}, ranked answers         -> verdicts that agree with people        optional
refresh      M_{t+1}, verdicts, own answers  -> M_{t+1} with its judging refreshed     optional
evaluation   M_t, held-out EFT               -> metrics
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from nemo_srl.artifacts import Artifact, Identity
from nemo_srl.config import Config, Role

LOOP: tuple[str, ...] = (
    "sft", "prompts", "candidates", "judgements", "pairs", "anchor", "policy", "eft", "refresh", "evaluation",
    "answers", "head_to_head", "ifeval",
)  # fmt: skip
"""The names of all stages, in the order in which a run makes them."""

Lines = list[tuple[str, str]]
"""What a stage did, for the report: (what, how many)."""


@dataclass(frozen=True)
class Context:
    """What a running stage sees. `inputs` and `output` are of the kinds that the stage's module names."""

    cfg: Config
    iteration: int
    inputs: Mapping[str, Any]
    output: Any


@dataclass(frozen=True)
class Result:
    """What the last step of a stage returns: the content's digest and figures for the manifest."""

    digest: str
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Step:
    """A part of a stage with its own process(es); a `distributed` one runs on every rank of the job."""

    name: str
    run: Callable[[Context], Result | None]
    distributed: bool = False


@dataclass(frozen=True)
class Stage:
    """`settings` are the parts of the configuration that decide the result, as dotted paths.

    Placement (launcher, parallel sizes, batch limits) is never among them. The last step returns the
    `Result` with which the artifact is published. `engines` names the roles in which the stage calls
    models: what decides the text of those engines counts as a setting, too, and their servers run beside
    the stage's steps, on its input `policy`.
    """

    name: str
    output: Callable[[Path, Identity], Artifact]
    settings: tuple[str, ...]
    steps: tuple[Step, ...]
    engines: tuple[Role, ...] = ()
    summary: Callable[[Mapping[str, float]], Lines] = lambda metrics: []
    """The report's lines, from the metrics of a manifest."""


def stage_named(name: str) -> Stage:
    """The stage in the module of this name."""
    stage: Stage = import_module(f"nemo_srl.stages.{name}").STAGE
    return stage


def settings_of(section: str) -> tuple[str, ...]:
    """What decides a stage's result in `section`: all of it but its engine, which belongs to the stage's roles."""
    return tuple(f"{section}.{f.name}" for f in fields(getattr(Config(), section)) if f.name != "engine")
