"""Weights that other data-parallel ranks have updated, with `trainer.overlap_param_gather`.

Then a rank fetches them in its next forward pass, which all ranks make together. Two things cannot wait for that: a
checkpoint would hold old weights, and the reference is computed by ranks of which some have no rows.
"""

from __future__ import annotations

from typing import Any


def fetch_weights(model: Any) -> None:
    """Fetch them now. All ranks call it. Does nothing without `overlap_param_gather`."""
    if model.cfg.optim.overlap_param_sync:
        for chunk in model.model:
            chunk.start_param_sync(force_sync=True)


def fetch_before_saving(callback: Any, model: Any) -> Any:
    """`callback`, NeMo-Aligner's for checkpoints."""
    save = callback.custom_save

    def custom_save(*args: Any, **kwargs: Any) -> Any:
        fetch_weights(model)
        return save(*args, **kwargs)

    callback.custom_save = custom_save
    return callback
