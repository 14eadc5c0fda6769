"""LoRA adapters in a NeMo checkpoint, and the weights with them: W + (alpha / rank) B A (Hu et al. 2021, section 4.1).

NeMo has one adapter for each linear layer of its own. So queries, keys and values share an A, and so do gate and up.
Their B has its rows in the order of the fused weight, so the product is added to it as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from nemo_srl.errors import ModelError
from nemo_srl.models.distributed_checkpoint import CheckpointReader

_ATTENTION, _MLP = "model.decoder.layers.self_attention.", "model.decoder.layers.mlp."
ADAPTERS = {
    f"{_ATTENTION}linear_qkv.weight": f"{_ATTENTION}adapter_layer.lora_kqv_adapter",
    f"{_ATTENTION}linear_proj.weight": f"{_ATTENTION}adapter_layer.lora_dense_attention_adapter",
    f"{_MLP}linear_fc1.weight": f"{_MLP}adapter_layer.lora_hto4h_adapter",
    f"{_MLP}linear_fc2.weight": f"{_MLP}adapter_layer.lora_4htoh_adapter",
}
"""The weights that have an adapter, by their keys in a checkpoint (`nemo_layout.py`), and the adapters' keys."""


class Adapters:
    """The adapters of a checkpoint, one for each layer and each weight of `ADAPTERS`."""

    def __init__(self, directory: Path, *, alpha: float) -> None:
        self._reader, self._alpha = CheckpointReader(directory), alpha

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `ModelError` unless there are adapters for weights of these shapes, [layers, rows, columns]."""
        for key, name in ADAPTERS.items():
            layers, rows, columns = shapes[key]
            a, b = (self._reader.shape(f"{name}.linear_{side}.weight") for side in ("in", "out"))
            if (a[0], a[-1], *b) != (layers, columns, layers, rows, a[1]):
                raise ModelError(
                    f"{name}: its matrices have the shapes {list(a)} and {list(b)}, which do not fit a weight of shape "
                    f"{list(shapes[key])}. The weights must be those that the training started from."
                )

    def merged(self, key: str, layer: int, weight: torch.Tensor) -> torch.Tensor:
        """`weight` [rows, columns] of one layer with its adapter, computed in float32, in the type of `weight`."""
        a, b = (self._matrix(f"{ADAPTERS[key]}.linear_{side}.weight", layer) for side in ("in", "out"))
        return (weight.float() + (self._alpha / len(a)) * (b @ a)).to(weight.dtype)

    def _matrix(self, key: str, layer: int) -> torch.Tensor:
        _, rows, columns = self._reader.shape(key)
        return self._reader.read(key, (layer, 0, 0), (1, rows, columns))[0].float()
