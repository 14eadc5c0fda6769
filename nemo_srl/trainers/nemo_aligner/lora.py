"""LoRA by NeMo's adapters: their first values, and checkpoints that hold them and nothing of the frozen model.

NeMo 2.2.1 adds the adapters to the layers and freezes all else. `install` changes five things:

1. *First values.* A is uniform in +-1/sqrt(input size), as in Microsoft's code and in PEFT, and B is zero (Hu et al.
   2021, section 4.1). NeMo draws other numbers for another number of tensor-parallel ranks.
2. *Checkpoints.* NeMo saves adapters in its old format, without the moments of the distributed optimizer. A training
   that went on from such a checkpoint would begin with moments of zero. Here they are distributed checkpoints.
3. *Tied embeddings in a pipeline.* megatron-core adds up their gradients. A frozen embedding has none.
4. *Norms of queries and keys.* NeMo's attention with adapters leaves them out, without an error.
5. *Recomputed layers.* PyTorch gives a layer no gradient if its input has none, as behind a frozen embedding.

Not covered: sequence parallelism, which `feasibility.py` refuses.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import megatron.core.distributed
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

from nemo_srl.models.lora import ADAPTERS

_IN_LAYERS = tuple(key.removeprefix("model.decoder.layers.") for key in ADAPTERS.values())
"""The places of the adapters in a layer."""


def install(model: Any, *, seed: int) -> None:
    """Prepare `model`, NeMo-Aligner's for SFT or DPO, when NeMo has added its adapters."""
    for _, layer in _layers(model):
        for number, name in enumerate(_IN_LAYERS):
            adapter = layer.get_submodule(name)
            _initialize(adapter, seed=seed + len(_IN_LAYERS) * layer.layer_number + number)
        _normalize_queries_and_keys(layer.self_attention)
    if model.cfg.activations_checkpoint_granularity == "full":
        for module in model.get_model_module_list():
            if module.pre_process:
                module.embedding.register_forward_hook(lambda module, inputs, output: output.requires_grad_())
    model.sharded_state_dict = lambda prefix="": _sharded_state_dict(model, prefix)
    # The package gives its function by the name of this module.
    gradients: Any = sys.modules[f"{megatron.core.distributed.__name__}.finalize_model_grads"]
    gradients._allreduce_word_embedding_grads = lambda model, config: None


def _layers(model: Any) -> Iterator[tuple[str, Any]]:
    """The layers of this rank, each after its name in the model."""
    for module in model.get_model_module_list():
        for number, layer in enumerate(module.decoder.layers):
            yield f"model.decoder.layers.{number}.", layer


@torch.no_grad()
def _initialize(adapter: Any, *, seed: int) -> None:
    """The same numbers for every parallel layout and on every device."""
    weight, whole = adapter.linear_in.weight, list(adapter.linear_in.weight.shape)
    num_ranks = parallel_state.get_tensor_model_parallel_world_size()
    whole[weight.partition_dim] *= num_ranks
    bound = whole[1] ** -0.5
    drawn = torch.empty(whole, device="cpu").uniform_(-bound, bound, generator=torch.Generator().manual_seed(seed))
    weight.copy_(drawn.chunk(num_ranks, weight.partition_dim)[parallel_state.get_tensor_model_parallel_rank()])
    adapter.linear_out.weight.zero_()


def _normalize_queries_and_keys(attention: Any) -> None:
    """As `SelfAttention.get_query_key_value_tensors` of megatron-core does. A model without norms has identities."""
    inner, norms = attention.get_query_key_value_tensors, (attention.q_layernorm, attention.k_layernorm)
    if None not in norms:

        def get_query_key_value_tensors(*args: Any, **kwargs: Any) -> Any:
            query, key, value = inner(*args, **kwargs)
            return norms[0](query), norms[1](key), value

        attention.get_query_key_value_tensors = get_query_key_value_tensors


def _sharded_state_dict(model: Any, prefix: str) -> dict[str, Any]:
    """As `MegatronGPTModel.sharded_state_dict`, of the adapters alone. Layers are stacked, as everywhere."""
    found: dict[str, Any] = {}
    for layer_name, layer in _layers(model):
        offsets = ((0, layer.layer_number - 1, model.cfg.num_layers),)
        of_layer: dict[str, Any] = {}
        for name in _IN_LAYERS:
            tensors = layer.get_submodule(name).sharded_state_dict(f"{prefix}{layer_name}{name}.", offsets)
            of_layer |= {key: value for key, value in tensors.items() if key.endswith("weight")}
        # A tensor-parallel rank has a part of gate and a part of up. In a checkpoint, all of gate comes first.
        for key in (key for key in of_layer if key.endswith("lora_hto4h_adapter.linear_out.weight")):
            of_layer[key] = apply_swiglu_sharded_factory(of_layer[key], offsets)
        replace_prefix_for_sharding(of_layer, f"{prefix}{layer_name}", f"{prefix}model.decoder.layers.")
        found |= of_layer
    return found
