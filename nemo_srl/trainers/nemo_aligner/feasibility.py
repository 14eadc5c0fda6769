"""Settings that cannot work are refused before anything runs: key, value, reason and remedy in one `ConfigError`.

NeMo-Aligner would notice them after minutes of start-up (by a rank's assertion), in the middle of the training, or by
a ZeroDivisionError. Needs neither NeMo nor torch.
"""

from __future__ import annotations

import math

from nemo_srl.config.check import check as require
from nemo_srl.config.training import DPOConfig, OptimConfig
from nemo_srl.errors import ConfigError
from nemo_srl.models.spec import ModelSpec
from nemo_srl.trainers.nemo_aligner import losses
from nemo_srl.trainers.nemo_aligner.data import DataStatistics
from nemo_srl.trainers.nemo_aligner.settings import NemoAlignerSettings


def check(optim: OptimConfig, trainer: NemoAlignerSettings, *, spec: ModelSpec, train: DataStatistics) -> None:
    """Raise `ConfigError` for the first setting that does not fit the others, the model or the data."""
    _check_parallelism(trainer, spec)
    _check_lora(trainer)
    _check_frozen(trainer, spec)
    _check_batches(optim, trainer, spec, train)
    context = spec.max_position_embeddings
    reason = f"is above the model's context of {context} tokens. Set it to at most {context}."
    require(optim.max_seq_length <= context, f"{optim.section}.max_seq_length", optim.max_seq_length, reason)
    if isinstance(optim, DPOConfig):
        losses.check(optim)


def _divisors(number: int, limit: int) -> str:
    return ", ".join(str(d) for d in range(1, min(number, limit) + 1) if number % d == 0)


def _check_parallelism(trainer: NemoAlignerSettings, spec: ModelSpec) -> None:
    tp, pp = trainer.tensor_model_parallel_size, trainer.pipeline_model_parallel_size
    usable = _divisors(math.gcd(spec.num_attention_heads, spec.num_query_groups, spec.ffn_hidden_size), 64)
    for name, number in (
        ("attention heads", spec.num_attention_heads),
        ("query groups (key-value heads)", spec.num_query_groups),
        ("feed-forward units", spec.ffn_hidden_size),
    ):
        reason = f"does not divide the model's {number} {name}. Usable with this model: {usable}."
        require(number % tp == 0, "trainer.tensor_model_parallel_size", tp, reason)
    usable = _divisors(spec.num_layers, 128)
    reason = f"does not divide the model's {spec.num_layers} layers. Usable with this model: {usable}."
    require(spec.num_layers % pp == 0, "trainer.pipeline_model_parallel_size", pp, reason)
    reason = (
        "splits the sequence over the ranks of tensor parallelism, and there is only one. Set "
        "trainer.sequence_parallel=false, or trainer.tensor_model_parallel_size above 1."
    )
    require(not trainer.sequence_parallel or tp > 1, "trainer.sequence_parallel", True, reason)


def _check_lora(trainer: NemoAlignerSettings) -> None:
    rank, tp = trainer.lora_rank, trainer.tensor_model_parallel_size
    reason = (
        f"is not a multiple of trainer.tensor_model_parallel_size={tp}, which divides the adapters. Use a multiple."
    )
    require(rank % tp == 0, "trainer.lora_rank", rank, reason)
    reason = (
        f"does not work with trainer.lora_rank={rank}: NeMo's adapters then need Transformer Engine's layers, and this "
        "was not tested. Set trainer.sequence_parallel=false."
    )
    require(not (rank and trainer.sequence_parallel), "trainer.sequence_parallel", True, reason)


def _check_frozen(trainer: NemoAlignerSettings, spec: ModelSpec) -> None:
    key, share, layers = "trainer.frozen_share", trainer.frozen_share, spec.num_layers
    for other, refused, remedy in (
        ("lora_rank", trainer.lora_rank > 0, 0),
        ("pipeline_model_parallel_size", trainer.pipeline_model_parallel_size > 1, 1),
        ("recompute_granularity", trainer.recompute_granularity == "full", "none"),
    ):
        reason = (
            f"does not work with trainer.{other}={getattr(trainer, other)}. Set {key}=0 or trainer.{other}={remedy}."
        )
        require(not (share and refused), key, share, reason)
    reason = (
        f"is less than one of the model's {layers} layers, so nothing would be frozen. Set {key}=0, or at least "
        f"{math.ceil(1000 / layers) / 1000}."
    )
    require(not share or trainer.num_frozen_layers(layers) > 0, key, share, reason)


def _check_batches(optim: OptimConfig, trainer: NemoAlignerSettings, spec: ModelSpec, train: DataStatistics) -> None:
    key, size = f"{optim.section}.global_batch_size", optim.global_batch_size
    micro, ranks = trainer.rows_at_a_time(optim), trainer.data_parallel_size
    reason = (
        f"is not a multiple of micro_batch_size x data-parallel ranks = {micro} x {ranks}. Use a multiple of "
        f"{micro * ranks}, a smaller trainer.micro_batch_size or fewer trainer.devices."
    )
    require(size % (micro * ranks) == 0, key, size, reason)
    if not train.num_rows:
        _refuse_no_rows(optim, train, context=spec.max_position_embeddings)
    dropped = f" ({train.num_rows_too_long} more were longer than {optim.section}.max_seq_length)"
    reason = (
        f"there are only {train.num_rows} training rows{dropped if train.num_rows_too_long else ''}, not enough for "
        f"one step. {_GIVE_MORE[optim.section]}, or {_smaller_batch(key, train.num_rows, micro, ranks)}."
    )
    require(train.num_rows >= size, key, size, reason)


_GIVE_MORE = {
    "sft": "Give more rows (data.ift_path, data.eft_path)",
    "dpo": "Raise prompts.num_prompts, which may give more pairs",
    "refresh": "Give more rankings (data.rankings_path)",
}


def _smaller_batch(key: str, num_rows: int, micro: int, ranks: int) -> str:
    """The largest batch size that these rows fill, or the settings that stand in its way."""
    if num_rows >= micro * ranks:
        return f"set {key} to at most {num_rows // (micro * ranks) * (micro * ranks)}"
    ranks = min(ranks, num_rows)
    fewer = f"{key}={ranks} and trainer.micro_batch_size=1"
    return f"set {fewer}, on {ranks} data-parallel rank(s) (trainer.devices, trainer.num_nodes)"


def _refuse_no_rows(optim: OptimConfig, train: DataStatistics, *, context: int) -> None:
    key, longest, shortest = f"{optim.section}.max_seq_length", optim.max_seq_length, train.shortest_too_long
    if not train.num_rows_too_long:
        raise ConfigError(f"{optim.section}: there are no training rows. {_GIVE_MORE[optim.section]}.")
    remedy = f"Set it to {shortest} or more" if shortest <= context else f"The model's context is {context} tokens"
    raise ConfigError(
        f"{key}={longest}: all {train.num_rows_too_long} training rows are longer, and the shortest has {shortest} "
        f"tokens. {remedy}, or give shorter rows."
    )
