"""Settings that cannot work are refused before anything runs: key, value, reason and remedy in one `ConfigError`.

NeMo-Aligner would notice them after minutes of start-up (by a rank's assertion), in the middle of the training, or by
a ZeroDivisionError. Needs neither NeMo nor torch.
"""

from __future__ import annotations

import math

from nemo_srl.config.training import DPOConfig, OptimConfig
from nemo_srl.errors import ConfigError
from nemo_srl.models.spec import ModelSpec
from nemo_srl.trainers.nemo_aligner import losses
from nemo_srl.trainers.nemo_aligner.data import DataStatistics
from nemo_srl.trainers.nemo_aligner.settings import NemoAlignerSettings


def check(optim: OptimConfig, trainer: NemoAlignerSettings, *, spec: ModelSpec, train: DataStatistics) -> None:
    """Raise `ConfigError` for the first setting that does not fit the others, the model or the data."""
    _check_parallelism(trainer, spec)
    _check_batches(optim, trainer, train)
    _check_lengths(optim, spec)
    if isinstance(optim, DPOConfig):
        losses.find(optim.preference_loss)


def _refuse(key: str, value: object, reason: str, remedy: str) -> None:
    raise ConfigError(f"{key}={value}: {reason}. {remedy}")


def _divisors(number: int, limit: int) -> str:
    return ", ".join(str(d) for d in range(1, min(number, limit) + 1) if number % d == 0)


def _check_parallelism(trainer: NemoAlignerSettings, spec: ModelSpec) -> None:
    tp, pp = trainer.tensor_model_parallel_size, trainer.pipeline_model_parallel_size
    for name, number in (
        ("attention heads", spec.num_attention_heads),
        ("query groups (key-value heads)", spec.num_query_groups),
        ("feed-forward units", spec.ffn_hidden_size),
    ):
        if number % tp:
            usable = _divisors(math.gcd(spec.num_attention_heads, spec.num_query_groups, spec.ffn_hidden_size), 64)
            _refuse(
                "trainer.tensor_model_parallel_size",
                tp,
                f"does not divide the model's {number} {name}",
                f"Usable with this model: {usable}.",
            )
    if spec.num_layers % pp:
        _refuse(
            "trainer.pipeline_model_parallel_size",
            pp,
            f"does not divide the model's {spec.num_layers} layers",
            f"Usable with this model: {_divisors(spec.num_layers, 128)}.",
        )
    if trainer.sequence_parallel and tp == 1:
        _refuse(
            "trainer.sequence_parallel",
            True,
            "splits the sequence over the ranks of tensor parallelism, and there is only one",
            "Set trainer.sequence_parallel=false, or trainer.tensor_model_parallel_size above 1.",
        )


def _check_batches(optim: OptimConfig, trainer: NemoAlignerSettings, train: DataStatistics) -> None:
    multiple = trainer.micro_batch_size * trainer.data_parallel_size
    if optim.global_batch_size % multiple:
        _refuse(
            f"{optim.section}.global_batch_size",
            optim.global_batch_size,
            f"is not a multiple of micro_batch_size x data-parallel ranks = "
            f"{trainer.micro_batch_size} x {trainer.data_parallel_size}",
            f"Use a multiple of {multiple}, a smaller trainer.micro_batch_size or fewer trainer.devices.",
        )
    if train.num_rows < optim.global_batch_size:
        dropped = f" ({train.num_rows_too_long} more were longer than {optim.section}.max_seq_length)"
        _refuse(
            f"{optim.section}.global_batch_size",
            optim.global_batch_size,
            f"there are only {train.num_rows} training rows{dropped if train.num_rows_too_long else ''}, not "
            "enough for one step",
            f"Provide more data, or set {optim.section}.global_batch_size to at most {train.num_rows}.",
        )


def _check_lengths(optim: OptimConfig, spec: ModelSpec) -> None:
    if optim.max_seq_length > spec.max_position_embeddings:
        _refuse(
            f"{optim.section}.max_seq_length",
            optim.max_seq_length,
            f"is above the model's context of {spec.max_position_embeddings} tokens",
            f"Set it to at most {spec.max_position_embeddings}.",
        )
