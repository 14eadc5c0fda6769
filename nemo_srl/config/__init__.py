"""The typed schema of `conf/`: every setting, its default and its meaning, each in this one place.

Sections either decide results (`model data sft prompts candidates judge pairs dpo evaluation seed`, the
fields of `trainer` that are listed in the stages' `settings`, and `EngineConfig.decisive`) and are then part of
an artifact's identity, or they only place work (`launcher`, `cluster`, parallel sizes, batch limits) and may change
between runs of one run directory. Bad values raise `ConfigError` when the configuration is composed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from nemo_srl import registry
from nemo_srl.config.check import check
from nemo_srl.config.data import DataConfig, ModelConfig
from nemo_srl.config.engine import EngineConfig, TrtllmConfig
from nemo_srl.config.evidence import AnchorConfig, EvaluationConfig, TrackingConfig
from nemo_srl.config.generation import CandidatesConfig, JudgeConfig, PairsConfig, PromptsConfig, SamplingConfig
from nemo_srl.config.placement import ClusterConfig, LauncherConfig, ResourcesConfig
from nemo_srl.config.training import DPOConfig, OptimConfig, RefreshConfig, SFTConfig, TrainerSettings

__all__ = [
    "AnchorConfig",
    "CandidatesConfig",
    "ClusterConfig",
    "Config",
    "DPOConfig",
    "DataConfig",
    "EngineConfig",
    "EvaluationConfig",
    "JudgeConfig",
    "LauncherConfig",
    "ModelConfig",
    "OptimConfig",
    "PairsConfig",
    "PromptsConfig",
    "RefreshConfig",
    "ResourcesConfig",
    "Role",
    "SFTConfig",
    "SamplingConfig",
    "TrackingConfig",
    "TrainerSettings",
    "TrtllmConfig",
]

Role = Literal["prompts", "candidates", "judge"]
"""What a model is asked for; each may have an engine of its own."""


@dataclass
class Config:
    run_dir: str = MISSING
    """Where every artifact, log and the report go. Running again with the same one goes on."""
    seed: int = 1234
    num_iterations: int = 2
    """Self-rewarding iterations T; the models are M1 .. M_{T+1}."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    candidates: CandidatesConfig = field(default_factory=CandidatesConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    pairs: PairsConfig = field(default_factory=PairsConfig)
    dpo: DPOConfig = field(default_factory=DPOConfig)
    refresh: RefreshConfig = field(default_factory=RefreshConfig)
    anchor: AnchorConfig = field(default_factory=AnchorConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    trainer: Any = field(default_factory=lambda: registry.load("trainers", "nemo_aligner").settings())
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        check(self.seed >= 1, "seed", self.seed, "must be 1 or above (NeMo takes no other)")
        check(self.num_iterations >= 0, "num_iterations", self.num_iterations, "must be 0 (SFT only) or above")

    def engine_for(self, role: Role) -> EngineConfig:
        """The engine that generates prompts, candidates or verdicts."""
        override = {"prompts": self.prompts.engine, "candidates": None, "judge": self.judge.engine}[role]
        return override or self.engine
