"""Llama and its relatives for generation: the weights, the prefill of a prefix tree, one decoding step for a batch.

All is on one device, the CPU or a GPU.

This is the Llama of the Hugging Face checkpoint format: RMSNorm, rotary embedding in halves, grouped queries, SwiGLU.
Families may add biases of queries, keys and values, and norms of queries and keys. Query, key and value are one matrix
product, and so are gate and up. In float32 its logits agree with those of transformers up to rounding.

Not covered: several GPUs, training, architectures of no known family (`models.families` refuses them), and rotary
scaling other than `llama3` and `linear` (refused here).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from nemo_srl.engines.embedded.batching import Segment
from nemo_srl.engines.embedded.kv_cache import KVCache, round_up
from nemo_srl.engines.embedded.prefill import PrefilledPrompts, attention, chunks
from nemo_srl.errors import ModelError
from nemo_srl.models import families, hf
from nemo_srl.models.spec import ModelSpec

Linear = Callable[[Tensor], Tensor]
"""x [num_tokens, in_features] -> [num_tokens, out_features]."""


@dataclass(frozen=True)
class Layer:
    input_norm: Tensor
    qkv: Linear
    qk_norm: Tensor | None
    """[heads + groups, head_dim], or None in a family without: the norm's weights of all queries and all keys."""
    output: Linear
    post_attention_norm: Tensor
    gate_up: Linear
    down: Linear


class LlamaModel:
    """The weights of one Hugging Face directory in `dtype`, and the two forward passes of generation."""

    def __init__(self, model_dir: Path, *, dtype: torch.dtype, device: str = "cpu") -> None:
        self.spec = spec = hf.read_spec(model_dir)
        self.dtype, self.device = dtype, torch.device(device)
        self.query_size = spec.num_attention_heads * spec.head_dim
        self.inverse_frequencies = inverse_frequencies(spec).to(self.device)
        read, family = _Weights(model_dir, dtype, self.device), families.of(spec)
        self.embedding = read(family.embedding)
        self.final_norm = read(family.final_norm)
        self.head = make_linear(self.embedding if spec.tie_word_embeddings else read(family.output))
        self.layers = [_read_layer(read, spec, family, i) for i in range(spec.num_layers)]

    @property
    def cache_bytes_per_token(self) -> int:
        """Of the keys and values of one token in all layers."""
        return 2 * self.spec.num_layers * self.spec.num_query_groups * self.spec.head_dim * self.dtype.itemsize

    def new_cache(self, *, num_rows: int, max_prompt: int, max_tokens: int) -> KVCache:
        """Room for `num_rows` sequences, each with a prompt of up to `max_prompt` tokens and `max_tokens` more."""
        cache = self.allocate_cache(num_rows, round_up(max_prompt) + round_up(max_tokens))
        cache.begin(num_rows, max_prompt)
        return cache

    def allocate_cache(self, max_rows: int, capacity: int) -> KVCache:
        return KVCache(
            num_layers=self.spec.num_layers,
            max_rows=max_rows,
            num_groups=self.spec.num_query_groups,
            head_dim=self.spec.head_dim,
            capacity=capacity,
            dtype=self.dtype,
            device=self.device,
        )

    def tensor(self, integers: list[int]) -> Tensor:
        """On the model's device."""
        return torch.tensor(integers, dtype=torch.long, device=self.device)

    def logits(self, hidden: Tensor) -> Tensor:
        """[num_rows, hidden_size] -> [num_rows, vocab_size], in `dtype`."""
        return self.head(self._norm(hidden, self.final_norm))

    @torch.inference_mode()
    def prefill(self, segments: Sequence[Segment]) -> PrefilledPrompts:
        """Compute every segment once, parents before children."""
        spec = self.spec
        num_tokens = sum(len(segment.tokens) for segment in segments)
        shape = (spec.num_layers, num_tokens, spec.num_query_groups, spec.head_dim)
        keys, values = (torch.empty(*shape, dtype=self.dtype, device=self.device) for _ in range(2))
        done = PrefilledPrompts(keys, values, {}, {})
        offset = 0
        for chunk in chunks(segments, self.device):
            first = offset
            for segment in chunk:
                done.spans[id(segment)] = slice(offset, offset + len(segment.tokens))
                offset += len(segment.tokens)
            self._prefill_chunk(chunk, slice(first, offset), done)
        return done

    def _prefill_chunk(self, chunk: Sequence[Segment], span: slice, done: PrefilledPrompts) -> None:
        """Compute segments whose parents are done, as one matrix of tokens."""
        rotary = self._rotary(self.tensor([p for segment in chunk for p in range(segment.start, segment.end)]))
        hidden = self.embedding[self.tensor([token for segment in chunk for token in segment.tokens])]
        attend = attention(chunk, done)
        for i, layer in enumerate(self.layers):
            query, key, value = self._query_key_value(layer, hidden, rotary)
            done.keys[i, span], done.values[i, span] = key, value
            hidden = self._after_attention(layer, hidden, attend(i, query))
        for segment in chunk:
            done.last_hidden[id(segment)] = hidden[done.span(segment).stop - span.start - 1]

    @torch.inference_mode()
    def decode(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """One step: `tokens` at `positions`, both [num_rows] -> logits [num_rows, vocab_size]."""
        cache.open_column()
        return self.step(tokens, positions, cache, width=cache.width)

    def step(self, tokens: Tensor, positions: Tensor, cache: KVCache, *, width: int) -> Tensor:
        """`decode` for the first rows of `cache` and its first `width` columns, the open column among them.

        What changes from step to step is in tensors, and nothing waits for the device. So a CUDA graph can record it.
        """
        spec, rows = self.spec, tokens.shape[0]
        mask, scale = cache.mask[:rows, :, :, :width], 1 / math.sqrt(spec.head_dim)
        rotary = self._rotary(positions)
        hidden = self.embedding[tokens]
        batch = rows * spec.num_query_groups
        for i, layer in enumerate(self.layers):
            query, key, value = self._query_key_value(layer, hidden, rotary)
            keys, values = cache.write(i, key, value)
            scores = torch.bmm(query.reshape(batch, -1, spec.head_dim), keys.flatten(0, 1)[..., :width])
            scores = torch.add(mask, scores.view(rows, spec.num_query_groups, -1, width), alpha=scale)
            weights = torch.softmax(scores, -1).view(batch, -1, width)
            attended = torch.bmm(weights, values.flatten(0, 1)[:, :width])
            hidden = self._after_attention(layer, hidden, attended.view(rows, self.query_size))
        return self.logits(hidden)

    def _query_key_value(
        self, layer: Layer, hidden: Tensor, rotary: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries, rotated keys, and values, each [num_tokens, heads or groups, head_dim]."""
        heads, groups = self.spec.num_attention_heads, self.spec.num_query_groups
        qkv = layer.qkv(self._norm(hidden, layer.input_norm)).view(-1, heads + 2 * groups, self.spec.head_dim)
        query_key = qkv[:, : heads + groups]
        if layer.qk_norm is not None:
            query_key = F.rms_norm(query_key, (self.spec.head_dim,), eps=self.spec.rms_norm_eps) * layer.qk_norm
        rotated = rotate(query_key, *rotary)
        return rotated[:, :heads], rotated[:, heads:], qkv[:, heads + groups :]

    def _after_attention(self, layer: Layer, hidden: Tensor, attended: Tensor) -> Tensor:
        """Output projection and feed-forward network, each with its residual."""
        hidden = layer.output(attended).add_(hidden)
        gate, up = layer.gate_up(self._norm(hidden, layer.post_attention_norm)).chunk(2, -1)
        return layer.down(F.silu(gate).mul_(up)).add_(hidden)

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(hidden, (self.spec.hidden_size,), weight, self.spec.rms_norm_eps)

    def _rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines for `rotate`, each [num_tokens, 1, head_dim]. The sines of the first half are negated."""
        angles = positions[:, None].float() * self.inverse_frequencies
        cos, sin = angles.cos(), angles.sin()
        return (torch.cat((cos, cos), -1)[:, None].to(self.dtype), torch.cat((-sin, sin), -1)[:, None].to(self.dtype))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of `x` [num_tokens, num_heads, head_dim]. It rotates halves, and not pairs."""
    half = x.shape[-1] // 2
    swapped = torch.cat((x[..., half:], x[..., :half]), -1)
    return (x * cos).addcmul_(swapped, sin)


def inverse_frequencies(spec: ModelSpec) -> Tensor:
    """Angles per position, [head_dim / 2]. Long wavelengths are scaled if the model's configuration says so.

    Raises `ModelError` for a kind of scaling that is not known. To ignore it would give wrong text.
    """
    plain = spec.rope_theta ** (-torch.arange(0, spec.head_dim, 2, device="cpu").float() / spec.head_dim)
    scaling = spec.rope_scaling or {}
    if spec.rope_type == "default":
        return plain
    if spec.rope_type == "linear":
        return plain / float(scaling["factor"])
    if spec.rope_type != "llama3":
        raise ModelError(
            f"rope_scaling={spec.rope_scaling}: the embedded engine knows the types default, linear and llama3. "
            "Serve this model with another engine."
        )
    factor, low, high = (float(scaling[k]) for k in ("factor", "low_freq_factor", "high_freq_factor"))
    turns = float(scaling["original_max_position_embeddings"]) * plain / (2 * math.pi)
    smooth = ((turns - low) / (high - low)).clamp(0, 1)  # 0: a long wavelength, scaled. 1: a short one, kept.
    return plain * (smooth + (1 - smooth) / factor)


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """x -> x @ weight.T + bias, with the weight laid out once in the way that oneDNN's kernels want.

    `F.linear` lays it out again in every call. For the few rows of a decoding step, this is 1.5 to 2 times faster.
    On a GPU, without oneDNN, or where oneDNN does not know the dtype, it is `F.linear`.
    """
    ops = torch.ops.mkldnn
    if weight.device.type != "cpu" or not hasattr(ops, "_linear_pointwise"):
        return lambda x: F.linear(x, weight, bias)
    if weight.dtype == torch.bfloat16 and not ops._is_mkldnn_bf16_supported():
        return lambda x: F.linear(x, weight, bias)
    packed = ops._reorder_linear_weight(weight, 32)
    run = ops._linear_pointwise.default

    def linear(x: Tensor) -> Tensor:
        # A single row would take another kernel, which rounds differently. So it is doubled.
        rows = x if x.shape[0] > 1 else x.repeat(2, 1)
        return run(rows, packed, bias, "none", [], "")[: x.shape[0]]  # type: ignore[no-any-return]

    return linear


class _Weights:
    """Reads tensors of a directory by name, to a dtype and a device."""

    def __init__(self, model_dir: Path, dtype: torch.dtype, device: torch.device) -> None:
        self.index = hf.tensor_index(model_dir)
        self.model_dir = model_dir
        self.dtype, self.device = dtype, device

    def __call__(self, name: str) -> Tensor:
        if name not in self.index:
            raise ModelError(f"{self.model_dir}: the weights have no {name}, which this model needs")
        with safe_open(self.index[name], framework="pt") as file:
            return file.get_tensor(name).to(self.device, self.dtype)  # type: ignore[no-any-return]


def _read_layer(read: _Weights, spec: ModelSpec, family: families.Family, layer: int) -> Layer:
    def merged(*names: str) -> Tensor:
        """The rows of all these tensors. Some have the same name, because they are one in the checkpoint already."""
        return torch.cat([read(name.format(layer=layer)) for name in dict.fromkeys(names)])

    def qk_norm() -> Tensor:
        query, key = (read(name.format(layer=layer)) for name in (family.q_norm, family.k_norm))
        return torch.cat([query.repeat(spec.num_attention_heads, 1), key.repeat(spec.num_query_groups, 1)])

    biases = (family.q_bias, family.k_bias, family.v_bias)
    return Layer(
        input_norm=read(family.input_norm.format(layer=layer)),
        qkv=make_linear(merged(family.q, family.k, family.v), merged(*biases) if family.q_bias else None),
        qk_norm=qk_norm() if family.q_norm else None,
        output=make_linear(merged(family.o)),
        post_attention_norm=read(family.post_attention_norm.format(layer=layer)),
        gate_up=make_linear(merged(family.gate, family.up)),
        down=make_linear(merged(family.down)),
    )
