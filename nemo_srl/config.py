"""The typed schema of `conf/`: every setting, its default and its meaning, each in this one place.

Sections either decide results (`model data sft prompts candidates judge pairs dpo evaluation seed`, and
the fields of `engine` and `trainer` that are listed in the stages' `settings`) and are then part of an
artifact's identity, or they only place work (`launcher`, parallel sizes, batch limits) and may change
between runs of one run directory. Bad values raise `ConfigError` when the configuration is composed.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from nemo_srl.errors import ConfigError


def _check(ok: bool, key: str, value: object, reason: str) -> None:
    if not ok:
        raise ConfigError(f"{key}={value!r}: {reason}")


@dataclass
class ModelConfig:
    path: str = "smollm2-135m-instruct"
    """M0: a Hugging Face Llama directory, or the name of a model that this package can fetch."""
    cache_dir: str = "~/.cache/nemo_srl"
    """Where fetched models are kept between runs. Placement: not part of any identity."""
    chat_template: str | None = None
    """Jinja2 chat template; null takes the tokenizer's own. A base model without one needs this."""


@dataclass
class DataConfig:
    ift_path: str = "data/seed/ift.jsonl"
    """Instruction fine-tuning seed (JSONL of IFTExample); relative paths start at the project root."""
    eft_path: str = "data/seed/eft.jsonl"
    """Evaluation fine-tuning seed (JSONL of EFTExample). Empty string: train without (an ablation)."""
    eft_eval_path: str = "data/seed/eft_eval.jsonl"
    """Held-out EFT examples, several answers to one instruction, for the reward-model metrics."""


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
            _check(value >= 1, f"{name}.{key}", value, "must be at least 1")
        _check(
            0 <= self.warmup_fraction < 1,
            f"{name}.warmup_fraction",
            self.warmup_fraction,
            "must be in [0, 1)",
        )
        for key in ("hidden_dropout", "attention_dropout"):
            _check(0 <= getattr(self, key) < 1, f"{name}.{key}", getattr(self, key), "must be in [0, 1)")
        if self.learning_rate != MISSING:
            _check(self.learning_rate > 0, f"{name}.learning_rate", self.learning_rate, "must be above 0")
            _check(
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
        _check(self.beta > 0, "dpo.beta", self.beta, "must be above 0")
        known = ("dpo", "ipo", "rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl")
        _check(
            self.preference_loss in known,
            "dpo.preference_loss",
            self.preference_loss,
            f"must be one of {known}",
        )


@dataclass
class SamplingConfig:
    temperature: float = 0.7
    """0 is greedy."""
    top_p: float = 0.9
    max_tokens: int = 512
    """Tokens generated at most."""

    def __post_init__(self) -> None:
        name = type(self).__name__.removesuffix("Config").lower()
        _check(self.temperature >= 0, f"{name}.temperature", self.temperature, "must be 0 (greedy) or above")
        _check(0 < self.top_p <= 1, f"{name}.top_p", self.top_p, "must be in (0, 1]")
        _check(self.max_tokens >= 1, f"{name}.max_tokens", self.max_tokens, "must be at least 1")


@dataclass
class PromptsConfig(SamplingConfig):
    """New prompts by 8-shot self-instruct (paper section 3.1.1: T 0.6, p 0.9, ROUGE-L filter)."""

    temperature: float = 0.6
    max_tokens: int = 128
    num_prompts: int = 1000
    """Prompts that survive the filters, per iteration."""
    num_seed_shots: int = 6
    """Few-shot examples taken from the IFT seed."""
    num_generated_shots: int = 2
    """Few-shot examples taken from prompts kept so far."""
    max_rouge_l: float = 0.7
    """A new prompt this similar (ROUGE-L F1) to the seed or to a kept prompt is dropped."""
    min_words: int = 3
    max_words: int = 150
    blocked_words: list[str] = field(
        default_factory=lambda: ["image", "images", "graph", "graphs", "picture", "pictures", "file", "files",
                                 "map", "maps", "draw", "plot", "video", "audio", "music", "flowchart", "diagram"]
    )  # fmt: skip
    """Prompts that ask for what a text model cannot give (the list of Self-Instruct, section A)."""
    max_rounds: int = 20
    """Rounds of generation before a shortfall is an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("num_prompts", "min_words", "max_rounds"):
            _check(getattr(self, key) >= 1, f"prompts.{key}", getattr(self, key), "must be at least 1")
        _check(0 < self.max_rouge_l <= 1, "prompts.max_rouge_l", self.max_rouge_l, "must be in (0, 1]")
        _check(
            self.max_words >= self.min_words,
            "prompts.max_words",
            self.max_words,
            "must not be below min_words",
        )


@dataclass
class CandidatesConfig(SamplingConfig):
    num_samples: int = 4
    """Responses per prompt (N in the paper)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(
            self.num_samples >= 2,
            "candidates.num_samples",
            self.num_samples,
            "a pair needs at least 2 responses",
        )


@dataclass
class JudgeConfig(SamplingConfig):
    rubric: str = MISSING
    """The judge's prompt, with `{instruction}` and `{response}`; from `conf/judge/`. Asks for a
    justification first and `Score: <points>` last."""
    num_judgements: int = 3
    """Verdicts per response; their mean is its score."""
    max_score: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.num_judgements >= 1, "judge.num_judgements", self.num_judgements, "must be at least 1")
        if self.rubric != MISSING:
            for slot in ("{instruction}", "{response}"):
                _check(
                    self.rubric.count(slot) == 1,
                    "judge.rubric",
                    self.rubric[:60] + "...",
                    f"must hold {slot} once",
                )
            asks = "Score:" in self.rubric
            _check(asks, "judge.rubric", self.rubric[:60] + "...", "must ask for a line `Score: <points>`")


@dataclass
class PairsConfig:
    min_margin: float = 0.0
    """The best mean score must exceed the worst by more than this; 0 drops ties only, as the paper does."""

    def __post_init__(self) -> None:
        _check(self.min_margin >= 0, "pairs.min_margin", self.min_margin, "must be 0 or above")


@dataclass
class EvaluationConfig:
    """Every model answers and judges the held-out instructions of `data.eft_eval_path`, sampled as in
    `candidates` and `judge`, so that models are compared on the same ground."""

    num_prompts: int = 541
    """Held-out instructions at most (the paper has 541)."""
    num_bootstrap: int = 1000
    """Resamples behind each confidence interval."""

    def __post_init__(self) -> None:
        _check(self.num_prompts >= 1, "evaluation.num_prompts", self.num_prompts, "must be at least 1")


@dataclass
class EngineConfig:
    name: str = "embedded"
    """embedded: in process, on the CPU."""
    dtype: str = "bfloat16"
    """Of weights and matrix products: bfloat16 or float32."""
    max_batch_size: int = 32
    """Sequences decoded together. Placement."""


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
            _check(getattr(self, key) >= 1, f"trainer.{key}", getattr(self, key), "must be at least 1")
        known = ("bf16", "bf16-O2", "32")
        _check(self.precision in known, "trainer.precision", self.precision, f"must be one of {known}")
        model_parallel = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        _check(
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


@dataclass
class LauncherConfig:
    name: str = "local"


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
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)

    def __post_init__(self) -> None:
        _check(self.num_iterations >= 0, "num_iterations", self.num_iterations, "must be 0 (SFT only) or above")
