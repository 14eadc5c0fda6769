"""The typed schema of `conf/`: every setting, with its default and its meaning.

A setting either decides results or places work. Settings that decide results (`model data sft prompts candidates judge
pairs verdict_pairs dpo evaluation seed`, and those that a backend names as `decisive`) are part of an artifact's
identity. Settings that place work (`launcher`, `cluster`, parallel sizes, batch limits) may change between two starts
of a run directory.

`engine`, `trainer` and `launcher` hold the settings of the backend that their `name` says. The folder of the backend
defines them, such as `nemo_srl/engines/embedded/`. Bad values raise `ConfigError` when the configuration is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from nemo_srl.config.check import check
from nemo_srl.config.data import DataConfig, ModelConfig
from nemo_srl.config.evidence import AnchorConfig, EarlyStoppingConfig, EvaluationConfig, TrackingConfig
from nemo_srl.config.generation import (  # fmt: skip
    CandidatesConfig,
    JudgeConfig,
    PairsConfig,
    PromptsConfig,
    SamplingConfig,
    VerdictPairsConfig,
)
from nemo_srl.config.load import BACKENDS, default_settings, load
from nemo_srl.config.placement import ClusterConfig, ResourcesConfig
from nemo_srl.config.training import DPOConfig, OptimConfig, RefreshConfig, SFTConfig, TrainerSettings

__all__ = [
    "BACKENDS", "AnchorConfig", "CandidatesConfig", "ClusterConfig", "Config", "DPOConfig", "DataConfig",
    "EarlyStoppingConfig", "EvaluationConfig", "JudgeConfig", "ModelConfig", "OptimConfig", "PairsConfig",
    "PromptsConfig", "RefreshConfig", "ResourcesConfig", "Role", "SFTConfig", "SamplingConfig", "TrackingConfig",
    "TrainerSettings", "VerdictPairsConfig", "load",
]  # fmt: skip

Role = Literal["prompts", "candidates", "judge"]
"""The tasks of models. Each may have its own engine."""


@dataclass
class Config:
    run_dir: str = MISSING
    """The directory of all artifacts, logs and the report. A start with the same directory continues the run."""
    seed: int = 1234
    num_iterations: int = 2
    """Self-rewarding iterations T; the models are M1 .. M_{T+1}."""
    max_unanswered_share: float = 0.2
    """The share of a stage's model calls that may get no answer: refused or filtered by the server, too long for the
    context, or malformed. Such calls are left out and counted. Above it the stage stops and shows the first reasons. A
    single request without an answer stops no stage, unless this is 0. It decides no result and may be changed at any
    start."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    candidates: CandidatesConfig = field(default_factory=CandidatesConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    verdict_pairs: VerdictPairsConfig = field(default_factory=VerdictPairsConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    early_stopping: EarlyStoppingConfig = field(default_factory=EarlyStoppingConfig)
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    engine: Any = field(default_factory=lambda: default_settings("engine"))
    """The settings of a backend of `nemo_srl/engines/`, which generates prompts, candidates and verdicts."""
    trainer: Any = field(default_factory=lambda: default_settings("trainer"))
    """The settings of a backend of `nemo_srl/trainers/`."""
    launcher: Any = field(default_factory=lambda: default_settings("launcher"))
    """The settings of a backend of `nemo_srl/launchers/`, which decides where the stages run."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    assume: dict[str, float] = field(default_factory=dict)
    """What `recipes/plan.py` assumes of the hardware and the data, by the names in `nemo_srl/workload.py`. No run reads
    it."""

    def __post_init__(self) -> None:
        check(self.seed >= 1, "seed", self.seed, "must be 1 or above (NeMo needs it)")
        share = self.max_unanswered_share
        check(0 <= share <= 1, "max_unanswered_share", share, "must be a share, from 0 to 1")
        check(self.num_iterations >= 0, "num_iterations", self.num_iterations, "must be 0 (SFT only) or above")

    def engine_for(self, role: Role) -> Any:
        """The settings of the engine that generates prompts, candidates or verdicts."""
        override = {"prompts": self.prompts.engine, "candidates": None, "judge": self.judge.engine}[role]
        return override or self.engine
