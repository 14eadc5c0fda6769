"""The typed schema of `conf/`: every setting, its default and its meaning, each in this one place.

Sections either decide results (`model data sft prompts candidates judge pairs dpo evaluation seed`, and
the fields of `engine` and `trainer` that are listed in the stages' `settings`) and are then part of an
artifact's identity, or they only place work (`launcher`, `cluster`, parallel sizes, batch limits) and may change
between runs of one run directory. Bad values raise `ConfigError` when the configuration is composed.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from omegaconf import MISSING

from nemo_srl.errors import ConfigError

Role = Literal["prompts", "candidates", "judge"]
"""What a model is asked for; each may have an engine of its own."""


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
    rankings_path: str = ""
    """Answers that people ranked (JSONL of RankedAnswers). When given, the judge is refreshed after each
    iteration's DPO: see `refresh`. Empty string: no refresh, as in the paper."""


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
class TrtllmConfig:
    """How `engine.name=trtllm` starts `trtllm-serve`: R replicas of TP x PP GPUs on one node."""

    command: list[str] = field(default_factory=lambda: ["trtllm-serve"])
    """Program and what must precede it. Under Slurm, TensorRT-LLM wants
    `[mpirun, -n, "1", --oversubscribe, --allow-run-as-root, trtllm-serve]`."""
    in_process: bool = False
    """Use TensorRT-LLM's `LLM` class in the stage's own process instead of servers; one replica."""
    num_replicas: int = 1
    """Servers, each with the whole model. Placement, like all sizes here."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    backend: str = "pytorch"
    """pytorch, _autodeploy or tensorrt (gone since TensorRT-LLM 1.3)."""
    max_num_tokens: int = 8192
    """Tokens of all sequences in one forward pass, prompts included."""
    max_seq_len: int | None = None
    """Prompt and completion of one request, in tokens; null: the model's context."""
    free_gpu_memory_fraction: float = 0.9
    """Share of the memory that the weights leave free, used for keys and values."""
    extra_options: dict[str, Any] = field(default_factory=dict)
    """More LLM API options by TensorRT-LLM's names, over those that are set for you."""
    start_timeout_seconds: float = 1800
    """Until a server must be healthy; loading 70B weights from shared storage takes minutes."""

    def __post_init__(self) -> None:
        _check(bool(self.command), "engine.trtllm.command", self.command, "must name a program")
        for key in ("num_replicas", "tensor_parallel_size", "pipeline_parallel_size", "max_num_tokens"):
            _check(getattr(self, key) >= 1, f"engine.trtllm.{key}", getattr(self, key), "must be at least 1")
        fraction = self.free_gpu_memory_fraction
        _check(0 < fraction < 1, "engine.trtllm.free_gpu_memory_fraction", fraction, "must be in (0, 1)")
        _check(
            not self.in_process or self.num_replicas == 1,
            "engine.trtllm.num_replicas",
            self.num_replicas,
            "with engine.trtllm.in_process=true there is one replica",
        )


@dataclass
class EngineConfig:
    name: str = "embedded"
    """embedded: in process, on the CPU. trtllm: TensorRT-LLM servers that each stage starts on its
    model. openai: a server that is there already (hosted, NIM, vLLM, trtllm-serve), at `base_url`."""
    dtype: str = "bfloat16"
    """Of weights and matrix products: bfloat16 or float32."""
    max_batch_size: int = 32
    """Sequences decoded together. Placement, like the fields after `api_key_env`."""
    base_url: str = ""
    """openai: where the server's API is, up to and including `/v1`."""
    model: str = ""
    """openai: the model's name on that server; empty: the only one that it lists."""
    api: str = "chat"
    """openai: `chat` sends the text of a prompt as the user's turn, and the server renders it; `completions`
    sends token ids, for a server whose model has the same tokenizer as the policy."""
    extra_body: dict[str, Any] = field(default_factory=dict)
    """openai: fields added to every request, for what only that server knows."""
    api_key_env: str = ""
    """openai: name of the environment variable that holds the key, which is read, sent and never stored."""
    max_concurrency: int = 64
    """trtllm, openai: requests under way at once, over all replicas."""
    timeout_seconds: float = 600
    """trtllm, openai: deadline of one attempt at a request."""
    max_retries: int = 5
    """trtllm, openai: further attempts after connection errors, timeouts, 429 and 5xx."""
    trtllm: TrtllmConfig = field(default_factory=TrtllmConfig)

    def __post_init__(self) -> None:
        _check(
            self.name != "openai" or self.base_url.startswith(("http://", "https://")),
            "engine.base_url",
            self.base_url,
            "engine.name='openai' needs the URL of a server, such as http://host:8000/v1",
        )
        _check(self.api in ("chat", "completions"), "engine.api", self.api, "must be 'chat' or 'completions'")
        _check(self.max_concurrency >= 1, "engine.max_concurrency", self.max_concurrency, "must be at least 1")
        _check(self.timeout_seconds > 0, "engine.timeout_seconds", self.timeout_seconds, "must be above 0")
        _check(self.max_retries >= 0, "engine.max_retries", self.max_retries, "must be 0 or above")


ENGINE_SETTINGS = (
    "name", "dtype", "base_url", "model", "api", "extra_body", "trtllm.backend", "trtllm.extra_options",
)  # fmt: skip
"""The fields of `EngineConfig` that decide what is generated; the others only place the work."""


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

    path: str = ""
    """Take the prompts from this file (JSONL of Prompt) and generate none; `{iteration}` in it stands for the
    iteration's number. Empty string: self-instruct."""
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
    language: str = "en"
    """en: prompts that cannot be English are dropped (a heuristic); any: no such check."""
    model: str = ""
    """A fixed model for new prompts, as in the paper: like `model.path`. Empty string: M_t itself."""
    engine: EngineConfig | None = None
    """Another engine for new prompts alone, such as a server with a fixed chat model; null: `engine`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("num_prompts", "min_words", "max_rounds"):
            _check(getattr(self, key) >= 1, f"prompts.{key}", getattr(self, key), "must be at least 1")
        _check(self.language in ("en", "any"), "prompts.language", self.language, "must be 'en' or 'any'")
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
    mode: str = "sampled"
    """sampled: a verdict's score is the one it states (the paper). expected: it is the mean over the points
    that the judge could have stated there, by their probabilities; needs an engine with log-probabilities.
    pairwise: an iteration's answers are compared two at a time, in both orders, and score by their wins."""
    pairwise_rubric: str = ""
    """The prompt of a comparison, with `{instruction}`, `{response_a}` and `{response_b}`; asks for a line
    `Winner: <A, B or tie>` last. `+judge_mode=pairwise` sets one."""
    engine: EngineConfig | None = None
    """Another engine for judging alone, e.g. a hosted judge; null: `engine`, on M_t (self-rewarding)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        known = ("sampled", "expected", "pairwise")
        _check(self.mode in known, "judge.mode", self.mode, f"must be one of {known}")
        if self.mode == "pairwise":
            for part in ("{instruction}", "{response_a}", "{response_b}", "Winner:"):
                once = self.pairwise_rubric.count(part) == 1
                _check(once, "judge.pairwise_rubric", self.pairwise_rubric[:60] + "...", f"must hold {part} once")
        _check(
            self.mode != "expected" or self.max_score <= 9,
            "judge.max_score",
            self.max_score,
            "judge.mode='expected' reads one digit, so points go up to 9 at most",
        )
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
        _check(self.num_judgements >= 1, "refresh.num_judgements", self.num_judgements, "must be at least 1")


@dataclass
class AnchorConfig:
    """A judge that the loop never changes looks at every iteration: what the alarms for reward hacking compare with."""

    num_prompts: int = 100
    """Prompts of the iteration whose candidates the anchor judges, too; 0 turns the stage and its alarms off."""
    model: str = ""
    """Another judge as the anchor, like `model.path`: M1 of a run with another seed and other EFT data, or a larger
    model. Empty string: M1, which costs nothing and sees drift and noise, but is fooled by whatever fools M_t."""

    def __post_init__(self) -> None:
        _check(self.num_prompts >= 0, "anchor.num_prompts", self.num_prompts, "must be 0 (off) or above")


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
    """local: processes of this machine. slurm: one batch job per stage, submitted from a login node and
    followed. srun: steps inside the allocation that the orchestrator itself runs in (`recipes/iterate.sbatch`)."""
    rank_idiom: str = "srun"
    """slurm, srun: how the ranks of a training start. srun: one Slurm task per rank; the ranks hear of a time
    limit themselves and save. torchrun: one task per node, and torch's launcher starts the ranks."""
    signal_seconds: int = 600
    """slurm: so long before the time limit a job is told to save and leave; then it is requeued. A training ends
    its step and writes a checkpoint in that time."""
    max_requeues: int = 20
    """slurm: restarts of one job after time limits, preemption and dead nodes, before it is given up."""
    poll_seconds: float = 10.0
    """slurm: between two looks at a job's state and log. Each look at the state asks Slurm's controller."""

    def __post_init__(self) -> None:
        idioms = ("srun", "torchrun")
        _check(self.rank_idiom in idioms, "launcher.rank_idiom", self.rank_idiom, f"must be one of {idioms}")
        _check(self.signal_seconds >= 1, "launcher.signal_seconds", self.signal_seconds, "must be at least 1")
        _check(self.max_requeues >= 0, "launcher.max_requeues", self.max_requeues, "must be 0 or above")
        _check(self.poll_seconds > 0, "launcher.poll_seconds", self.poll_seconds, "must be above 0")


@dataclass
class ResourcesConfig:
    """What one kind of job asks Slurm for; null leaves it to the next wider setting, then to Slurm."""

    container: str | None = None
    """Image for pyxis: `nvcr.io#nvidia/nemo:25.02`, or a `.sqsh` file by its path. null: no container."""
    python: str | None = None
    """Interpreter that runs the steps. null: `python` in a container, else the orchestrator's own."""
    partition: str | None = None
    time: str | None = None
    """Time limit, in Slurm's ways of writing one (`04:00:00`, `2-00:00:00`, minutes)."""
    cpus_per_task: int | None = None
    """null: with `cluster.exclusive`, tasks share all cores of their node."""
    sbatch: dict[str, Any] = field(default_factory=dict)
    """Further options of sbatch by their long names, such as `{constraint: h100}`; null for one without value."""


@dataclass
class ClusterConfig:
    """A Slurm cluster, for launcher.name=slurm and srun; one file per cluster in `conf/cluster/`. Placement."""

    account: str | None = None
    partition: str | None = None
    """For every job that does not name its own, as `time` below."""
    time: str = "04:00:00"
    gpus_per_node: int | None = None
    """GPUs of a node. null: Slurm is not asked for GPUs, since it has no GRES for them or there are none."""
    exclusive: bool = True
    """Whole nodes. false shares nodes with other jobs; then say `cpus_per_task`, and `sbatch: {mem: ...}`."""
    mpi: str | None = None
    """`srun --mpi`. null: the cluster's default. `pmix` is what NGC containers are mostly started with."""
    mounts: list[str] = field(default_factory=list)
    """Mounted into containers, as `/host` or `/host:/container`, beside what a job is known to need: the run
    directory, this project, models and data, all at their own paths."""
    env: dict[str, str] = field(default_factory=dict)
    """Environment of every step, over what a container image sets."""
    setup: list[str] = field(default_factory=list)
    """Lines of shell run on the first node of a job before its steps, outside the container: `module load ...`."""
    trainer: ResourcesConfig = field(default_factory=ResourcesConfig)
    """Stages that train. Nodes and ranks: `trainer.num_nodes`, `trainer.devices`."""
    engine: ResourcesConfig = field(default_factory=ResourcesConfig)
    """Stages that call models: one node, with the GPUs of `engine.trtllm`."""
    cpu: ResourcesConfig = field(default_factory=ResourcesConfig)
    """Stages that do neither."""
    stages: dict[str, ResourcesConfig] = field(default_factory=dict)
    """What a single stage needs differently, by its name: `{policy: {time: 2-00:00:00}}`."""

    def __post_init__(self) -> None:
        _check(self.gpus_per_node is None or self.gpus_per_node >= 1, "cluster.gpus_per_node", self.gpus_per_node,
               "must be at least 1, or null where Slurm does not know GPUs")  # fmt: skip
        for mount in self.mounts:
            _check(mount.startswith("/") and "," not in mount, "cluster.mounts", mount, "must be an absolute path")


@dataclass
class TrackingConfig:
    """Where the run's figures go beside its report, after each iteration (`nemo_srl/tracking.py`)."""

    tensorboard: bool = True
    """Event files in `<run_dir>/tensorboard`."""
    wandb_project: str = ""
    """Weights & Biases; needs its package and key (or WANDB_MODE=offline). Empty string: off."""


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
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    launcher: LauncherConfig = field(default_factory=LauncherConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)

    def __post_init__(self) -> None:
        _check(self.seed >= 1, "seed", self.seed, "must be 1 or above (NeMo takes no other)")
        _check(self.num_iterations >= 0, "num_iterations", self.num_iterations, "must be 0 (SFT only) or above")

    def engine_for(self, role: Role) -> EngineConfig:
        """The engine that generates prompts, candidates or verdicts."""
        override = {"prompts": self.prompts.engine, "candidates": None, "judge": self.judge.engine}[role]
        return override or self.engine
