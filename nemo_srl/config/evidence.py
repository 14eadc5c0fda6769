"""What is measured of a run, and where its figures go."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_srl.config.check import check


@dataclass
class EvaluationConfig:
    """Every model answers and judges the held-out instructions of `data.eft_eval_path`, sampled as in
    `candidates` and `judge`, so that models are compared on the same ground."""

    num_prompts: int = 541
    """Held-out instructions at most (the paper has 541)."""
    num_bootstrap: int = 1000
    """Resamples behind each confidence interval."""

    def __post_init__(self) -> None:
        check(self.num_prompts >= 1, "evaluation.num_prompts", self.num_prompts, "must be at least 1")


@dataclass
class AnchorConfig:
    """A judge that the loop never changes looks at every iteration: what the alarms for reward hacking compare with."""

    num_prompts: int = 100
    """Prompts of the iteration whose candidates the anchor judges, too; 0 turns the stage and its alarms off."""
    model: str = ""
    """Another judge as the anchor, like `model.path`: M1 of a run with another seed and other EFT data, or a larger
    model. Empty string: M1, which costs nothing and sees drift and noise, but is fooled by whatever fools M_t."""

    def __post_init__(self) -> None:
        check(self.num_prompts >= 0, "anchor.num_prompts", self.num_prompts, "must be 0 (off) or above")


@dataclass
class TrackingConfig:
    """Where the run's figures go beside its report, after each iteration (`nemo_srl/tracking.py`)."""

    tensorboard: bool = True
    """Event files in `<run_dir>/tensorboard`."""
    wandb_project: str = ""
    """Weights & Biases; needs its package and key (or WANDB_MODE=offline). Empty string: off."""
