"""How a Llama model is laid out in a NeMo (megatron-core) distributed checkpoint, as pure functions.

    Hugging Face, per layer i                  NeMo, stacked over layers: [num_layers, ...]
    self_attn.{q,k,v}_proj    fused to         decoder.layers.self_attention.linear_qkv.weight
    self_attn.o_proj                           decoder.layers.self_attention.linear_proj.weight
    mlp.{gate,up}_proj        fused to         decoder.layers.mlp.linear_fc1.weight
    mlp.down_proj                              decoder.layers.mlp.linear_fc2.weight
    input_layernorm                            decoder.layers.self_attention.linear_qkv.layer_norm_weight
    post_attention_layernorm                   decoder.layers.mlp.linear_fc1.layer_norm_weight

    embed_tokens, norm, lm_head (untied only)  embedding.word_embeddings, decoder.final_layernorm, output_layer

The layer norms have Transformer Engine's names, where the norm is fused into the linear layer behind it
(in megatron-core: `TELayerNormColumnParallelLinear`). `linear_qkv` goes by query group: the queries of
group 0, its key, its value, then group 1, so that tensor parallelism cuts between groups
(`SelfAttention.get_query_key_value_tensors`). `linear_fc1` is [gate; up]. Rotary embeddings need no
permutation: both sides rotate halves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from nemo_srl.models.hf import ModelSpec

Fusion = Literal["none", "qkv", "gate_up"]


@dataclass(frozen=True)
class Parameter:
    """One NeMo tensor (of one layer, if `stacked`) and the Hugging Face tensors it is made of.

    `key` comes without the checkpoint's prefix, `hf_names` with "{layer}" where the layer's number goes;
    `hf_shapes` are theirs, `shape` is the fused one, without the layer axis. A `padded` tensor has its
    first axis filled up with zeros to `shape`.
    """

    key: str
    shape: tuple[int, ...]
    hf_names: tuple[str, ...]
    hf_shapes: tuple[tuple[int, ...], ...]
    fusion: Fusion = "none"
    stacked: bool = True
    padded: bool = False


def padded_vocab_size(vocab_size: int, *, tensor_model_parallel_size: int, divisible_by: int = 128) -> int:
    """The vocabulary of NeMo's embedding: the next multiple of `divisible_by` x tensor parallel size.

    As NeMo computes it from `make_vocab_size_divisible_by`; another number of rows is refused at loading.
    """
    multiple = divisible_by * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def whole_parameters(spec: ModelSpec, padded_vocab: int) -> list[Parameter]:
    """The parameters outside the layers; the output layer only if it is not tied to the embedding."""
    vocab, hidden = (spec.vocab_size, spec.hidden_size), (spec.hidden_size,)

    def rows(key: str, hf_name: str) -> Parameter:
        return Parameter(key, (padded_vocab, *hidden), (hf_name,), (vocab,), stacked=False, padded=True)

    found = [rows("embedding.word_embeddings.weight", "model.embed_tokens.weight")]
    found.append(Parameter("decoder.final_layernorm.weight", hidden, ("model.norm.weight",), (hidden,), stacked=False))
    if not spec.tie_word_embeddings:
        found.append(rows("output_layer.weight", "lm_head.weight"))
    return found


def layer_parameters(spec: ModelSpec) -> list[Parameter]:
    """The parameters of one layer."""
    hidden, ffn = spec.hidden_size, spec.ffn_hidden_size
    query, key_value = spec.num_attention_heads * spec.head_dim, spec.num_query_groups * spec.head_dim

    def layer(
        key: str, shape: tuple[int, ...], hf: Sequence[tuple[str, tuple[int, ...]]], fusion: Fusion = "none"
    ) -> Parameter:
        names = tuple(f"model.layers.{{layer}}.{name}.weight" for name, _ in hf)
        return Parameter(f"decoder.layers.{key}", shape, names, tuple(s for _, s in hf), fusion)

    return [
        layer("self_attention.linear_qkv.layer_norm_weight", (hidden,), [("input_layernorm", (hidden,))]),
        layer(
            "self_attention.linear_qkv.weight",
            (query + 2 * key_value, hidden),
            [
                ("self_attn.q_proj", (query, hidden)),
                ("self_attn.k_proj", (key_value, hidden)),
                ("self_attn.v_proj", (key_value, hidden)),
            ],
            "qkv",
        ),
        layer("self_attention.linear_proj.weight", (hidden, query), [("self_attn.o_proj", (hidden, query))]),
        layer("mlp.linear_fc1.layer_norm_weight", (hidden,), [("post_attention_layernorm", (hidden,))]),
        layer(
            "mlp.linear_fc1.weight",
            (2 * ffn, hidden),
            [("mlp.gate_proj", (ffn, hidden)), ("mlp.up_proj", (ffn, hidden))],
            "gate_up",
        ),
        layer("mlp.linear_fc2.weight", (hidden, ffn), [("mlp.down_proj", (hidden, ffn))]),
    ]


def parts(parameter: Parameter, fused: torch.Tensor, spec: ModelSpec) -> list[torch.Tensor]:
    """Views into `fused` (shape `parameter.shape`) that are the Hugging Face tensors, in their order.

    Reading copies out of the views and writing copies into them, so both directions are this one
    function. Views of a "qkv" are [groups, heads per group, head_dim, hidden] and not contiguous: they
    have the elements of [heads x head_dim, hidden] in the same order.
    """
    if parameter.fusion == "gate_up":
        return list(fused.chunk(2))
    if parameter.fusion == "qkv":
        num_queries = spec.num_attention_heads // spec.num_query_groups
        groups = fused.view(spec.num_query_groups, num_queries + 2, spec.head_dim, spec.hidden_size)
        return list(torch.split(groups, [num_queries, 1, 1], dim=1))
    return [fused[: parameter.hf_shapes[0][0]]]
