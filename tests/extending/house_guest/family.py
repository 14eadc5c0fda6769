"""A model family: a Llama whose config.json and tensors use other names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_srl.models.families import Family, llama
from nemo_srl.models.spec import ModelSpec

FIELDS = {"depth": "num_hidden_layers", "width": "hidden_size", "heads": "num_attention_heads"}
"""Our names of config.json, and Llama's."""


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Everything else is called as in a Llama's config.json."""
    return llama.read_spec({FIELDS.get(key, key): value for key, value in config.items()})


_BLOCK = "blocks.{layer}."

FAMILY = Family(
    model_types=("guest_llama",),
    architectures=("GuestForCausalLM",),
    supported="GuestForCausalLM",
    read_spec=read_spec,
    embedding="tokens.weight",
    final_norm="norm.weight",
    output="head.weight",
    input_norm=_BLOCK + "norm_1.weight",
    q=_BLOCK + "q.weight",
    k=_BLOCK + "k.weight",
    v=_BLOCK + "v.weight",
    o=_BLOCK + "o.weight",
    post_attention_norm=_BLOCK + "norm_2.weight",
    gate=_BLOCK + "gate.weight",
    up=_BLOCK + "up.weight",
    down=_BLOCK + "down.weight",
)
