"""The output layer, the softmax and their gradients, for the tokens that have a target and for no others.

Half of the tokens of a batch, or more, are prompts that nobody learns from. NeMo-Aligner computes the logits of all
tokens, which is a fifth of the work of a small model, and at a vocabulary of 128k the largest tensor of a step. Here
the hidden states are selected before the output layer. It takes effect in three places, on every platform:

1. `MicroBatches` (`micro_batches.py`) says where the micro-batch that it hands out has targets.
2. The output layer gets these tokens alone: hidden states [sequence, batch, hidden] -> logits [targets, 1, vocabulary].
3. What reads the logits finds the log-probabilities of the targets, and puts them where NeMo expects them: zeros
   elsewhere. NeMo-Aligner masks these places in every loss.

Values and gradients are those of NeMo-Aligner, up to rounding. With context parallelism, a rank has the targets of its
own part of the sequence, or none.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from nemo_aligner.models.nlp.gpt import megatron_gpt_dpo_model as dpo_model

from nemo_srl.trainers.nemo_aligner.micro_batches import Targets


def install(model: Any, targets: Targets) -> None:
    """Let `model`, NeMo-Aligner's for SFT or DPO, compute logits at `targets` only."""
    for module in model.get_model_module_list():
        if module.post_process:
            _select_before(module.output_layer, targets)
            module.compute_language_model_loss = _token_losses
    dpo_model.from_parallel_logits_to_logprobs = _token_logprobs


def _select_before(output_layer: Any, targets: Targets) -> None:
    inner, sequence_parallel = output_layer.forward, output_layer.sequence_parallel
    if sequence_parallel:
        # The tokens of a rank are a part of the sequence, so all must be here before some are selected. The layer then
        # no longer gathers its input, and adds up the gradient of it over the ranks instead.
        output_layer.sequence_parallel, output_layer.allreduce_dgrad = False, True

    def forward(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False)
        selected = hidden.flatten(0, 1).index_select(0, targets.index(hidden.device))
        # Two dimensions. With three, and in DPO, PyTorch would copy weights without a gradient (LoRA, frozen layers)
        # for each token in the backward pass: 57 MB a token for SmolLM2-135M in bfloat16.
        logits, bias = inner(selected, *args, **kwargs)
        return logits.unsqueeze(1), bias

    output_layer.forward = forward


def _token_losses(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """`GPTModel.compute_language_model_loss`: labels [rows, sequence] -> the loss of each token, of that shape."""
    return -_token_logprobs(logits, labels)


def _token_logprobs(vocab_parallel_logits: torch.Tensor, target: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """NeMo-Aligner's `from_parallel_logits_to_logprobs`, with `target` -100 where there is none."""
    apply: Any = LogProbs.apply
    found = apply(vocab_parallel_logits.flatten(0, 1), target[target >= 0])
    return torch.zeros(target.shape, device=target.device).masked_scatter(target >= 0, found)


class LogProbs(torch.autograd.Function):
    """log softmax(logits)[target] over tensor-parallel parts of the vocabulary, in few passes and with little memory.

    Takes the place of NeMo-Aligner's `DistributedLogprob` (nemo_aligner/utils/distributed.py), which makes five copies
    of all logits, one of them of 64-bit integers.
    """

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """`logits` [targets, vocabulary / ranks], `target` [targets] -> float32 [targets]. Overwrites `logits`."""
        group = parallel_state.get_tensor_model_parallel_group()
        num_columns, ctx.dtype = logits.shape[1], logits.dtype
        # float32 also under autocast. A log-probability of -5 in bfloat16 is wrong by up to 0.016, and hundreds of them
        # are summed for one response. Nobody reads the logits after this, so they need not be copied.
        logits = logits.detach().float()
        largest = logits.amax(-1, keepdim=True)
        torch.distributed.all_reduce(largest, op=torch.distributed.ReduceOp.MAX, group=group)
        logits.sub_(largest)
        column = target[:, None] - num_columns * parallel_state.get_tensor_model_parallel_rank()
        is_mine = (column >= 0) & (column < num_columns)
        column = column.clamp(0, num_columns - 1)
        chosen = logits.gather(1, column).mul_(is_mine)
        sums = torch.cat([chosen, logits.exp_().sum(-1, keepdim=True)], dim=1)
        torch.distributed.all_reduce(sums, group=group)
        ctx.save_for_backward(logits.div_(sums[:, 1:]), column, is_mine)
        return sums[:, 0] - sums[:, 1].log()

    @staticmethod
    def backward(ctx: Any, grad_output: torch.Tensor) -> Any:
        softmax, column, is_mine = ctx.saved_tensors
        gradient = grad_output[:, None]
        return softmax.mul_(-gradient).scatter_add_(1, column, gradient * is_mine).to(ctx.dtype), None
