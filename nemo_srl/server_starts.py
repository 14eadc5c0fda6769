"""In which order the loop asks its models, and so how often their servers start.

`recipes/iterate.py` asks in this order. Stages in a row that ask one model share one start of its servers. A training
ends them, and so does a stage that asks another model. A test compares this with what a run really starts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nemo_srl.config import Config
from nemo_srl.engines import EngineSize, engine_backend
from nemo_srl.stages import stage_named


@dataclass(frozen=True)
class Asked:
    """A stage asks a model. `small` as in `Experiment.run`."""

    stage: str
    model: str
    small: bool = False


@dataclass(frozen=True)
class Served:
    """A stage on servers: how many GPUs they have, and whether they start for it."""

    stage: str
    num_gpus: int
    starts: bool


def order(cfg: Config) -> Iterator[Asked | None]:
    """All questions to models, in the order of a run. None stands for a training."""
    last = cfg.num_iterations
    writes, has_generator = not cfg.prompts.path, bool(cfg.prompts.model)
    yield None
    if writes and has_generator:
        yield from (Asked("prompts", "prompts.model", small=True) for _ in range(last))
    yield Asked("evaluation", "M0", small=True)
    yield Asked("evaluation", "M1", small=not last)
    for t in range(1, last + 1):
        if writes and not has_generator:
            yield Asked("prompts", f"M{t}")
        yield Asked("candidates", f"M{t}")
        yield Asked("judgements", f"M{t}")
        if cfg.anchor.num_prompts:
            yield Asked("anchor", "anchor.model" if cfg.anchor.model else "M1", small=True)
        yield None
        if cfg.data.rankings_path:
            yield Asked("eft", f"M{t + 1} before its refresh")
            yield Asked("candidates", f"M{t + 1} before its refresh")
            yield None
        yield Asked("evaluation", f"M{t + 1}", small=t == last)


def served(cfg: Config) -> list[Served]:
    """Every question to a model that has servers, in the order of a run."""
    found: list[Served] = []
    running: tuple[str, int] | None = None
    for asked in order(cfg):
        size = None if asked is None else server_size(cfg, asked.stage)
        if asked is None or size is None:
            running = None
            continue
        needed = size.num_gpus_small if asked.small else size.num_gpus
        starts = running is None or running[0] != asked.model or running[1] < needed
        running = (asked.model, needed) if running is None or starts else running
        found.append(Served(asked.stage, running[1], starts))
    return found


def server_size(cfg: Config, stage: str) -> EngineSize | None:
    """The size of the servers that a stage needs. None if it needs none: its engine is hosted or in its own process."""
    for role in stage_named(stage).engines:
        engine = cfg.engine_for(role)
        backend = engine_backend(engine)
        size = backend.size(engine)
        if size.cache_fraction and size.num_replicas and not size.in_process:
            return size
    return None
