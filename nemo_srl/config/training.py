"""Settings of the trainings: SFT, DPO and the refresh of the judge.

The settings of a trainer are in its folder, `nemo_srl/trainers/<name>/`. `TrainerSettings` says what all of them have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from omegaconf import MISSING

from nemo_srl.config.check import check


class TrainerSettings(Protocol):
    """What the settings of every trainer tell launchers and plans."""

    name: str
    num_nodes: int

    @property
    def num_ranks_per_node(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def data_parallel_size(self) -> int: ...
    def pipeline_efficiency(self, optim: OptimConfig) -> float:
        """The share of the time in which no rank waits for another pipeline stage, in (0, 1]."""


@dataclass
class OptimConfig:
    learning_rate: float = MISSING
    """The highest learning rate, reached after the warm-up."""
    min_learning_rate: float = MISSING
    """The learning rate at the end of the cosine schedule, reached at the last step."""
    warmup_fraction: float = 0.0
    """Share of all steps that warm up. The schedule uses the real number of steps."""
    global_batch_size: int = 16
    max_epochs: int = 1
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    """How much Adam's mean of the gradients keeps at each step."""
    adam_beta2: float = 0.98
    """How much Adam's mean of their squares keeps at each step. Llama was trained with 0.95."""
    gradient_clip_val: float = 1.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    max_seq_length: int = 1024
    """Tokens of prompt and response together. Longer rows are dropped and counted."""
    rows_together: int = 1
    """Rows that share at least half of their tokens stay together when rows are shuffled, this many at most. So a step
    has the common tokens once, where the platform can (cpu), and compares answers to one instruction. 1: every row is
    shuffled by itself."""
    save_interval: int = 200
    """Steps between two checkpoints. A killed training continues from the last one."""

    @property
    def section(self) -> str:
        """The section of the configuration: sft, dpo or refresh."""
        return type(self).__name__.removesuffix("Config").lower()

    def __post_init__(self) -> None:
        name = self.section
        for key in ("global_batch_size", "max_epochs", "max_seq_length", "rows_together", "save_interval"):
            check(getattr(self, key) >= 1, f"{name}.{key}", getattr(self, key), "must be at least 1")
        check(0 <= self.warmup_fraction < 1, f"{name}.warmup_fraction", self.warmup_fraction, "must be in [0, 1)")
        for key in ("adam_beta1", "adam_beta2", "hidden_dropout", "attention_dropout"):
            check(0 <= getattr(self, key) < 1, f"{name}.{key}", getattr(self, key), "must be in [0, 1)")
        if self.learning_rate != MISSING:
            check(self.learning_rate > 0, f"{name}.learning_rate", self.learning_rate, "must be above 0")
            reason = f"must be between 0 and learning_rate={self.learning_rate}"
            fits = 0 <= self.min_learning_rate <= self.learning_rate
            check(fits, f"{name}.min_learning_rate", self.min_learning_rate, reason)


@dataclass
class SFTConfig(OptimConfig):
    """M1: supervised fine-tuning on IFT + EFT (paper section 3.1.1: 5.5e-6 to 1.1e-6, batch 16)."""

    learning_rate: float = 5.5e-6
    min_learning_rate: float = 1.1e-6
    verdict_weight: float = 1.0
    """How much a token of a verdict (EFT) counts, where a token of an answer (IFT) counts 1. A verdict that is the
    score alone has few tokens, so it needs more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.verdict_weight > 0, "sft.verdict_weight", self.verdict_weight, "must be above 0")


@dataclass
class DPOConfig(OptimConfig):
    """M_{t+1}: DPO from M_t, which is also the reference (paper: 1e-6 to 1e-7, batch 16, beta 0.1)."""

    learning_rate: float = 1e-6
    min_learning_rate: float = 1e-7
    beta: float = 0.1
    """NeMo-Aligner's `ref_policy_kl_penalty`. Losses that average over tokens need more: dpo_norm about 5, simpo 2
    to 2.5 (their papers)."""
    preference_loss: str = "dpo"
    """dpo, cdpo, ipo, dpo_norm (log-ratios per token), rdpo (length-regularized) or simpo (per token, without a
    reference); rpo_sq, rpo_bwd_kl or rpo_fwd_kl of NeMo-Aligner. Or your own function, my.module:function. Formulas and
    sources are in `nemo_srl/trainers/nemo_aligner/losses.py`."""
    label_smoothing: float = 0.0
    """cdpo: the probability that a pair has its answers in the wrong order."""
    simpo_gamma: float = 0.5
    """simpo: the margin that is wanted between the rewards of the two answers. The paper has 0.3 to 1.6."""
    rdpo_alpha: float = 0.01
    """rdpo: how much a token costs, in units of the reward."""
    sft_loss_weight: float = 0.0
    """Weight of the negative log-likelihood of the chosen response, averaged over its tokens (Iterative RPO, Pang et
    al. 2024, arXiv 2404.19733; 1 there)."""
    verdict_weight: float = 1.0
    """How much a pair of verdicts counts in that mean, as in `sft`. Of the tokens of a verdict that is a score alone,
    about one in five says anything."""
    compare_verdicts: bool = True
    """Whether pairs of verdicts count in the preference loss. If not, they teach by the likelihood of the chosen
    verdict alone. Then the reference's log-probabilities of them are not computed, which saves time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.verdict_weight > 0, "dpo.verdict_weight", self.verdict_weight, "must be above 0")
        check(self.beta > 0, "dpo.beta", self.beta, "must be above 0")
        smoothing = self.label_smoothing
        check(0 <= smoothing < 0.5, "dpo.label_smoothing", smoothing, "must be in [0, 0.5)")
        for key in ("simpo_gamma", "rdpo_alpha"):
            check(getattr(self, key) >= 0, f"dpo.{key}", getattr(self, key), "must be at least 0")


@dataclass
class RefreshConfig(OptimConfig):
    """After DPO, SFT teaches the judge again.

    The paper filters EFT verdicts once, before the loop (section 3.1.1). Here the newest judge runs that filter on
    `data.rankings_path` in every iteration. SFT then starts from M_{t+1}. Its rows are the EFT seed, the kept
    verdicts of all iterations, and M_{t+1}'s own answers, so that it does not forget how to answer.
    """

    learning_rate: float = 5.5e-6
    min_learning_rate: float = 1.1e-6
    num_judgements: int = 7
    """Verdicts per ranked answer. One that agrees with the ranking is kept."""
    verdict_weight: float = 1.0
    """As in `sft`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.verdict_weight > 0, "refresh.verdict_weight", self.verdict_weight, "must be above 0")
        check(self.num_judgements >= 1, "refresh.num_judgements", self.num_judgements, "must be at least 1")
