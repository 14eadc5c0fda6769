"""Plain PyTorch modules in the place of Transformer Engine's.

Every class takes the constructor arguments that megatron-core 0.11.0's layer specs pass to the real class, and has
the same parameter names and the same sharding in checkpoints. They compute what the layers are defined to be: RMSNorm,
a linear map, causal softmax attention. `DistributedLogprob` takes the place of NeMo-Aligner's own, which is written
for a GPU's memory bandwidth. Not covered: LayerNorm, which no family of models here has.

Attention is causal and takes no mask. Rows are padded on the right, so no real token sees padding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType

from nemo_srl.trainers.nemo_aligner.platforms.attention import CausalAttention, is_faster
from nemo_srl.trainers.nemo_aligner.platforms.functions import rms_norm


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

    def forward(self, x: torch.Tensor, *args: Any) -> Any:
        return super().forward(rms_norm(x, self.layer_norm_weight, self.eps), *args)


class Attention(DotProductAttention):  # type: ignore[misc]
    """`TEDotProductAttention`, causal: torch's kernel or `attention.py`; with dropout, megatron-core's own code."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: object, **kwargs: Any
    ) -> torch.Tensor:
        """`query` [sequence, batch, heads, head_dim], `key` and `value` with groups for heads -> [s, b, h * d]."""
        assert self.attn_mask_type == AttnMaskType.causal, self.attn_mask_type
        if self.training and self.attention_dropout.p > 0:
            # The fused kernel uses torch's generator. This uses the one that differs between tensor-parallel ranks.
            length = query.shape[0]
            mask = torch.ones(length, length, dtype=torch.bool).triu(1)[None, None]  # True where it must not look
            return super().forward(query, key, value, mask, **kwargs)  # type: ignore[no-any-return]
        if is_faster(query):
            return CausalAttention.apply(query, key, value, self.softmax_scale)  # type: ignore[no-any-return, no-untyped-call]
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.softmax_scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)


class DistributedLogprob(torch.autograd.Function):
    """Log-probabilities of targets, split over tensor-parallel ranks, in few passes over the vocabulary.

    It has the arguments and results of NeMo-Aligner's class of this name (nemo_aligner/utils/distributed.py), which
    makes five copies of all logits. Here only rows with a target are read. For the others, prompts and padding (-100),
    the result is 0 and there is no gradient, as in NeMo-Aligner.
    """

    @staticmethod
    def forward(
        ctx: Any, all_logits: torch.Tensor, target: torch.Tensor, inference_only: bool = False, *_: Any
    ) -> torch.Tensor:
        """`all_logits` [batch, sequence, vocabulary / ranks], `target` [batch, sequence] -> as `target`."""
        group = parallel_state.get_tensor_model_parallel_group()
        num_columns = all_logits.shape[-1]
        first = num_columns * parallel_state.get_tensor_model_parallel_rank()
        rows = (target.flatten() >= 0).nonzero().squeeze(1)
        logits = all_logits.reshape(-1, num_columns)[rows].float()
        largest = logits.amax(-1, keepdim=True)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
        logits.sub_(largest)
        column = target.flatten()[rows, None] - first
        is_mine = (column >= 0) & (column < num_columns)
        column = column.clamp(0, num_columns - 1)
        chosen = logits.gather(1, column).mul_(is_mine)
        exponentials = logits.exp_()
        sums = torch.cat([chosen, exponentials.sum(-1, keepdim=True)], dim=1)
        torch.distributed.all_reduce(sums, group=group)
        if not inference_only:
            ctx.save_for_backward(exponentials.div_(sums[:, 1:]), rows, column, is_mine)
            ctx.shape, ctx.dtype = all_logits.shape, all_logits.dtype
        found = torch.zeros(target.numel(), dtype=torch.float32)
        found[rows] = sums[:, 0] - sums[:, 1].log()
        return found.view_as(target)

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        softmax, rows, column, is_mine = ctx.saved_tensors
        gradient = grad_output.flatten()[rows, None]
        of_rows = softmax.mul_(-gradient).scatter_add_(1, column, gradient * is_mine)
        of_logits = torch.zeros(ctx.shape, dtype=ctx.dtype)
        of_logits.view(-1, ctx.shape[-1])[rows] = of_rows.to(ctx.dtype)
        return of_logits, None, None, None
