"""Mistral 7B and Mistral Nemo: a Llama, in the first versions with a sliding window of attention."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from nemo_srl.models.families import llama, within_window
from nemo_srl.models.spec import ModelSpec


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """Transformers' `MistralConfig`. Its defaults are those of version 0.1, with a window of 4096 tokens."""
    config = {"num_key_value_heads": 8, "sliding_window": 4096, **config}
    return within_window(llama.read_spec(config, FAMILY), config)


FAMILY = replace(
    llama.FAMILY,
    model_types=("mistral",),
    architectures=("MistralForCausalLM",),
    supported="MistralForCausalLM (Mistral 7B, Mistral Nemo, ...)",
    read_spec=read_spec,
)
