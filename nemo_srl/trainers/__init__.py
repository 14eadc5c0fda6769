"""Trainers, found by `trainer.name`: `nemo_aligner`, or the dotted path of a user's own module.

Each exports one `BACKEND`. Importing it imports neither torch nor NeMo, and neither does opening a trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_srl import registry
from nemo_srl.config.training import OptimConfig, TrainerSettings
from nemo_srl.models.spec import ModelSpec
from nemo_srl.protocols import Trainer

WORK_DIR = "training"
"""Where in a stage's directory its trainer keeps its files."""


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes on the fullest GPU of a training."""

    weights_and_gradients: float
    optimizer: float
    activations: float
    logits: float
    recomputed: float = 0.0
    """What one layer needs while it is computed again and its gradients are computed. Then the logits are gone."""
    step: float = 0.0
    """What the optimizer's step needs beside the optimizer. Then activations and logits are gone."""
    overhead: float
    """What the training's tensors do not account for: CUDA's context, communication buffers, fragmentation."""
    host: float = 0.0
    """Bytes of the host's memory for what the training keeps there to save the GPU's."""

    @property
    def total(self) -> float:
        """The highest use of the GPU's memory."""
        passing = max(self.activations + max(self.logits, self.recomputed), self.step)
        return self.weights_and_gradients + self.optimizer + passing + self.overhead


@dataclass(frozen=True, kw_only=True)
class TrainerBackend:
    """Everything that the rest of the package asks of a trainer. `Any` stands for the trainer's own settings."""

    settings: type
    """A dataclass whose instances are `TrainerSettings`; its first field is `name`, the trainer's own name."""
    decisive: tuple[str, ...]
    """The settings that change what is trained, and so are part of an artifact's identity."""
    formerly: Mapping[str, str] = field(default_factory=dict)
    """Old beginnings of settings' names and the new ones, so that older run directories are understood."""
    version: int = 1
    """Raise it when the same task gives another model than before. Models of older versions are then refused."""
    open: Callable[[Any], Trainer]
    check: Callable[[Any, Sequence[OptimConfig], ModelSpec], None]
    """Raises `ConfigError` for settings with which one of these trainings of this model could not start.

    What depends on the data (number of rows, their lengths) is checked by `Trainer.prepare`.
    """
    memory: Callable[[OptimConfig, Any, ModelSpec], TrainingMemory]
    checkpoint_bytes: Callable[[Any, ModelSpec], float]
    """The size of one checkpoint, from which an interrupted training goes on."""
    step_passes: Callable[[Any, ModelSpec], float] = lambda settings, spec: 3.0
    """What a training step costs, in forward passes of the same rows."""
    fixed_length: Callable[[OptimConfig, Any], int | None] = lambda optim, settings: None
    """The tokens that it computes for every sequence, padding included. None: about as many as the sequence has."""
    whole_batches: bool = False
    """Whether a step needs a whole global batch, so that fewer rows are too few. Then preflight counts them."""
    keeps_checkpoints: bool = False
    """Whether it can do what `TrainingTask.keep_checkpoints` asks for, which early stopping needs."""
    uses_confidence: Callable[[Any], bool] = lambda optim: True
    """Whether DPO with these settings (`DPOConfig`) uses the confidence in a pair."""
    describe: Callable[[Any], str] = lambda settings: settings.name
    """What trainings with these settings run on here: devices and versions. Raises `ConfigError` if they cannot."""


def trainer_backend(settings: TrainerSettings) -> TrainerBackend:
    """The backend that `settings.name` names. Raises `ConfigError`."""
    found: TrainerBackend = registry.load("trainers", settings.name)
    return found


def open_trainer(settings: TrainerSettings) -> Trainer:
    """The trainer that `settings.name` names. Raises `ConfigError`."""
    return trainer_backend(settings).open(settings)


def read_metrics(name: str, work_dir: Path) -> list[dict[str, Any]]:
    """What the trainer of this name recorded in `work_dir`: a row for each step. Raises `ConfigError`."""
    backend: TrainerBackend = registry.load("trainers", name)
    return backend.open(backend.settings()).metrics(work_dir)
