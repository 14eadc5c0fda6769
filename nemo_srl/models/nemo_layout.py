"""How a model is laid out in a NeMo (megatron-core) distributed checkpoint, as pure functions.

    Hugging Face, one tensor per layer    NeMo, stacked over layers: [num_layers, ...]
    q, k, v           fused to            decoder.layers.self_attention.linear_qkv.weight
    o                                     decoder.layers.self_attention.linear_proj.weight
    gate, up          fused to            decoder.layers.mlp.linear_fc1.weight
    down                                  decoder.layers.mlp.linear_fc2.weight
    input_norm                            decoder.layers.self_attention.linear_qkv.layer_norm_weight
    post_attention_norm                   decoder.layers.mlp.linear_fc1.layer_norm_weight

    embedding, final_norm                 embedding.word_embeddings, decoder.final_layernorm
    output (untied only)                  output_layer

The names on the left are the fields of `families.Family`, which has Hugging Face's. The layer norms have Transformer
Engine's names: it fuses a norm into the linear layer behind it (`TELayerNormColumnParallelLinear` in megatron-core).
`linear_qkv` is sorted by query group: the queries of group 0, its key, its value, then group 1. So tensor parallelism
cuts between groups (`SelfAttention.get_query_key_value_tensors`). `linear_fc1` is [gate; up]. Rotary embeddings need
no permutation, since both sides rotate halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from nemo_srl.models import families
from nemo_srl.models.spec import ModelSpec

Fusion = Literal["none", "qkv", "gate_up"]


@dataclass(frozen=True)
class Parameter:
    """One NeMo tensor (of one layer, if `stacked`) and the Hugging Face tensors that it is made of.

    `key` has no prefix of the checkpoint. `hf_names` have "{layer}" in the place of the layer's number, and `hf_shapes`
    are their shapes. `shape` is the fused shape, without the layer axis. The first axis of a `padded` tensor is filled
    up to `shape` with zeros.
    """

    key: str
    shape: tuple[int, ...]
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    fusion: Fusion = "none"
    stacked: bool = True
    padded: bool = False


def padded_vocab_size(vocab_size: int, *, tensor_model_parallel_size: int, divisible_by: int = 128) -> int:
    """The rows of NeMo's embedding: the next multiple of `divisible_by` x tensor parallel size.

    NeMo computes this number from `make_vocab_size_divisible_by` and loads no checkpoint with another one.
    """
    multiple = divisible_by * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def whole_parameters(spec: ModelSpec, padded_vocab: int) -> list[Parameter]:
    """The parameters outside the layers; the output layer only if it is not tied to the embedding."""
    family, vocab, hidden = families.of(spec), (spec.vocab_size, spec.hidden_size), (spec.hidden_size,)

    def rows(key: str, hf_name: str) -> Parameter:
        return Parameter(key, (padded_vocab, *hidden), (hf_name,), (vocab,), stacked=False, padded=True)

    found = [rows("embedding.word_embeddings.weight", family.embedding)]
    found.append(Parameter("decoder.final_layernorm.weight", hidden, (family.final_norm,), (hidden,), stacked=False))
    if not spec.tie_word_embeddings:
        found.append(rows("output_layer.weight", family.output))
    return found


def layer_parameters(spec: ModelSpec) -> list[Parameter]:
    """The parameters of one layer."""
    family, hidden, ffn = families.of(spec), spec.hidden_size, spec.ffn_hidden_size
    query, key_value = spec.num_attention_heads * spec.head_dim, spec.num_query_groups * spec.head_dim

    def layer(
        key: str, shape: tuple[int, ...], hf: Sequence[tuple[str, tuple[int, ...]]], fusion: Fusion = "none"
    ) -> Parameter:
        return Parameter(f"decoder.layers.{key}", shape, tuple(n for n, _ in hf), tuple(s for _, s in hf), fusion)

    return [
        layer("self_attention.linear_qkv.layer_norm_weight", (hidden,), [(family.input_norm, (hidden,))]),
        layer(
            "self_attention.linear_qkv.weight",
            (query + 2 * key_value, hidden),
            [(family.q, (query, hidden)), (family.k, (key_value, hidden)), (family.v, (key_value, hidden))],
            "qkv",
        ),
        layer("self_attention.linear_proj.weight", (hidden, query), [(family.o, (hidden, query))]),
        layer("mlp.linear_fc1.layer_norm_weight", (hidden,), [(family.post_attention_norm, (hidden,))]),
        layer(
            "mlp.linear_fc1.weight",
            (2 * ffn, hidden),
            [(family.gate, (ffn, hidden)), (family.up, (ffn, hidden))],
            "gate_up",
        ),
        layer("mlp.linear_fc2.weight", (hidden, ffn), [(family.down, (hidden, ffn))]),
    ]


def parts(parameter: Parameter, fused: torch.Tensor, spec: ModelSpec) -> list[torch.Tensor]:
    """Views into `fused` (shape `parameter.shape`) that are the Hugging Face tensors, in their order.

    One conversion copies out of the views, the other copies into them. So this one function is both directions. The
    views of a "qkv" are [groups, heads per group, head_dim, hidden] and not contiguous. They have the elements of
    [heads x head_dim, hidden] in the same order.
    """
    if parameter.fusion == "gate_up":
        return list(fused.chunk(2))
    if parameter.fusion == "qkv":
        num_queries = spec.num_attention_heads // spec.num_query_groups
        groups = fused.view(spec.num_query_groups, num_queries + 2, spec.head_dim, spec.hidden_size)
        return list(torch.split(groups, [num_queries, 1, 1], dim=1))
    return [fused[: parameter.hf_shapes[0][0]]]
