"""The dense models of Qwen3: a Llama with a norm of each query and each key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemo_srl.models.families import llama, within_window
from nemo_srl.models.spec import ModelSpec


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Transformers' `Qwen3Config`, which is in its versions from 4.51 on. `sliding_window` may be turned off there."""
    spec = llama.read_spec({"num_key_value_heads": 32, "head_dim": 128, **config}, FAMILY)
    return within_window(spec, config) if config.get("use_sliding_window") else spec


_ATTENTION = "model.layers.{layer}.self_attn."

FAMILY = replace(
    llama.FAMILY,
    model_types=("qwen3",),
    architectures=("Qwen3ForCausalLM",),
    supported="Qwen3ForCausalLM (dense Qwen3) with attention_bias=false",
    read_spec=read_spec,
    q_norm=_ATTENTION + "q_norm.weight",
    k_norm=_ATTENTION + "k_norm.weight",
)
