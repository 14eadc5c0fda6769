"""Communication beside the computation: what has to be done at other moments than in NeMo-Aligner's loop.

With `trainer.overlap_param_gather`, a rank fetches the weights that other data-parallel ranks have updated in its next
forward pass, which all ranks make together. Two things cannot wait for that: a checkpoint would hold old weights, and
the reference is computed by ranks of which some have no rows.

With `trainer.ub_tp_comm_overlap`, Transformer Engine's linear layers need buffers before the first forward pass, which
is the reference's. This was never run on a GPU here.
"""

from __future__ import annotations

from typing import Any


def fetch_weights(model: Any) -> None:
    """Fetch them now. All ranks call it. Does nothing without `overlap_param_gather`."""
    if model.cfg.optim.overlap_param_sync:
        for chunk in model.model:
            chunk.start_param_sync(force_sync=True)


def allocate_buffers(model: Any, *, num_sequences: int, length: int) -> None:
    """Allocate the buffers of `ub_tp_comm_overlap`, if it is set, for micro-batches of [num_sequences, length].

    All ranks call it. NeMo's `MegatronGPTModel.initialize_ub_func` takes micro_batch_size sequences of
    encoder_seq_length tokens. But a pair is two sequences, and the length is rounded up. NeMo divides by the ranks of
    context parallelism itself.
    """
    if not model.initialize_ub:
        return
    planned = model.cfg.encoder_seq_length
    model.cfg.encoder_seq_length = num_sequences * length // model.cfg.micro_batch_size
    model.initialize_ub_func()  # after this, `initialize_ub` is False
    model.cfg.encoder_seq_length = planned


def fetch_before_saving(callback: Any, model: Any) -> Any:
    """`callback`, NeMo-Aligner's for checkpoints."""
    save = callback.custom_save

    def custom_save(*args: Any, **kwargs: Any) -> Any:
        fetch_weights(model)
        return save(*args, **kwargs)

    callback.custom_save = custom_save
    return callback
