"""A family of models as a user would add it: a Llama whose config and tensors have other names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from nemo_srl.models.families import llama
from nemo_srl.models.spec import ModelSpec


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    return llama.read_spec({**config, "num_hidden_layers": config.get("depth")})


def renamed(llamas: str) -> str:
    return llamas.replace("model.layers.", "trunk.").replace("self_attn.q_proj", "attention.wq")


FAMILY = dataclasses.replace(
    llama.FAMILY,
    **{
        field.name: renamed(getattr(llama.FAMILY, field.name))
        for field in dataclasses.fields(llama.FAMILY)
        if field.type == "str" and field.name != "supported"
    },
    model_types=("trunk",),
    architectures=("TrunkForCausalLM",),
    supported="TrunkForCausalLM",
    read_spec=read_spec,
    nemo_settings={"layernorm_zero_centered_gamma": True, "activation": "fast-geglu"},
)
