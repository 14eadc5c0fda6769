"""Settings of the trainer and of what it trains: SFT, DPO, the refresh of the judge."""

from __future__ import annotations

from dataclasses import dataclass

from omegaconf import MISSING

from nemo_srl.config.check import check


@dataclass
class OptimConfig:
    learning_rate: float = MISSING
    """Peak, reached after the warm-up."""
    min_learning_rate: float = MISSING
    """End of the cosine, reached at the last step."""
    warmup_fraction: float = 0.0
    """Share of all steps that warm up; the schedule is computed from the real number of steps."""
    global_batch_size: int = 16
    max_epochs: int = 1
    weight_decay: float = 0.0
    gradient_clip_val: float = 1.0
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    max_seq_length: int = 1024
    """Tokens of prompt + response; longer rows are dropped and counted."""
    save_interval: int = 200
    """Steps between checkpoints from which a killed training goes on."""

    def __post_init__(self) -> None:
        name = type(self).__name__.removesuffix("Config").lower()
        for key in ("global_batch_size", "max_epochs", "max_seq_length", "save_interval"):
            value = getattr(self, key)
            check(value >= 1, f"{name}.{key}", value, "must be at least 1")
        check(
            0 <= self.warmup_fraction < 1,
            f"{name}.warmup_fraction",
            self.warmup_fraction,
            "must be in [0, 1)",
        )
        for key in ("hidden_dropout", "attention_dropout"):
            check(0 <= getattr(self, key) < 1, f"{name}.{key}", getattr(self, key), "must be in [0, 1)")
        if self.learning_rate != MISSING:
            check(self.learning_rate > 0, f"{name}.learning_rate", self.learning_rate, "must be above 0")
            check(
                0 <= self.min_learning_rate <= self.learning_rate,
                f"{name}.min_learning_rate",
                self.min_learning_rate,
                f"must be between 0 and learning_rate={self.learning_rate}",
            )


@dataclass
class SFTConfig(OptimConfig):
    """M1: supervised fine-tuning on IFT + EFT (paper section 3.1.1: 5.5e-6 to 1.1e-6, batch 16)."""

    learning_rate: float = 5.5e-6
    min_learning_rate: float = 1.1e-6


@dataclass
class DPOConfig(OptimConfig):
    """M_{t+1}: DPO from M_t, which is also the reference (paper: 1e-6 to 1e-7, batch 16, beta 0.1)."""

    learning_rate: float = 1e-6
    min_learning_rate: float = 1e-7
    beta: float = 0.1
    """NeMo-Aligner's `ref_policy_kl_penalty`."""
    preference_loss: str = "dpo"
    """dpo, ipo, rpo_sq, rpo_bwd_kl or rpo_fwd_kl: NeMo-Aligner's losses by its names."""
    sft_loss_weight: float = 0.0
    """Weight of the negative log-likelihood of the chosen response (Iterative RPO)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.beta > 0, "dpo.beta", self.beta, "must be above 0")
        known = ("dpo", "ipo", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl")
        check(
            self.preference_loss in known,
            "dpo.preference_loss",
            self.preference_loss,
            f"must be one of {known}",
        )


@dataclass
class RefreshConfig(OptimConfig):
    """After DPO, teach the judge again: the paper's EFT filter (section 3.1.1), which the paper runs once before
    the loop, runs on `data.rankings_path` with the newest judge, and SFT goes on from M_{t+1} on the EFT seed, the
    kept verdicts of all iterations, and answers of M_{t+1}'s own, so that it does not forget how it answers."""

    learning_rate: float = 5.5e-6
    min_learning_rate: float = 1.1e-6
    num_judgements: int = 7
    """Verdicts per ranked answer, from which one that agrees with the ranking is looked for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_judgements >= 1, "refresh.num_judgements", self.num_judgements, "must be at least 1")


@dataclass
class TrainerConfig:
    name: str = "nemo_aligner"
    precision: str = "bf16"
    """bf16: products in bfloat16 over float32 weights (NeMo's autocast); bf16-O2: Megatron's bfloat16
    weights with float32 masters in the distributed optimizer; 32: float32 throughout."""
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    sequence_parallel: bool = False
    micro_batch_size: int = 1
    num_nodes: int = 1
    devices: int | None = None
    """Ranks per node; null: just enough for one model replica (tensor x pipeline / num_nodes)."""

    def __post_init__(self) -> None:
        for key in (
            "tensor_model_parallel_size",
            "pipeline_model_parallel_size",
            "micro_batch_size",
            "num_nodes",
        ):
            check(getattr(self, key) >= 1, f"trainer.{key}", getattr(self, key), "must be at least 1")
        known = ("bf16", "bf16-O2", "32")
        check(self.precision in known, "trainer.precision", self.precision, f"must be one of {known}")
        model_parallel = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        check(
            self.world_size % model_parallel == 0,
            "trainer.devices",
            self.devices,
            f"num_nodes x devices = {self.world_size} ranks must be a multiple of tensor x pipeline = {model_parallel}",
        )

    @property
    def num_ranks_per_node(self) -> int:
        if self.devices is not None:
            return self.devices
        return max(1, self.tensor_model_parallel_size * self.pipeline_model_parallel_size // self.num_nodes)

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.num_ranks_per_node

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // (self.tensor_model_parallel_size * self.pipeline_model_parallel_size)
