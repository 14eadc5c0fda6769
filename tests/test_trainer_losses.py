"""A user's preference loss takes the place of NeMo-Aligner's, on a stand-in for its model."""

from __future__ import annotations

import pytest
import torch

from nemo_srl.errors import ConfigError
from nemo_srl.trainers.nemo_aligner import losses

BETA = 0.3


class Model:
    """What `losses.install` uses of NeMo-Aligner's `MegatronGPTDPOModel`, for batches that are not packed."""

    ref_policy_kl_penalty = BETA
    preference_loss = "tests.user_losses:mean_dpo"

    def get_reduced_masked_logps(self, logps, labels, cu_seqlens=None, average_log_probs=False):  # type: ignore[no-untyped-def]
        return (logps * (labels > -1)).sum(-1)

    def split_output_tensor(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.split(x.float(), len(x) // 2)


def installed(name: str) -> Model:
    model, loss = Model(), losses.find(name)
    assert loss is not None
    losses.install(model, loss)
    return model


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two pairs of four tokens, of which the first belongs to the prompt."""
    torch.manual_seed(0)
    policy, reference = -torch.rand(4, 4), -torch.rand(4, 4)
    labels = torch.tensor([[-100, 1, 2, 3]] * 4)
    return policy.requires_grad_(), reference, labels, torch.tensor([4.0, 5.0, 1.0, 3.0])


def test_names_of_nemo_aligner_need_no_function() -> None:
    assert [losses.find(name) for name in losses.NAMES] == [None] * 5


def test_the_users_function_is_the_loss_and_its_gradient() -> None:
    policy, reference, labels, rewards = batch()
    loss, accuracy = installed("tests.user_losses:dpo").loss_func(policy, reference, labels, rewards)  # type: ignore[attr-defined]
    loss.backward()
    copy = policy.detach().clone().requires_grad_()
    ratios = (copy - reference)[:, 1:].sum(-1)
    margin = ratios[:2] - ratios[2:]
    expected = -torch.nn.functional.logsigmoid(BETA * margin).mean()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item())
    torch.testing.assert_close(policy.grad, copy.grad)
    assert accuracy.item() == (margin > 0).float().mean().item()


def test_the_judges_scores_come_in_the_order_of_the_pairs() -> None:
    policy, _, labels, rewards = batch()
    loss, _ = installed("tests.user_losses:rpo_sq").loss_func(policy, policy.detach(), labels, rewards)  # type: ignore[attr-defined]
    assert loss.item() == pytest.approx(((4 - 1) ** 2 + (5 - 3) ** 2) / 2)


def test_a_loss_that_is_a_mean_already_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"mean_dpo.*shape \[\] for 2 pairs. Return the loss of each pair"):
        installed("tests.user_losses:mean_dpo").loss_func(*batch())  # type: ignore[attr-defined]
