"""The user's own preference loss, in the place of NeMo-Aligner's.

`dpo.preference_loss` is a name of NeMo-Aligner 0.7.0 (see `NAMES`) or `my.module:function`, a function like

    def loss(chosen, rejected, *, beta, chosen_rewards, rejected_rewards):
        return -torch.nn.functional.logsigmoid(beta * (chosen - rejected))        # this is DPO's

`chosen` and `rejected` are float32 tensors of shape [pairs]: log pi(response) - log pi_ref(response), summed over the
response's tokens. Gradients flow through both. `beta` is `dpo.beta`. `chosen_rewards` and `rejected_rewards` are
tensors of the same shape: the judge's mean scores. The function returns the loss of each pair, [pairs]; NeMo-Aligner
takes the mean. Every rank calls it for each of its micro-batches, so every node must be able to import the module.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from nemo_srl import registry
from nemo_srl.errors import ConfigError

NAMES = ("dpo", "ipo", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl")
"""What `MegatronGPTDPOModel.loss_func` of NeMo-Aligner 0.7.0 knows."""

Loss = Callable[..., Any]
_KEY = "dpo.preference_loss"


def find(name: str) -> Loss | None:
    """The user's function; None for a name of NeMo-Aligner. Raises `ConfigError` for what cannot be called so."""
    none: dict[str, Loss | None] = dict.fromkeys(NAMES)
    function = registry.named(none, name, key=_KEY)
    if function is None:
        return None
    try:
        inspect.signature(function).bind(0, 0, beta=0, chosen_rewards=0, rejected_rewards=0)
    except TypeError as error:
        raise ConfigError(
            f"{_KEY}={name!r}: this cannot be called as loss(chosen, rejected, beta=, chosen_rewards=, "
            f"rejected_rewards=): {error}. Give it these parameters."
        ) from None
    return function


def install(model: Any, loss: Loss) -> None:
    """Let `model`, a `MegatronGPTDPOModel`, compute `loss` where it would compute its own (its `loss_func`)."""

    def loss_func(policy: Any, reference: Any, labels: Any, rewards: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """Log-probabilities of tokens [2 x pairs, sequence], first of the chosen -> (loss, share of pairs in order)."""
        ratios = model.get_reduced_masked_logps(policy - reference, labels, *args, **kwargs)
        chosen, rejected = model.split_output_tensor(ratios)
        scores = dict(zip(("chosen_rewards", "rejected_rewards"), model.split_output_tensor(rewards), strict=True))
        losses = loss(chosen, rejected, beta=model.ref_policy_kl_penalty, **scores)
        if losses.shape != chosen.shape:
            # A single number would be averaged without an error, and micro-batches would then count wrongly.
            raise ConfigError(
                f"{_KEY}={model.preference_loss!r}: it returned a tensor of shape {list(losses.shape)} for "
                f"{len(chosen)} pairs. Return the loss of each pair, without a mean."
            )
        return losses.mean(0), (chosen > rejected).float().mean()

    model.loss_func = loss_func
