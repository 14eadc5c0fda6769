"""What a stage is: it reads published artifacts and writes exactly one.

A stage says what it makes and what it needs. `Experiment.run` refuses inputs that are wrong, missing or misspelt before
anything starts, and a type checker knows what it returns. `table_stage` makes a stage that writes a table of records.
`training.training_stage` makes a stage that trains a model.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

from nemo_srl.artifacts import Artifact, BaseModel, Identity, Model, SourceFile, Table
from nemo_srl.chat import ChatTemplate
from nemo_srl.config import Config, Role
from nemo_srl.config.generation import AN_INPUT
from nemo_srl.errors import InputError
from nemo_srl.records import Metric, R, Record
from nemo_srl.workload import Assumptions, Work

A = TypeVar("A", bound=Artifact)
Input = Artifact | BaseModel | SourceFile[Any]
Per = Literal["run", "iteration", "model"]


@dataclass(frozen=True)
class Need:
    """One input of a stage: a table or file of `record`, or a model where `record` is None."""

    record: type[Record] | None
    optional: bool = False
    many: str = ""
    """If set, the input is a list, and its members have the names `<many>_1`, `<many>_2` and so on."""
    formerly: str = ""
    """The input's name in older run directories."""


MODEL = Need(None)
CHAT = ("model.chat_template", "model.chat_template_kwargs", "model.thinking_tags")
"""The settings that decide how a chat becomes text, and what of a text is the answer."""


@dataclass(frozen=True)
class Context:
    """What a running stage sees. `model` is the name of the input that its engines serve."""

    cfg: Config
    iteration: int
    inputs: Mapping[str, Any]
    output: Any
    model: str = "policy"

    @property
    def model_dir(self) -> Path:
        """The Hugging Face directory of the model that the stage asks or trains."""
        return Path(self.inputs[self.model].model_dir)

    @cached_property
    def chat(self) -> ChatTemplate:
        """The chat template of that model."""
        cfg = self.cfg.model
        return ChatTemplate(
            self.model_dir, chat_template=cfg.chat_template, thinking_tags=cfg.thinking_tags,
            variables=cfg.chat_template_kwargs,
        )  # fmt: skip

    def has(self, name: str) -> bool:
        """Whether an optional input is there."""
        return name in self.inputs

    def read(self, name: str, record: type[R]) -> list[R]:
        """The records of an input."""
        found: list[R] = self.inputs[name].read()
        return found

    def read_all(self, many: str, record: type[R]) -> list[R]:
        """The records of all members of a list of inputs, in its order."""
        names = itertools.takewhile(self.has, (f"{many}_{i}" for i in itertools.count(1)))
        return [found for name in names for found in self.read(name, record)]


@dataclass(frozen=True)
class Result:
    """What the last step of a stage returns: digests of the content and its parts, and figures for the manifest."""

    digest: str
    metrics: Mapping[str, float]
    parts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """A part of a stage, with its own process. A `distributed` step has one process on every rank of the job."""

    name: str
    run: Callable[[Context], Result | None]
    distributed: bool = False


@dataclass(frozen=True, kw_only=True)
class Stage(Generic[A]):
    """A kind of work: what it needs and makes, and how to run it."""

    name: str
    module: str
    """The module that has it as `STAGE`, for worker processes. A user's own stage may be in any module."""
    needs: Mapping[str, Need | type[Record]]
    output: Callable[[Path, Identity], A]
    settings: tuple[str, ...]
    """The parts of the configuration that decide the result, as dotted paths. Placement (launcher, parallel sizes,
    batch limits) is never among them. The settings that a backend calls decisive are added."""
    added: tuple[str, ...] = ()
    """Members of `settings` that were added later. An older run directory does not know them, and is kept."""
    version: int = 1
    """Raise it when the same settings and inputs give another result than before. Older results are then refused."""
    steps: tuple[Step, ...]
    """The last step returns the `Result` with which the artifact is published."""
    engines: tuple[Role, ...] = ()
    """The roles in which the stage asks models. The engines' servers run beside its steps."""
    model: str = "policy"
    """The name of the input that the engines serve."""
    per: Per = "iteration"
    """How often the loop runs it: once in a run, in each iteration, or for each model."""
    work: Callable[[Config, Assumptions], Work | None] = lambda cfg, assumptions: None
    """How much it generates or trains, for the plan."""
    summary: Callable[[Mapping[str, float]], list[tuple[str, str]]] = lambda metrics: []
    """Lines of (what, how many) for the report, from the figures of its manifest."""

    @property
    def distributed(self) -> bool:
        """Whether it has a step on the trainer's ranks."""
        return any(s.distributed for s in self.steps)

    def inputs(self, given: Mapping[str, Any]) -> dict[str, Input]:
        """The inputs `given`, by their names in a worker. Raises `InputError`."""
        needs = {name: n if isinstance(n, Need) else Need(n) for name, n in self.needs.items()}
        if unknown := sorted(given.keys() - needs.keys()):
            raise InputError(f"stage {self.name}: it has no input {unknown[0]!r}. Its inputs are {', '.join(needs)}.")
        found: dict[str, Input] = {}
        for name, need in needs.items():
            value = given.get(name)
            if value is None and not need.optional and not need.many:
                raise InputError(f"stage {self.name}: the input {name!r} is missing. It needs {', '.join(needs)}.")
            if need.many:
                members = {f"{need.many}_{i}": x for i, x in enumerate(value or (), start=1)}
            else:
                members = {} if value is None else {name: value}
            for x in members.values():
                self._check(name, need, x)
            found |= members
        return found

    def _check(self, name: str, need: Need, x: object) -> None:
        if need.record is None:
            fits, wanted = isinstance(x, Model | BaseModel), "a model"
        else:
            fits = isinstance(x, Table | SourceFile) and x.record is need.record
            wanted = f"a table or file of {need.record.__name__}"
        if not fits:
            kind = getattr(x, "record", type(x)).__name__
            raise InputError(f"stage {self.name}: the input {name!r} must be {wanted}, but it is of {kind}.")


def figures(metrics: Sequence[Metric]) -> dict[str, float]:
    """The measured values, for a manifest."""
    return {m.name: m.value for m in metrics if m.value is not None}


@dataclass(frozen=True)
class Made(Generic[R]):
    """What the function of a table stage returns: records, figures for the manifest, and further tables by name."""

    records: Sequence[R]
    metrics: Mapping[str, float]
    parts: Mapping[str, Sequence[Record]] = field(default_factory=dict)


def table_stage(
    name: str,
    record: type[R],
    run: Callable[[Context], Made[R]],
    *,
    needs: Mapping[str, Need | type[Record]],
    settings: tuple[str, ...],
    **more: Any,
) -> Stage[Table[R]]:
    """A stage of one step that makes a table of `record`. `more` are further fields of `Stage`."""

    def step(ctx: Context) -> Result:
        made = run(ctx)
        parts = {part: ctx.output.write(rows, part) for part, rows in made.parts.items()}
        return Result(ctx.output.write(made.records), made.metrics, parts)

    return Stage(
        name=name,
        module=run.__module__,
        needs=needs,
        output=lambda path, identity: Table(path, identity, record),
        settings=settings,
        steps=(Step("run", step),),
        **more,
    )


def settings_of(section: str) -> tuple[str, ...]:
    """All settings of `section` without its engine, which belongs to a stage's roles, and without names of inputs."""
    found = [f for f in fields(getattr(Config(), section)) if f.name != "engine" and f.metadata != AN_INPUT]
    return tuple(f"{section}.{f.name}" for f in found)
