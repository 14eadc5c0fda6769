"""Phi-3 and Phi-4: a Llama whose queries, keys and values are one tensor, and so are gate and up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemo_srl.models.families import llama, within_window
from nemo_srl.models.spec import ModelSpec


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Transformers' `Phi3Config`."""
    config = {"rms_norm_eps": 1e-5, **config}
    return within_window(llama.read_spec(config, FAMILY), config)


_QKV = "model.layers.{layer}.self_attn.qkv_proj.weight"
_GATE_UP = "model.layers.{layer}.mlp.gate_up_proj.weight"

FAMILY = replace(
    llama.FAMILY,
    model_types=("phi3",),
    architectures=("Phi3ForCausalLM",),
    supported="Phi3ForCausalLM (Phi-3, Phi-4) with partial_rotary_factor=1",
    read_spec=read_spec,
    q=_QKV,
    k=_QKV,
    v=_QKV,
    gate=_GATE_UP,
    up=_GATE_UP,
)
