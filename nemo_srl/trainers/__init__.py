"""Trainers, chosen by `trainer.name`. Today there is one: `nemo_aligner`, NVIDIA's NeMo-Aligner as a library.

Importing this package imports neither torch nor NeMo; opening a trainer does not either. Raises
`ConfigError` for a name that is not known.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_srl.config import Config
from nemo_srl.errors import ConfigError
from nemo_srl.models.hf import ModelSpec
from nemo_srl.protocols import Trainer


def open_trainer(cfg: Config) -> Trainer:
    """The trainer that `cfg.trainer.name` asks for. Raises `ConfigError`."""
    if cfg.trainer.name == "nemo_aligner":
        from nemo_srl.trainers.nemo_aligner import NemoAlignerTrainer

        return NemoAlignerTrainer(cfg)
    raise ConfigError(
        f"trainer.name={cfg.trainer.name!r}: there is no such trainer. Use trainer.name=nemo_aligner, "
        "the only one so far."
    )


def read_metrics(name: str, work_dir: Path) -> list[dict[str, Any]]:
    """What the trainer of this name recorded in `work_dir`, a row for each step; empty before the first step."""
    if name != "nemo_aligner":
        raise ConfigError(f"trainer.name={name!r}: there is no such trainer. Use nemo_aligner, the only one so far.")
    from nemo_srl.trainers.nemo_aligner import metrics

    path = work_dir / metrics.METRICS_FILE
    return metrics.read_metrics(path) if path.exists() else []


def check_plan(cfg: Config, model_dir: Path) -> None:
    """Raise `ConfigError` for settings with which SFT or DPO of this model could not start.

    What depends on the data (rows against batch size, lengths) is checked when a training is prepared.
    """
    from nemo_srl.models.hf import read_spec

    check_shape(cfg, read_spec(model_dir))


def check_shape(cfg: Config, spec: ModelSpec) -> None:
    """As `check_plan`, for a model that need not be there yet."""
    open_trainer(cfg)
    from nemo_srl.trainers.nemo_aligner.data import DataStatistics
    from nemo_srl.trainers.nemo_aligner.training_plan import make_plan

    for optim in (cfg.sft, cfg.dpo):
        enough = DataStatistics(
            num_rows=optim.global_batch_size, num_rows_too_long=0, num_boundary_merges=0, num_tokens=0, max_length=0
        )
        make_plan(optim, cfg.trainer, seed=cfg.seed, spec=spec, train=enough, validation=enough)
