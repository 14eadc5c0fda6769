"""What is measured in a run, and where the figures go."""

from __future__ import annotations

from dataclasses import dataclass, field

from nemo_srl.config.check import check
from nemo_srl.config.generation import AN_INPUT, check_model_name


@dataclass
class EvaluationConfig:
    """Every model answers and judges the same held-out instructions of `data.eft_eval_path`, with the sampling
    settings of `candidates` and `judge`. So models can be compared."""

    num_prompts: int = 541
    """The highest number of held-out instructions (the paper has 541)."""

    def __post_init__(self) -> None:
        check(self.num_prompts >= 1, "evaluation.num_prompts", self.num_prompts, "must be at least 1")


@dataclass
class EarlyStoppingConfig:
    """Compares the checkpoints of each DPO training on validation prompts, and takes the last one that is better than
    the one before (`nemo_srl/early_stopping.py`). The comparison needs `judge.pairwise_rubric` (`+judge_mode=pairwise`
    sets it, or set it alone). Off by default."""

    prompts_path: str = ""
    """Validation prompts: rows that recipes/evaluate.py takes as questions. Nothing may train on them. The paper has
    253. Empty string: no early stopping. M_{t+1} is the model after the last step."""
    model: str = field(default="", metadata=AN_INPUT)
    """The judge of the comparisons: m1, previous, or a model, written like `model.path`. Empty string: M_t. With
    `judge.engine`, the server judges, as in the paper."""

    def __post_init__(self) -> None:
        check_model_name("early_stopping.model", self.model)


@dataclass
class AnchorConfig:
    """A judge that the loop never changes. The alarms for reward hacking compare M_t's scores with its scores."""

    num_prompts: int = 100
    """Prompts of each iteration whose candidates the anchor judges. 0 turns the stage and its alarms off."""
    model: str = ""
    """Another model as the anchor, like `model.path`: M1 of a run with another seed and other EFT data, or a larger
    model. Empty string: M1. It costs nothing and shows drift and noise, but answers that fool M_t fool M1, too."""

    def __post_init__(self) -> None:
        check(self.num_prompts >= 0, "anchor.num_prompts", self.num_prompts, "must be 0 (off) or above")


@dataclass
class TrackingConfig:
    """Where the run's figures go after each iteration, beside its report (`nemo_srl/report/tracking.py`)."""

    tensorboard: bool = True
    """Event files in `<run_dir>/tensorboard`."""
    wandb_project: str = ""
    """A project of Weights & Biases. It needs the package and a key (or WANDB_MODE=offline). Empty string: off."""
