"""What a training minimises, put into NeMo-Aligner's models where upstream minimises something else.

Each function here changes one model object. It imports NeMo, so others import it late.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_num_microbatches


def average_over_tokens(model: Any) -> None:
    """Let `model`, a `GPTSFTModel`, minimise the mean over all response tokens of the global batch.

    Upstream takes the mean over the tokens of each micro-batch, and then the mean over the micro-batches. There a token
    counts more when it is in a micro-batch of short responses, so the number and the order of micro-batches would
    decide what is trained.
    """
    upstream = model.get_loss_and_metrics

    def get_loss_and_metrics(batch: dict[str, Any], forward_only: bool) -> Any:
        # Every pipeline stage has the whole batch of its data-parallel rank, so the last one knows the count, too.
        data_parallel = parallel_state.get_data_parallel_group()
        num_tokens = batch["loss_mask"].sum().cuda()
        torch.distributed.all_reduce(num_tokens, group=data_parallel)
        num_micro_batches = get_num_microbatches() * data_parallel.size()

        def loss_func(loss_mask: Any, num_valid_tokens_in_micro_batch: Any, losses: Any) -> Any:
            """Megatron and NeMo take the mean of what this returns, over all micro-batches of all ranks."""
            total = (losses.float().view(-1) * loss_mask.view(-1)).sum()
            return total * num_micro_batches / num_tokens

        model.loss_func = loss_func
        return upstream(batch, forward_only)

    model.get_loss_and_metrics = get_loss_and_metrics
