"""How a model is laid out in a NeMo (megatron-core) distributed checkpoint, as pure functions.

    Hugging Face, one tensor per layer    NeMo, stacked over layers: [num_layers, ...]
    q, k, v           fused to            decoder.layers.self_attention.linear_qkv.weight
    their biases      fused to            decoder.layers.self_attention.linear_qkv.bias
    q_norm, k_norm                        decoder.layers.self_attention.{q,k}_layernorm.weight
    o                                     decoder.layers.self_attention.linear_proj.weight
    gate, up          fused to            decoder.layers.mlp.linear_fc1.weight
    down                                  decoder.layers.mlp.linear_fc2.weight
    input_norm                            decoder.layers.self_attention.linear_qkv.layer_norm_weight
    post_attention_norm                   decoder.layers.mlp.linear_fc1.layer_norm_weight

    embedding, final_norm                 embedding.word_embeddings, decoder.final_layernorm
    output (untied only)                  output_layer

NeMo's keys also begin with `model.`. The names on the left are the fields of `families.Family`, which has Hugging
Face's. The layer norms have Transformer Engine's names: it fuses a norm into the linear layer behind it
(`TELayerNormColumnParallelLinear` in megatron-core). `linear_qkv` is sorted by query group: the queries of group 0, its
key, its value, then group 1. So tensor parallelism cuts between groups (`SelfAttention.get_query_key_value_tensors`).
A fused tensor of Hugging Face's has all queries, then all keys, then all values. `linear_fc1` is [gate; up] on both
sides. Rotary embeddings need no permutation, since both sides rotate halves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from nemo_srl.models import families
from nemo_srl.models.spec import ModelSpec

EMBEDDING = "model.embedding.word_embeddings.weight"
Fusion = Literal["none", "qkv", "gate_up"]


@dataclass(frozen=True)
class Source:
    """Rows of a Hugging Face tensor, from `first_row` on. All of its rows, unless that tensor is fused as well."""

    name: str
    shape: tuple[int, ...]
    first_row: int = 0


@dataclass(frozen=True)
class Parameter:
    """A NeMo tensor or, within the layers, one layer of it; and the Hugging Face tensors that it is made of.

    `shape` has no axis for the layers. The rows of a `padded` tensor are filled up to it with zeros. `sources` are in
    the order in which they are fused (see `parts`).
    """

    key: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    layer: int | None = None
    """From 0; None outside the layers."""
    fusion: Fusion = "none"
    padded: bool = False

    def tensor_shape(self, spec: ModelSpec) -> tuple[int, ...]:
        """Of the whole NeMo tensor, which is stacked over the layers."""
        return self.shape if self.layer is None else (spec.num_layers, *self.shape)

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """The Hugging Face tensors, each as a whole, by their names."""
        # The last rows of a tensor come last.
        return {source.name: (source.first_row + source.shape[0], *source.shape[1:]) for source in self.sources}

    @property
    def block(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Where it is in the whole NeMo tensor: offsets and shape."""
        origin = (0,) * len(self.shape)
        return (origin, self.shape) if self.layer is None else ((self.layer, *origin), (1, *self.shape))


def padded_vocab_size(vocab_size: int, *, tensor_model_parallel_size: int, divisible_by: int = 128) -> int:
    """The rows of NeMo's embedding: the next multiple of `divisible_by` x tensor parallel size.

    NeMo computes this number from `make_vocab_size_divisible_by` and loads no checkpoint with another one.
    """
    multiple = divisible_by * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def parameters(spec: ModelSpec, padded_vocab: int) -> list[Parameter]:
    """All parameters, in Hugging Face's order. The output layer is there only if it is not tied to the embedding."""
    family, vocab, hidden, ffn = families.of(spec), spec.vocab_size, spec.hidden_size, spec.ffn_hidden_size
    query, key_value = spec.num_attention_heads * spec.head_dim, spec.num_query_groups * spec.head_dim

    def rows(key: str, hf_name: str) -> Parameter:
        return Parameter(key, (padded_vocab, hidden), (Source(hf_name, (vocab, hidden)),), padded=True)

    def layer(i: int) -> Iterator[Parameter]:
        def made(key: str, *hf: tuple[str, tuple[int, ...]], fusion: Fusion = "none") -> Parameter:
            sources = _rows_of([(name.format(layer=i), shape) for name, shape in hf])
            shape = (sum(num_rows for _, (num_rows, *_) in hf), *hf[0][1][1:])
            return Parameter(f"model.decoder.layers.{key}", shape, sources, i, fusion)

        qkv = ((family.q, query), (family.k, key_value), (family.v, key_value))
        biases = ((family.q_bias, query), (family.k_bias, key_value), (family.v_bias, key_value))
        gate_up = ((family.gate, (ffn, hidden)), (family.up, (ffn, hidden)))
        yield made("self_attention.linear_qkv.layer_norm_weight", (family.input_norm, (hidden,)))
        yield made("self_attention.linear_qkv.weight", *((name, (n, hidden)) for name, n in qkv), fusion="qkv")
        if family.q_bias:
            yield made("self_attention.linear_qkv.bias", *((name, (n,)) for name, n in biases), fusion="qkv")
        if family.q_norm:
            yield made("self_attention.q_layernorm.weight", (family.q_norm, (spec.head_dim,)))
            yield made("self_attention.k_layernorm.weight", (family.k_norm, (spec.head_dim,)))
        yield made("self_attention.linear_proj.weight", (family.o, (hidden, query)))
        yield made("mlp.linear_fc1.layer_norm_weight", (family.post_attention_norm, (hidden,)))
        yield made("mlp.linear_fc1.weight", *gate_up, fusion="gate_up")
        yield made("mlp.linear_fc2.weight", (family.down, (hidden, ffn)))

    found = [rows(EMBEDDING, family.embedding), *(p for i in range(spec.num_layers) for p in layer(i))]
    found.append(Parameter("model.decoder.final_layernorm.weight", (hidden,), (Source(family.final_norm, (hidden,)),)))
    return found if spec.tie_word_embeddings else [*found, rows("model.output_layer.weight", family.output)]


def _rows_of(hf: Sequence[tuple[str, tuple[int, ...]]]) -> tuple[Source, ...]:
    """Names and shapes as sources. What has the same name is one tensor, whose rows follow each other."""
    sources: list[Source] = []
    for name, shape in hf:
        first_row = sum(source.shape[0] for source in sources if source.name == name)
        sources.append(Source(name, shape, first_row))
    return tuple(sources)


def parts(parameter: Parameter, fused: torch.Tensor, spec: ModelSpec) -> Iterator[tuple[Source, torch.Tensor]]:
    """Rows of Hugging Face tensors, and views into `fused` (shape `parameter.shape`) that are these rows.

    One conversion copies out of the views, the other copies into them. So this one function is both directions. The
    views of a "qkv" are [groups, heads per group, head_dim, hidden] and not contiguous. They have the elements of
    [heads x head_dim, hidden] in the same order. Biases have no hidden dimension.
    """
    views: Sequence[torch.Tensor] = (fused,)
    if parameter.fusion == "gate_up":
        views = fused.chunk(2)
    if parameter.fusion == "qkv":
        num_queries = spec.num_attention_heads // spec.num_query_groups
        groups = fused.view(spec.num_query_groups, num_queries + 2, spec.head_dim, *fused.shape[1:])
        views = torch.split(groups, [num_queries, 1, 1], dim=1)
    return zip(parameter.sources, views, strict=True)
