"""Preference losses equal values computed by hand and TRL's; the user's own takes the place of NeMo-Aligner's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_srl.config import DPOConfig
from nemo_srl.errors import ConfigError
from nemo_srl.trainers.nemo_aligner import losses, objectives

BETA = 0.3

LOG_PROBS = {
    "policy_chosen_logps": [-12.5, -40.0, -7.25], "policy_rejected_logps": [-15.0, -33.0, -9.5],
    "reference_chosen_logps": [-13.0, -42.0, -7.0], "reference_rejected_logps": [-14.0, -31.5, -9.0],
    "chosen": [0.5, 2.0, -0.25], "rejected": [-1.0, -1.5, -0.5],
    "chosen_lengths": [5.0, 16.0, 3.0], "rejected_lengths": [6.0, 11.0, 4.0], "confidence": [1.0, 1.0, 1.0],
}  # fmt: skip
"""Three pairs."""
TRL = {
    "dpo": ({"beta": 0.3}, [0.4932489459974549, 0.3000584796176432, 0.6563501408267951]),
    "cdpo": ({"beta": 0.3, "label_smoothing": 0.2}, [0.5832489459974549, 0.5100584796176433, 0.6713501408267951]),
    "ipo": ({"beta": 0.3}, [0.0277777777777778, 3.3611111111111107, 2.0069444444444446]),
    "dpo_norm": ({"beta": 5.0}, [0.23396252507754828, 0.23955214461937413, 0.5943960779478069]),
    "simpo": ({"beta": 2.0, "simpo_gamma": 1.2}, [1.4632824673380311, 0.7981388693815918, 1.527934653118804]),
}
"""What TRL 1.16.0 computes for `LOG_PROBS`, in float64, one pair at a time: `DPOTrainer._compute_loss` with the losses
sigmoid, ipo (with responses of one token, because TRL divides by the lengths) and sigmoid_norm; `CPOTrainer.cpo_loss`
with sigmoid and label smoothing (given the log-ratios) and with simpo (given log-probabilities per token)."""


def given(**settings: Any) -> dict[str, Any]:
    tensors = {name: torch.tensor(values, dtype=torch.float64) for name, values in LOG_PROBS.items()}
    return {"label_smoothing": 0.0, **tensors, **settings}


def found(name: str) -> losses.Loss:
    loss = losses.find(name)
    assert loss is not None
    return loss


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


@pytest.mark.parametrize("name", TRL)
def test_each_loss_equals_trls(name: str) -> None:
    settings, expected = TRL[name]
    assert found(name)(given(**settings)).tolist() == pytest.approx(expected, rel=1e-12)


BY_HAND: dict[str, tuple[dict[str, float], Callable[..., float]]] = {
    "dpo": ({"beta": BETA}, lambda x, **_: -log_sigmoid(BETA * x)),
    "cdpo": (
        {"beta": BETA, "label_smoothing": 0.1},
        lambda x, **_: -0.9 * log_sigmoid(BETA * x) - 0.1 * log_sigmoid(-BETA * x),
    ),
    "ipo": ({"beta": BETA}, lambda x, **_: (x - 1 / 0.6) ** 2),
    "dpo_norm": ({"beta": 5.0}, lambda w, lose, m, n, **_: -log_sigmoid(5 * (w / m - lose / n))),
    "rdpo": ({"beta": BETA, "rdpo_alpha": 0.05}, lambda x, m, n, **_: -log_sigmoid(BETA * x + 0.05 * (m - n))),
    "simpo": (
        {"beta": 2.0, "simpo_gamma": 1.2}, lambda pw, pl, m, n, **_: -log_sigmoid(2 * (pw / m - pl / n) - 1.2)
    ),
}  # fmt: skip
"""The papers' formulas for one pair: w and lose are log-ratios, x is their difference, pw and pl are log-probabilities,
m and n are lengths."""


@pytest.mark.parametrize("name", losses.LOSSES)
def test_each_loss_equals_its_papers_formula(name: str) -> None:
    settings, formula = BY_HAND[name]
    rows = zip(*(LOG_PROBS[key] for key in (
        "chosen", "rejected", "policy_chosen_logps", "policy_rejected_logps", "chosen_lengths", "rejected_lengths"
    )), strict=True)  # fmt: skip
    expected = [formula(w=w, lose=lo, x=w - lo, pw=pw, pl=pl, m=m, n=n) for w, lo, pw, pl, m, n in rows]
    assert found(name)(given(**settings)).tolist() == pytest.approx(expected, rel=1e-12)


def test_rdpo_learns_a_longer_chosen_response_less() -> None:
    """The first pair's chosen response is shorter than the other one, the second pair's is longer."""
    plain, regularized = found("dpo")(given(beta=BETA)), found("rdpo")(given(beta=BETA, rdpo_alpha=0.05))
    assert regularized[0] > plain[0]
    assert regularized[1] < plain[1]


@pytest.mark.parametrize(
    ("confidence", "label_smoothing", "p"), [(1, 0, 1), (0.7, 0, 0.7), (1, 0.1, 0.9), (0.7, 0.1, 0.66), (0.5, 0.1, 0.5)]
)
def test_cdpo_trusts_a_label_as_its_pair_and_label_smoothing_say(
    confidence: float, label_smoothing: float, p: float
) -> None:
    values = given(beta=BETA, label_smoothing=label_smoothing, confidence=torch.full((3,), confidence).double())
    expected = [
        -p * log_sigmoid(BETA * (w - lose)) - (1 - p) * log_sigmoid(-BETA * (w - lose))
        for w, lose in zip(LOG_PROBS["chosen"], LOG_PROBS["rejected"], strict=True)
    ]
    assert found("cdpo")(values).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", losses.LOSSES)
def test_losses_are_finite_for_any_margin(name: str) -> None:
    values = given(beta=1.0, simpo_gamma=0.5, rdpo_alpha=0.01)
    values |= {key: torch.tensor([-4000.0, 4000.0, 0.0]) for key in ("chosen", "policy_chosen_logps")}
    assert found(name)(values).isfinite().all()


def test_only_simpo_needs_no_reference_and_rewards_of_upstream_need_no_function() -> None:
    assert [name for name in losses.LOSSES if not found(name).needs_reference] == ["simpo"]
    assert [losses.find(name) for name in losses.UPSTREAM] == [None] * 3


@pytest.mark.parametrize(
    ("name", "takes"),
    [
        ("dpo", {"chosen", "rejected", "beta", "chosen_rewards", "rejected_rewards"}),
        ("mean_dpo", {"chosen", "rejected", "beta", "chosen_rewards", "rejected_rewards"}),
        ("other_names", {"chosen", "rejected", "beta"}),
        ("everything", losses.ARGUMENTS),
        ("unlikelihood", {"policy_rejected_logps", "rejected_lengths"}),
    ],
)
def test_a_users_function_gets_what_it_names(name: str, takes: set[str]) -> None:
    loss = found(f"tests.user_losses:{name}")
    assert {argument for argument in losses.ARGUMENTS if loss.takes(argument)} == takes
    values = given(**dict.fromkeys(losses.ARGUMENTS - LOG_PROBS.keys(), torch.ones(3)))
    loss(values)
    assert loss.needs_reference == ("chosen" in takes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"label_smoothing": 0.1},
            r"dpo.label_smoothing=0.1: dpo.preference_loss='dpo' does not.*=0.0, its default.*loss=cdpo,",
        ),
        ({"preference_loss": "ipo", "simpo_gamma": 1.0}, r"dpo.simpo_gamma=1.0: .*preference_loss=simpo,"),
        ({"preference_loss": "rpo_sq", "rdpo_alpha": 1.0}, r"dpo.rdpo_alpha=1.0: .*='rpo_sq' does not"),
        ({"preference_loss": "tests.user_losses:dpo", "rdpo_alpha": 1.0}, r"dpo.rdpo_alpha=1.0: .*user_losses:dpo' do"),
    ],
)
def test_a_setting_that_the_loss_would_ignore_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        losses.check(DPOConfig(**settings))
    losses.check(DPOConfig(preference_loss="cdpo", label_smoothing=0.1))
    losses.check(DPOConfig(preference_loss="tests.user_losses:everything", label_smoothing=0.1, rdpo_alpha=1.0))


class Model:
    """What `use_losses_of_pairs` needs of NeMo-Aligner's `MegatronGPTDPOModel`, for batches that are not packed."""

    ref_policy_kl_penalty = BETA
    preference_loss = "tests.user_losses:mean_dpo"
    cfg = SimpleNamespace(dpo={"label_smoothing": 0.0, "simpo_gamma": 0.5, "rdpo_alpha": 0.01})
    loss_func: Any = None
    gather_and_split_rewards: Any = None
    get_loss_and_metrics: Any = None

    def get_reduced_masked_logps(self, logps, labels, cu_seqlens=None, average_log_probs=False):  # type: ignore[no-untyped-def]
        total = (logps * (labels > -1)).sum(-1)
        return total / (labels > -1).sum(-1) if average_log_probs else total

    def split_output_tensor(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.split(x.float(), len(x) // 2)

    def get_forward_output_and_loss_func(self, validation_step: bool = False) -> Any:
        def forward(micro_batches: Iterator[dict[str, Any]], model: Any) -> Any:
            x = next(micro_batches)
            arguments = (x["reference"], x["labels"], x["rewards"], None)
            return x["policy"], lambda policy: self.loss_func(policy, *arguments, average_log_probs=False)

        return forward


def batch() -> dict[str, torch.Tensor]:
    """Two pairs of four tokens, of which the first belongs to the prompt."""
    torch.manual_seed(0)
    policy, reference = -torch.rand(4, 4), -torch.rand(4, 4)
    labels, rewards = torch.tensor([[-100, 1, 2, 3]] * 4), torch.tensor([4.0, 5.0, 1.0, 3.0])
    return {
        "policy": policy.requires_grad_(), "reference": reference, "labels": labels, "rewards": rewards,
        "confidence": torch.tensor([0.9, 0.6]), "sft_weight": torch.tensor([1.0, 5.0]),
        "compared": torch.tensor([True, True]),
    }  # fmt: skip


def computed(name: str, x: dict[str, torch.Tensor]) -> Any:
    """(loss, accuracy) of one micro-batch."""
    model = Model()
    objectives.use_losses_of_pairs(model, found(name))
    output, loss_func = model.get_forward_output_and_loss_func(False)(iter([x]), model)
    return loss_func(output)


def test_the_users_function_is_the_loss_and_its_gradient() -> None:
    x = batch()
    loss, accuracy = computed("tests.user_losses:dpo", x)
    loss.backward()
    copy = x["policy"].detach().clone().requires_grad_()
    ratios = (copy - x["reference"])[:, 1:].sum(-1)
    margin = ratios[:2] - ratios[2:]
    expected = -torch.nn.functional.logsigmoid(BETA * margin).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item())
    torch.testing.assert_close(x["policy"].grad, copy.grad)
    assert accuracy.item() == (margin > 0).float().mean().item()


def test_scores_confidence_and_lengths_come_in_the_order_of_the_pairs() -> None:
    x = batch()
    x["labels"][3, 3] = -100  # the second pair's rejected response has two tokens
    loss, _ = computed("tests.user_losses:rpo_sq", {**x, "policy": x["reference"]})
    assert loss.item() == pytest.approx(((4 - 1) ** 2 + (5 - 3) ** 2) / 2)
    loss, _ = computed("tests.user_losses:weighed_lengths", x)
    assert loss.item() == pytest.approx((0.9 * (3 + 10 * 3) + 0.6 * (3 + 10 * 2)) / 2)


def test_a_loss_that_is_a_mean_already_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mean_dpo.*shape \[\] for 2 pairs. Return the loss of each pair"):
        computed("tests.user_losses:mean_dpo", batch())
