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

NeMo's keys also begin with `model.`. The names on the left are the fields of `families.Family`, which has Hugging
Face's. The layer norms have Transformer Engine's names: it fuses a norm into the linear layer behind it
(`TELayerNormColumnParallelLinear` in megatron-core). `linear_qkv` is sorted by query group: the queries of group 0, its
key, its value, then group 1. So tensor parallelism cuts between groups (`SelfAttention.get_query_key_value_tensors`).
`linear_fc1` is [gate; up]. Rotary embeddings need no permutation, since both sides rotate halves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from nemo_srl.models import families
from nemo_srl.models.spec import ModelSpec

EMBEDDING = "model.embedding.word_embeddings.weight"
Fusion = Literal["none", "qkv", "gate_up"]


@dataclass(frozen=True)
class Parameter:
    """A NeMo tensor or, within the layers, one layer of it; and the Hugging Face tensors that it is made of.

    `shape` has no axis for the layers. The rows of a `padded` tensor are filled up to it with zeros. `hf_shapes` are
    Hugging Face's tensors by their names, in the order in which they are fused (see `parts`).
    """

    key: str
    shape: tuple[int, ...]
    hf_shapes: Mapping[str, tuple[int, ...]]
    layer: int | None = None
    """From 0; None outside the layers."""
    fusion: Fusion = "none"
    padded: bool = False

    def tensor_shape(self, spec: ModelSpec) -> tuple[int, ...]:
        """Of the whole NeMo tensor, which is stacked over the layers."""
        return self.shape if self.layer is None else (spec.num_layers, *self.shape)

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
        return Parameter(key, (padded_vocab, hidden), {hf_name: (vocab, hidden)}, padded=True)

    def of_layer(layer: int, key: str, hf: Mapping[str, tuple[int, ...]], fusion: Fusion = "none") -> Parameter:
        _, *rest = next(iter(hf.values()))
        shape = (sum(num_rows for num_rows, *_ in hf.values()), *rest)
        named = {name.format(layer=layer): hf_shape for name, hf_shape in hf.items()}
        return Parameter(f"model.decoder.layers.{key}", shape, named, layer, fusion)

    qkv = {family.q: (query, hidden), family.k: (key_value, hidden), family.v: (key_value, hidden)}
    gate_up = {family.gate: (ffn, hidden), family.up: (ffn, hidden)}
    found = [rows(EMBEDDING, family.embedding)]
    for i in range(spec.num_layers):
        found += [
            of_layer(i, "self_attention.linear_qkv.layer_norm_weight", {family.input_norm: (hidden,)}),
            of_layer(i, "self_attention.linear_qkv.weight", qkv, "qkv"),
            of_layer(i, "self_attention.linear_proj.weight", {family.o: (hidden, query)}),
            of_layer(i, "mlp.linear_fc1.layer_norm_weight", {family.post_attention_norm: (hidden,)}),
            of_layer(i, "mlp.linear_fc1.weight", gate_up, "gate_up"),
            of_layer(i, "mlp.linear_fc2.weight", {family.down: (hidden, ffn)}),
        ]
    found.append(Parameter("model.decoder.final_layernorm.weight", (hidden,), {family.final_norm: (hidden,)}))
    return found if spec.tie_word_embeddings else [*found, rows("model.output_layer.weight", family.output)]


def parts(parameter: Parameter, fused: torch.Tensor, spec: ModelSpec) -> Iterator[tuple[str, torch.Tensor]]:
    """Names of the Hugging Face tensors, and views into `fused` (shape `parameter.shape`) that are these tensors.

    One conversion copies out of the views, the other copies into them. So this one function is both directions. The
    views of a "qkv" are [groups, heads per group, head_dim, hidden] and not contiguous. They have the elements of
    [heads x head_dim, hidden] in the same order.
    """
    views: Sequence[torch.Tensor] = (fused,)
    if parameter.fusion == "gate_up":
        views = fused.chunk(2)
    if parameter.fusion == "qkv":
        num_queries = spec.num_attention_heads // spec.num_query_groups
        groups = fused.view(spec.num_query_groups, num_queries + 2, spec.head_dim, spec.hidden_size)
        views = torch.split(groups, [num_queries, 1, 1], dim=1)
    return zip(parameter.hf_shapes, views, strict=True)
