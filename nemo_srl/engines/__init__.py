"""Generation engines. Each folder here that exports `BACKEND` is one; `engine.name` chooses.

A backend is imported only when it is asked for. What it needs is imported only when it is opened. So an engine does not
need the packages of another one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_srl import registry
from nemo_srl.protocols import GenerationEngine, Service


@dataclass(frozen=True, kw_only=True)
class EngineSize:
    """The GPUs that an engine needs, in words that hold for every engine. Without GPUs of its own: `num_replicas` 0."""

    num_replicas: int = 0
    """Copies of the model."""
    num_replicas_small: int = 0
    """Copies that are enough for small work, if no servers of its model run. 0: all of them."""
    num_nodes: int = 1
    """Nodes that share the replicas evenly."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    in_process: bool = False
    """The stage's own process uses the GPUs, and no server does."""
    cache_fraction: float = 0.0
    """Share of the memory beside the weights that holds keys and values. The engine serves as many as fit there."""
    max_batch_size: int = 0
    """Sequences whose keys and values must all have room at once. 0: the engine has a `cache_fraction`."""

    @property
    def gpus_per_replica(self) -> int:
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def num_gpus(self) -> int:
        """Of all replicas, on all nodes."""
        return self.num_replicas * self.gpus_per_replica

    @property
    def num_gpus_small(self) -> int:
        """Of the replicas for small work."""
        return (self.num_replicas_small or self.num_replicas) * self.gpus_per_replica


@dataclass(frozen=True, kw_only=True)
class EngineBackend:
    """What an engine's folder exports as `BACKEND`."""

    settings: type[Any]
    """A dataclass that has a field `name`."""
    decisive: tuple[str, ...]
    """The settings that decide what is generated, beside `name`. They are part of an artifact's identity."""
    open: Callable[[Any, Path], GenerationEngine]
    """From its settings and a model directory. Raises `ConfigError` or `ModelError`."""
    check: Callable[[Any, Path], None] = lambda settings, model_dir: None
    """Raises `ConfigError`, at set-up, for what cannot work with this model or with models like it."""
    services: Callable[[Any, Path, Path], tuple[Service, ...]] = lambda settings, model_dir, directory: ()
    """The servers that must run on the model while a stage uses the engine. Their files go to the given directory."""
    size: Callable[[Any], EngineSize] = lambda settings: EngineSize()
    has_own_template: Callable[[Any], bool] = lambda settings: False
    """Whether it sends texts to a server that has a chat template of its own."""
    formerly: Mapping[str, str] = field(default_factory=dict)
    """Old beginnings of settings' names and the new ones, so that older run directories are understood."""


def engine_backend(settings: Any) -> EngineBackend:
    """The backend that `settings.name` names. Raises `ConfigError`."""
    found: EngineBackend = registry.load("engines", settings.name)
    return found


def open_engine(settings: Any, model_dir: Path) -> GenerationEngine:
    """An engine with these settings, ready to serve `model_dir`. Raises `ConfigError` or `ModelError`."""
    return engine_backend(settings).open(settings, model_dir)


def services(settings: Any, model_dir: Path, directory: Path) -> tuple[Service, ...]:
    """The servers that a job must run for `open_engine` in its steps. Raises what `EngineBackend.check` does."""
    backend = engine_backend(settings)
    backend.check(settings, model_dir)
    return backend.services(settings, model_dir, directory)
