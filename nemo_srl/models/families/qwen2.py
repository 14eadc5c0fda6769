"""Qwen2, Qwen2.5 and what has their architecture: a Llama with biases of the queries, keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemo_srl.models.families import llama, within_window
from nemo_srl.models.spec import ModelSpec


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Transformers' `Qwen2Config`. There, `attention_bias` means nothing, and `sliding_window` may be turned off."""
    spec = llama.read_spec({"num_key_value_heads": 32, **config, "attention_bias": None}, FAMILY)
    return within_window(spec, config) if config.get("use_sliding_window") else spec


_ATTENTION = "model.layers.{layer}.self_attn."

FAMILY = replace(
    llama.FAMILY,
    model_types=("qwen2",),
    architectures=("Qwen2ForCausalLM",),
    supported="Qwen2ForCausalLM (Qwen2, Qwen2.5, ...)",
    read_spec=read_spec,
    q_bias=_ATTENTION + "q_proj.bias",
    k_bias=_ATTENTION + "k_proj.bias",
    v_bias=_ATTENTION + "v_proj.bias",
)
