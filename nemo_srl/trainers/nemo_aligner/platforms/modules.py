"""Plain PyTorch modules in the place of Transformer Engine's.

Every class takes the constructor arguments that megatron-core 0.11.0's layer specs pass to the real class, and has
the same parameter names and the same sharding in checkpoints. They compute what the layers are defined to be: RMSNorm,
a linear map, causal softmax attention. Not covered: LayerNorm, which no family of models here has.

Attention is causal. Rows are padded on the right, so no real token sees padding. The layout of `shared_beginnings.py`
says which tokens lie on one path.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from nemo_srl.trainers.nemo_aligner.platforms.attention import TreeAttention
from nemo_srl.trainers.nemo_aligner.platforms.functions import rms_norm
from nemo_srl.trainers.nemo_aligner.shared_beginnings import LAYOUT


def transformer_engine_extension() -> dict[str, Any]:
    """The names that megatron-core and NeMo import from `megatron.core.extensions.transformer_engine`."""
    not_here = type("NeedsTransformerEngine", (), {})
    grouped = ("TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear", "TEGroupedLinear")
    functions = ("SplitAlongDim", "get_cpu_offload_context", "te_checkpoint", "Fp8Padding", "Fp8Unpadding")
    return {
        "TENorm": Norm,
        "TEColumnParallelLinear": ColumnParallelLinear,
        "TELinear": ColumnParallelLinear,
        "TELayerNormColumnParallelLinear": NormColumnLinear,
        "TERowParallelLinear": RowParallelLinear,
        "TEDotProductAttention": Attention,
        **dict.fromkeys((*grouped, "TEDelayedScaling", "TECudaRNGStatesTracker"), not_here),
        **dict.fromkeys(functions),
    }


def _norm_weight(config: Any, size: int) -> torch.nn.Parameter:
    assert config.normalization == "RMSNorm", config.normalization
    weight = torch.nn.Parameter(torch.ones(size, dtype=config.params_dtype))
    # With sequence parallelism the gradients of these parameters are partial sums, which megatron-core adds up.
    weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return weight


class Norm(torch.nn.Module):
    """`TENorm`."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps, self.weight = eps, _norm_weight(config, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)


class NormColumnLinear(ColumnParallelLinear):  # type: ignore[misc]
    """`TELayerNormColumnParallelLinear`: a norm and the linear layer behind it as one module."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.eps, self.layer_norm_weight = config.layernorm_epsilon, _norm_weight(config, input_size)

        self.return_layernorm_output = False  # NeMo's LoRA sets it: an adapter has the same input as the linear layer

    def forward(self, x: torch.Tensor, *args: Any) -> Any:
        normed = rms_norm(x, self.layer_norm_weight, self.eps)
        out, bias = super().forward(normed, *args)
        return ((out, normed), bias) if self.return_layernorm_output else (out, bias)


class Attention(DotProductAttention):  # type: ignore[misc]
    """`TEDotProductAttention`, causal: `attention.py` for sequences that share beginnings, else torch's kernel; with
    dropout, megatron-core's own code."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: object, **kwargs: Any
    ) -> torch.Tensor:
        """`query` [sequence, batch, heads, head_dim], `key` and `value` with groups for heads -> [s, b, h * d]."""
        assert self.attn_mask_type == AttnMaskType.causal, self.attn_mask_type
        if self.training and self.attention_dropout.p > 0:
            # The fused kernel uses torch's generator. This uses the one that differs between tensor-parallel ranks.
            length = query.shape[0]
            mask = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)  # where it must not look
            return super().forward(query, key, value, mask[None, None], **kwargs)  # type: ignore[no-any-return]
        if LAYOUT.branches is not None:
            return TreeAttention.apply(query, key, value, self.softmax_scale, LAYOUT.branches)  # type: ignore[no-any-return, no-untyped-call]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)
