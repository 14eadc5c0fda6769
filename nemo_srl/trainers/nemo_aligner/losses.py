"""Preference losses: the loss of a pair as a function of log-probabilities. `dpo.preference_loss` names one.

The names are those of `LOSSES`, those of `UPSTREAM`, which NeMo-Aligner computes by itself, and `my.module:function`,
a function of your own, like

    def hinge(chosen, rejected, *, beta):
        return torch.relu(1 - beta * (chosen - rejected))

A loss gets the arguments that its parameters name. Tensors are float32 of shape [pairs], and log-probabilities are
summed over the tokens of the response, with its end-of-sequence token:

    chosen, rejected                                    log pi(response) - log pi_ref(response)
    policy_chosen_logps, policy_rejected_logps          log pi(response)
    reference_chosen_logps, reference_rejected_logps    log pi_ref(response)
    chosen_lengths, rejected_lengths                    numbers of these tokens
    chosen_rewards, rejected_rewards                    the judge's mean scores
    confidence                                          the probability that the chosen response is the better one
    beta, label_smoothing, simpo_gamma, rdpo_alpha      the settings of `dpo`, numbers

The first two may have any name; then they are `chosen` and `rejected`. Gradients flow through log pi. The function
returns the loss of each pair, [pairs]; NeMo-Aligner takes the mean. Every rank calls it for each of its micro-batches,
so every node must be able to import the module. The reference is not computed for a loss that takes nothing of it.

`dpo.sft_loss_weight` adds the chosen response's negative log-likelihood per token to any loss.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_srl import registry
from nemo_srl.config.training import DPOConfig
from nemo_srl.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

UPSTREAM = ("rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl")
"""Reward-aware losses of NeMo-Aligner 0.7.0 (`MegatronGPTDPOModel.loss_func`). The rewards are the judge's scores."""
LENGTH_NORMALIZED = ("dpo_norm", "simpo")
"""Losses whose implicit rewards are per token. They are logged so."""
SETTINGS = ("label_smoothing", "simpo_gamma", "rdpo_alpha")
"""Settings of `dpo` that only some losses use."""


def dpo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Rafailov et al. 2023, arXiv 2305.18290, equation 7."""
    return -_log_sigmoid(beta * (chosen - rejected))


def cdpo(chosen: Tensor, rejected: Tensor, *, beta: float, confidence: Tensor, label_smoothing: float) -> Tensor:
    """Conservative DPO (Mitchell 2023): the chosen response is the better one with probability p only.

    The pair's own confidence c is 1 unless its row has another. Then each label is wrong with the probability e, which
    is `label_smoothing`: p = c (1 - e) + (1 - c) e. So p is c without smoothing, and 1 - e for a sure pair.
    """
    p = confidence * (1 - label_smoothing) + (1 - confidence) * label_smoothing
    margin = beta * (chosen - rejected)
    return -p * _log_sigmoid(margin) - (1 - p) * _log_sigmoid(-margin)


def ipo(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Azar et al. 2023, arXiv 2310.12036, equation 17; `beta` is tau there. Not divided by the lengths."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def dpo_norm(
    chosen: Tensor, rejected: Tensor, *, beta: float, chosen_lengths: Tensor, rejected_lengths: Tensor
) -> Tensor:
    """DPO with log-ratios per token (Lambert et al. 2024, arXiv 2411.15124). `beta` is 5 there."""
    return -_log_sigmoid(beta * (chosen / chosen_lengths - rejected / rejected_lengths))


def rdpo(
    chosen: Tensor, rejected: Tensor, *, beta: float, chosen_lengths: Tensor, rejected_lengths: Tensor,
    rdpo_alpha: float,
) -> Tensor:  # fmt: skip
    """DPO for a reward that falls by `rdpo_alpha` per token (Park et al. 2024, arXiv 2403.19159, R-DPO).

    A chosen response that is longer has the greater margin from the start, so it is learned less.
    """
    return -_log_sigmoid(beta * (chosen - rejected) + rdpo_alpha * (chosen_lengths - rejected_lengths))


def simpo(
    policy_chosen_logps: Tensor, policy_rejected_logps: Tensor, *, beta: float, chosen_lengths: Tensor,
    rejected_lengths: Tensor, simpo_gamma: float,
) -> Tensor:  # fmt: skip
    """Meng et al. 2024, arXiv 2405.14734: log-probabilities per token, a margin, and no reference."""
    margin = policy_chosen_logps / chosen_lengths - policy_rejected_logps / rejected_lengths
    return -_log_sigmoid(beta * margin - simpo_gamma)


def _log_sigmoid(x: Tensor) -> Tensor:
    from torch.nn.functional import logsigmoid  # planning needs the names above, and no torch

    return logsigmoid(x)


LOSSES: Mapping[str, Callable[..., Any]] = {f.__name__: f for f in (dpo, cdpo, ipo, dpo_norm, rdpo, simpo)}

_OF_THE_REFERENCE = {"chosen", "rejected", "reference_chosen_logps", "reference_rejected_logps"}
ARGUMENTS = {
    *_OF_THE_REFERENCE, "policy_chosen_logps", "policy_rejected_logps", "chosen_lengths", "rejected_lengths",
    "chosen_rewards", "rejected_rewards", "confidence", "beta", *SETTINGS,
}  # fmt: skip
"""What a loss can take."""
_KEY = "dpo.preference_loss"


@dataclass(frozen=True)
class Loss:
    """A preference loss, and the names of the arguments that it takes."""

    function: Callable[..., Any]
    positional: tuple[str, ...]
    keywords: tuple[str, ...]

    def __call__(self, given: Mapping[str, Any]) -> Any:
        """The losses of the pairs, from all of `ARGUMENTS`."""
        return self.function(
            *(given[name] for name in self.positional), **{name: given[name] for name in self.keywords}
        )

    def takes(self, name: str) -> bool:
        return name in self.positional or name in self.keywords

    @property
    def needs_reference(self) -> bool:
        return any(map(self.takes, _OF_THE_REFERENCE))


def find(name: str) -> Loss | None:
    """The loss with this name; None for one of `UPSTREAM`. Raises `ConfigError` for what cannot be called so."""
    function = registry.named({**LOSSES, **dict.fromkeys(UPSTREAM)}, name, key=_KEY)
    if function is None:
        return None
    try:
        return _loss(function)
    except (TypeError, ValueError) as error:  # ValueError: a function of C, which has no signature
        raise ConfigError(
            f"{_KEY}={name!r}: this cannot be called as a loss: {error}. Its parameters must be named as these: "
            f"{', '.join(sorted(ARGUMENTS))}."
        ) from None


def _loss(function: Callable[..., Any]) -> Loss:
    """Read the signature. Raises `TypeError` for a parameter that is not known and has no default."""
    signature = inspect.signature(function)
    parameters = signature.parameters.values()
    by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    positional = tuple(by_position[:2])
    if not ARGUMENTS.issuperset(positional):
        positional = ("chosen", "rejected")
    others = [*by_position[2:], *(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)]
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        others += ["beta", "chosen_rewards", "rejected_rewards"]  # a function that takes anything gets these
    keywords = tuple(name for name in dict.fromkeys(others) if name in ARGUMENTS)
    signature.bind(*positional, **dict.fromkeys(keywords))
    return Loss(function, positional, keywords)


def check(optim: DPOConfig) -> None:
    """Raise `ConfigError` for an unknown loss, and for a setting that this loss would ignore."""
    loss = find(optim.preference_loss)
    for name in SETTINGS:
        value, default = getattr(optim, name), getattr(DPOConfig, name)
        if value != default and not (loss and loss.takes(name)):
            users = " or ".join(other for other, function in LOSSES.items() if _loss(function).takes(name))
            raise ConfigError(
                f"dpo.{name}={value}: {_KEY}={optim.preference_loss!r} does not use it. Set dpo.{name}={default}, its "
                f"default, or {_KEY}={users}, which uses it."
            )


def uses_confidence(optim: DPOConfig) -> bool:
    """Whether the loss takes the confidence in a pair. Raises `ConfigError` for an unknown loss."""
    loss = find(optim.preference_loss)
    return loss is not None and loss.takes("confidence")
