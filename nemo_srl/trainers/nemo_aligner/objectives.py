"""What a training minimises, put into NeMo-Aligner's models where upstream minimises something else.

Each function gets a model of NeMo-Aligner. It imports torch, and NeMo only when it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from nemo_srl.errors import ConfigError
from nemo_srl.trainers.nemo_aligner.losses import SETTINGS, Loss

Sum = Callable[[torch.Tensor], torch.Tensor]


def average_over_tokens(model: Any) -> None:
    """Let `model`, a `GPTSFTModel`, minimise the mean over all response tokens of the global batch, by their weights.

    Upstream takes the mean over the tokens of each micro-batch, and then the mean over the micro-batches. There a token
    counts more when it is in a micro-batch of short responses, so the number and the order of micro-batches would
    decide what is trained.
    """
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import get_num_microbatches

    from nemo_srl.trainers.nemo_aligner import context_parallel

    upstream = model.get_loss_and_metrics

    def get_loss_and_metrics(batch: dict[str, Any], forward_only: bool) -> Any:
        # Every pipeline stage has the whole batch of its data-parallel rank, so the last one knows the sum, too.
        data_parallel = parallel_state.get_data_parallel_group()
        weight = batch["loss_mask"].sum().cuda()
        torch.distributed.all_reduce(weight, group=data_parallel)
        num_micro_batches = get_num_microbatches() * data_parallel.size()

        def loss_func(loss_mask: Any, num_valid_tokens_in_micro_batch: Any, losses: Any) -> Any:
            """Megatron and NeMo take the mean of what this returns, over all micro-batches of all ranks."""
            total = context_parallel.total((losses.float().view(-1) * loss_mask.view(-1)).sum())
            return total * num_micro_batches / weight

        model.loss_func = loss_func
        return upstream(batch, forward_only)

    model.get_loss_and_metrics = get_loss_and_metrics


def use_losses_of_pairs(model: Any, loss: Loss | None, *, over_ranks: Sum = lambda value: value) -> None:
    """Let `model`, a `MegatronGPTDPOModel`, weigh the likelihood of the chosen responses by row (`sft_loss_func`).

    With a `loss`, it also computes that where it would compute its own (`loss_func`). `over_ranks` adds up what the
    ranks have that share a sequence. Pairs that are not `compared` add nothing to that loss, and have no rewards.
    """
    upstream, own_loss, rewards = (
        model.get_forward_output_and_loss_func, model.loss_func, model.gather_and_split_rewards
    )  # fmt: skip

    def get_forward_output_and_loss_func(*args: Any, **kwargs: Any) -> Any:
        forward = upstream(*args, **kwargs)

        def forward_step(micro_batches: Iterator[dict[str, Any]], *more: Any) -> Any:
            # Upstream takes to the loss only what it knows of a row. But each pipeline stage has the whole row, and
            # Megatron computes a micro-batch's loss right after its forward step.
            micro_batch = next(micro_batches)
            model.sft_loss_func = partial(_weighted_likelihood, model, micro_batch["sft_weight"])
            of_pairs, compared = own_loss, micro_batch["compared"]
            if loss is not None:
                of_pairs = partial(_preference_loss, model, loss, over_ranks, micro_batch["confidence"])
            model.loss_func = of_pairs if compared.all() else partial(_of_compared, of_pairs, compared)
            model.gather_and_split_rewards = partial(_rewards_of_compared, rewards, compared)
            return forward(iter([micro_batch]), *more)

        return forward_step

    model.get_forward_output_and_loss_func = get_forward_output_and_loss_func
    model.get_loss_and_metrics = partial(_with_metrics_of_compared, model.get_loss_and_metrics)


def _with_metrics_of_compared(upstream: Any, batch: dict[str, Any], forward_only: bool) -> Any:
    """NeMo-Aligner's loss and metrics of a step. `acc` is the share of compared pairs that are in order. Without such
    pairs there is neither that nor a reward."""
    from megatron.core import parallel_state

    loss, metrics = upstream(batch, forward_only)
    compared = batch["compared"]
    counts = torch.tensor([float(compared.sum()), len(compared)]).cuda()
    torch.distributed.all_reduce(counts, group=parallel_state.get_data_parallel_group())
    number, of_all = counts.tolist()
    if number:
        return loss, metrics | {"acc": metrics["acc"] * of_all / number}
    return loss, {key: value for key, value in metrics.items() if key != "acc" and not key.startswith("rewards_")}


def _of_compared(loss: Callable[..., Any], compared: Any, policy: Any, *others: Any, **settings: Any) -> Any:
    """`loss` of the compared pairs only, still as a mean over all pairs; and how many of all are compared and in
    order."""
    numbers = compared.nonzero().flatten()
    if not len(numbers):
        none = policy.sum() * 0  # which still has a gradient
        return none, none.detach()
    rows = torch.cat([numbers, numbers + len(compared)]).to(policy.device)
    values = loss(policy[rows], *(x if x is None else x[rows] for x in others), **settings)
    return tuple(value * (len(numbers) / len(compared)) for value in values)


def _rewards_of_compared(rewards: Callable[..., Any], compared: Any, policy: Any, *others: Any, **settings: Any) -> Any:
    """NeMo-Aligner's `rewards`, of all data-parallel ranks, without the pairs that are not compared."""
    # The ranks may differ in how many they compare. So all rows are gathered, and some of them are not a number.
    left_out = ~torch.cat([compared, compared]).to(policy.device)
    found = rewards(policy.masked_fill(left_out[:, None], torch.nan), *others, **settings)
    return tuple(values[~values.isnan()] for values in found)


def _weighted_likelihood(
    model: Any, weight: Any, policy: Any, labels: Any, cu_seqlens: None = None, average_log_probs: bool = False
) -> Any:
    """The negative log-likelihood of the chosen responses, [2 x pairs, sequence] -> the mean over pairs, each times its
    weight."""
    total = model.get_reduced_masked_logps(policy, labels=labels, average_log_probs=average_log_probs)
    chosen, _ = model.split_output_tensor(total)
    return -(chosen * weight.to(chosen.device)).mean(0)


def _preference_loss(
    model: Any, loss: Loss, over_ranks: Sum, confidence: Any, policy: Any, reference: Any, labels: Any, rewards: Any,
    cu_seqlens: None, average_log_probs: bool,
) -> tuple[Any, Any]:  # fmt: skip
    """Log-probabilities of tokens, [2 x pairs, sequence], first of the chosen -> (loss, share of pairs in order)."""

    def both(name: str, values: Any) -> dict[str, Any]:
        """An argument for each side, from [2 x pairs]. `name` has {} in the place of chosen and rejected."""
        sides = zip(("chosen", "rejected"), model.split_output_tensor(values), strict=True)
        return {name.format(side): value for side, value in sides}

    total = partial(model.get_reduced_masked_logps, labels=labels)
    losses = loss(
        {
            **both("{}", total(policy - reference)),
            **both("policy_{}_logps", total(policy)),
            **both("reference_{}_logps", total(reference)),
            **both("{}_lengths", over_ranks((labels > -1).sum(-1)).clamp(min=1)),
            **both("{}_rewards", rewards),
            "confidence": confidence.to(policy.device),
            "beta": model.ref_policy_kl_penalty,
            **{name: model.cfg.dpo[name] for name in SETTINGS},
        }
    )
    implicit = both("{}", total(policy - reference, average_log_probs=average_log_probs))
    if losses.shape != implicit["chosen"].shape:
        # A single number would be averaged without an error, and micro-batches would then count wrongly.
        raise ConfigError(
            f"dpo.preference_loss={model.preference_loss!r}: it returned a tensor of shape {list(losses.shape)} for "
            f"{len(implicit['chosen'])} pairs. Return the loss of each pair, without a mean."
        )
    return losses.mean(0), (implicit["chosen"] > implicit["rejected"]).float().mean()
