"""The shape of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a model, by the names of its `config.json` where Megatron has no other.

    `model_type` names its family. `num_query_groups` is Megatron's name for the number of key-value heads. `head_dim`
    need not be hidden_size / num_attention_heads (Megatron: `kv_channels`). `max_position_embeddings` is not above the
    window of a model with sliding-window attention. `torch_dtype` is a name such as "bfloat16". Generation ends at any
    of `eos_token_ids`.
    """

    model_type: str
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    rms_norm_eps: float
    tie_word_embeddings: bool
    torch_dtype: str
    eos_token_ids: tuple[int, ...] = ()
    """Filled in by `hf.read_shape`, since generation_config.json may have more of them than config.json."""

    @property
    def rope_type(self) -> str:
        """The type of `rope_scaling`: default (none), linear, llama3, or another of Hugging Face's."""
        scaling = self.rope_scaling or {}
        return str(scaling.get("rope_type", scaling.get("type", "default")))  # older files say "type"
