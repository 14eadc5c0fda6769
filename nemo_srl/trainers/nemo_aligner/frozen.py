"""Training of the upper layers alone: `trainer.frozen_share`.

The embedding and the first layers keep their weights. They have no gradients and no moments of Adam, and the backward
pass ends above them. So a checkpoint of the optimizer has no part for them. megatron-core saves the same parameter of
all layers as one tensor, and refuses one that has a gap. Here such a tensor begins with the first trained layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_inplace
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

_LAYERS = "decoder.layers."


def freeze(model: Any, number: int) -> None:
    """Keep the weights of the embedding and of the first `number` layers. A tied output layer is the embedding."""
    for module in model.get_model_module_list():
        module.embedding.requires_grad_(False)
        for layer in module.decoder.layers[:number]:
            layer.requires_grad_(False)


def save_moments_of_trained_layers(strategy: Any, number: int) -> None:
    """Let NeMo's `strategy` save and load the optimizer's state without the first `number` layers."""
    inner: Callable[..., dict[str, Any]] = strategy.optimizer_sharded_state_dict

    def optimizer_sharded_state_dict(*args: Any, **kwargs: Any) -> dict[str, Any]:
        state = inner(*args, **kwargs)
        dict_list_map_inplace(lambda part: _of_trained_layers(part, number), state)
        return state

    strategy.optimizer_sharded_state_dict = optimizer_sharded_state_dict


def _of_trained_layers(part: Any, number: int) -> Any:
    """`part` of the state, with layer `number` as the first one of the tensor that is saved."""
    if isinstance(part, ShardedTensorFactory):  # makes its tensors later
        return replace(part, build_fn=_then(part.build_fn, number))
    if not isinstance(part, ShardedTensor) or _LAYERS not in part.key:
        return part
    (layers, *shape), (layer, *offset) = part.global_shape, part.global_offset
    pieces = part.axis_fragmentations
    return replace(
        part,
        global_shape=(layers - number, *shape),
        global_offset=(layer - number, *offset),
        axis_fragmentations=None if pieces is None else (pieces[0] - number, *pieces[1:]),
    )


def _then(build: Callable[..., Any], number: int) -> Callable[..., Any]:
    def build_of_trained_layers(*args: Any) -> Any:
        built = build(*args)
        return dict_list_map_inplace(lambda part: _of_trained_layers(part, number), built)

    return build_of_trained_layers
