"""Norm, activation, rotary embedding and the embedding's gradient for a CPU, in fewer passes over memory.

Without a compiler, every operation of PyTorch reads and writes whole tensors. The functions here compute the same
values and gradients as `F.rms_norm`, `F.embedding`, and megatron-core 0.11.0's `SwiGLUFunction` and
`_apply_rotary_pos_emb_bshd`, up to rounding. Their backward passes are written out, and write into memory that they
already have.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019). `x` [..., size] and `weight` [size] in float32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale).mul_(weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        """With s = scale: of x, s g w - x s^3 mean(g w x) over a row; of weight, the sum of s g x over all rows."""
        x, weight, scale = ctx.saved_tensors
        size = x.shape[-1]
        products, scales = (gradient * x).reshape(-1, size), scale.reshape(-1)
        of_weight = scales @ products
        factors = (products @ weight).mul_(scales**3).div_(-size)
        of_x = torch.mul(gradient, weight, out=products.view_as(x)).mul_(scale)
        return of_x.addcmul_(x, factors.view_as(scale)), of_weight, None


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """`RMSNorm` where it can be used, and else `F.rms_norm`."""
    if x.is_cuda or torch.is_autocast_enabled("cpu") or not x.dtype == weight.dtype == torch.float32:
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    return RMSNorm.apply(x, weight, eps)  # type: ignore[no-any-return, no-untyped-call]


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up, with `x` = [gate, up] in its last dimension (Shazeer 2020)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, fp8_input_store: bool = False) -> torch.Tensor:
        assert not fp8_input_store
        ctx.save_for_backward(x)
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        of_x = torch.empty_like(x)
        (gate, up), (of_gate, of_up) = x.chunk(2, dim=-1), of_x.chunk(2, dim=-1)
        torch.mul(gradient, up, out=of_up)
        torch.ops.aten.silu_backward.grad_input(of_up, gate, grad_input=of_gate)
        torch.ops.aten.silu.out(gate, out=of_up).mul_(gradient)
        return of_x, None


class Rotary(torch.autograd.Function):
    """[a, b] -> [a cos - b sin, b cos + a sin], where [a, b] are the halves of the last dimension (Su et al. 2021)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        """`x` [sequence, batch, heads, size]; `cos` and `sin` [sequence, 1 or batch, 1, size / 2]."""
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, sin, -1), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, sign: int) -> torch.Tensor:
    out = x.new_empty(x.shape)
    (a, b), (of_a, of_b) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(a, cos, out=of_a).addcmul_(b, sin, value=-sign)
    torch.mul(b, cos, out=of_b).addcmul_(a, sin, value=sign)
    return out


def with_fast_rotary(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """megatron-core's `_apply_rotary_pos_emb_bshd`, with `Rotary` for what a Llama has and `original` for the rest."""

    def apply(
        t: torch.Tensor,
        freqs: torch.Tensor,
        rotary_interleaved: bool = False,
        multi_latent_attention: bool = False,
        mscale: float = 1.0,
    ) -> torch.Tensor:
        """`t` [sequence, batch, heads, size]; `freqs` [sequence, 1 or batch, 1, size], both halves alike."""
        if rotary_interleaved or multi_latent_attention or mscale != 1.0 or freqs.shape[-1] != t.shape[-1]:
            return original(t, freqs, rotary_interleaved, multi_latent_attention, mscale)
        angles = freqs[..., : freqs.shape[-1] // 2]
        return Rotary.apply(t, angles.cos().to(t.dtype), angles.sin().to(t.dtype))  # type: ignore[no-any-return, no-untyped-call]

    return apply


class Embedding(torch.autograd.Function):
    """`F.embedding` whose gradient goes straight into Megatron's gradient buffer, `weight.main_grad`.

    Autograd would make a tensor with a row for every token of the vocabulary, and that for every micro-batch. Only the
    rows of tokens that are there are not zero.
    """

    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, weight: Any) -> torch.Tensor:
        ctx.save_for_backward(ids)
        ctx.weight = weight
        return F.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (ids,) = ctx.saved_tensors
        buffer = ctx.weight.main_grad
        buffer.index_add_(0, ids.flatten(), gradient.reshape(ids.numel(), -1).to(buffer.dtype))
        return None, None


def embedding(ids: torch.Tensor, weight: Any) -> torch.Tensor:
    """`Embedding` for a weight that has a gradient buffer, and else `F.embedding`."""
    if getattr(weight, "main_grad", None) is None:
        return F.embedding(ids, weight)
    return Embedding.apply(ids, weight)  # type: ignore[no-any-return, no-untyped-call]
