"""The three interfaces of backends: engine, trainer, launcher. A backend is any object with these methods.

A backend inherits nothing, and no interface depends on another one. An engine does not know Slurm, and a trainer does
not know chat templates.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from nemo_srl.config.training import OptimConfig
from nemo_srl.records import Completion, FinishReason


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample, with the same meaning on every engine.

    `temperature` 0 is greedy. `top_p` keeps the smallest set of tokens whose probability reaches it. `max_tokens` is
    always given, because TensorRT-LLM runs requests one at a time without it. Generation ends at the model's
    end-of-sequence tokens, which are not part of the text. If `num_logprobs` is above 0, a completion has the
    log-probabilities of that many tokens, the most probable ones, at each number that was generated
    (`Completion.number_logprobs`). Not every engine supports this.
    """

    temperature: float
    top_p: float
    max_tokens: int
    num_logprobs: int = 0


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """Asks for `n` samples of the continuation of one prompt. Engines add no special tokens to its token ids.

    Samples depend only on `seed`, `key` and the sample's index, not on the batch or on the order of requests. (Servers
    keep this as far as they can: samples of TensorRT-LLM depend on its batches.) `text` is the prompt before its chat
    template. If a server has its own tokenizer and template, the engine sends `text` as the user's turn, after
    `earlier_turns`: pairs of what the user and the assistant said before.

    A sample also ends where its text contains one of the strings of `stop`, which stays in the text. This only saves
    tokens: an engine that does not support it lets the model end by itself.
    """

    key: str
    prompt_token_ids: tuple[int, ...]
    n: int
    seed: int
    text: str = ""
    earlier_turns: tuple[tuple[str, str], ...] = ()
    stop: tuple[str, ...] = ()


class GenerationEngine(Protocol):
    """Serves one model directory."""

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, *, completed: Collection[str] = ()
    ) -> Iterator[tuple[Completion, ...]]:
        """Yield completions when they end, in any order. Completions that end together come in one tuple.

        `completed` holds the keys (`Completion.key`) that an earlier, interrupted call with the same requests has
        yielded. They are not yielded again. `requests` is still the whole list, so that an engine can form the same
        batches.

        A request that cannot be answered, such as one whose prompt leaves no room in the context, gives completions
        without an answer (`FinishReason`), each with its reason. Raises `EngineError` if the engine cannot go on.
        """

    def close(self) -> None:
        """Free the model, and end the processes that the engine started."""


@dataclass(frozen=True, kw_only=True)
class SFTRow:
    """Rendered text: `prompt` with its chat template, and `response` without an end-of-sequence token."""

    prompt: str
    response: str
    weight: float = 1.0
    """How much each token of the response counts in the mean that is trained on."""


@dataclass(frozen=True, kw_only=True)
class DPORow:
    """Rendered text, as in `SFTRow`. `*_reward` are the judge's mean scores, which some losses (RPO) use.

    `confidence` is the probability that `chosen` is the better response. The loss cdpo uses it. `sft_weight` is
    how much the likelihood of `chosen` counts beside that of other rows (`dpo.sft_loss_weight`). A row that is not
    `compared` teaches by this likelihood alone: it has no preference loss, and needs no reference.

    A response that was cut off at `max_tokens` has the finish reason `length`. The trainer must not end it with an
    end-of-sequence token, because the policy generated none.
    """

    prompt: str
    chosen: str
    rejected: str
    chosen_reward: float
    rejected_reward: float
    chosen_finish_reason: FinishReason = "stop"
    rejected_finish_reason: FinishReason = "stop"
    confidence: float = 1.0
    sft_weight: float = 1.0
    compared: bool = True


@dataclass(frozen=True, kw_only=True)
class TrainingTask:
    """What to train, from which model, on which rows, and with which settings."""

    algorithm: Literal["sft", "dpo"]
    model_dir: Path
    """Hugging Face directory: the weights to start from. With DPO it is also the frozen reference."""
    rows: Sequence[SFTRow] | Sequence[DPORow]
    """`SFTRow` for sft, `DPORow` for dpo."""
    optim: OptimConfig
    """`DPOConfig` for dpo, any other for sft."""
    seed: int
    """Decides the order of the rows, and dropout."""
    keep_checkpoints: bool = False
    """Whether `export` also writes the model of every checkpoint, beside the trained one (`checkpoint_dir`)."""


def checkpoint_dir(model_dir: Path, step: int) -> Path:
    """Where the model of a checkpoint is, beside the trained model: `checkpoints/step_000200` for step 200."""
    return model_dir.parent / "checkpoints" / f"step_{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The step of such a directory."""
    return int(checkpoint.name.removeprefix("step_"))


class Trainer(Protocol):
    """Trains in three steps. Each has its own process or processes, and files in `work_dir` connect them.

    `prepare` and `export` run in one process. `train` runs on every rank of the job. If it is run again after a crash,
    it continues from its last checkpoint. All raise `ConfigError` or `DataError`.
    """

    def prepare(self, task: TrainingTask, work_dir: Path) -> None:
        """Check everything. Write the data, the trainer's configuration and the starting weights."""

    def train(self, work_dir: Path) -> None:
        """Train to the end. Raises `StoppedError` if it was asked to stop before the end and saved its work."""

    def export(self, work_dir: Path, model_dir: Path) -> Mapping[str, float]:
        """Write the trained model as a Hugging Face directory, and return a summary of the training."""

    def metrics(self, work_dir: Path) -> list[dict[str, Any]]:
        """The `step` (from 1), `loss` and more of each step; empty before the first. Also works after `export`."""


@dataclass(frozen=True, kw_only=True)
class JobStep:
    """One command of a job. It runs in one process, or in one process per rank of the job."""

    name: str
    command: Sequence[str]
    distributed: bool = False


EXIT_STOPPED = 75
"""Exit status of a step that was asked to stop and saved its work first (`StoppedError`; EX_TEMPFAIL of sysexits)."""

JobRole = Literal["trainer", "engine"]
"""The kind of machine and container that a job needs: for a training, or for an engine."""

SERVICES_VARIABLE = "NEMO_SRL_SERVICES"
"""The environment variable that tells a step its job's services, as JSON: `{name: base URL}`."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """A server that must be healthy before a job's steps start. It is stopped after them.

    The launcher replaces `{host}` in `command` by 127.0.0.1, or by an address of the node that other nodes can reach,
    and `{port}` by a free port of the node. The server is healthy when each of `health_paths` answers 200. It gets
    `num_gpus` of the GPUs that the job may use on its node.
    """

    name: str
    command: Sequence[str]
    health_paths: tuple[str, ...]
    start_timeout_seconds: float
    num_gpus: int = 0
    node: int = 0
    """The node of the job on which it runs. Steps that are not distributed run on node 0."""
    env: Mapping[str, str] = field(default_factory=dict)
    uses_mpi: bool = False
    """Whether it starts its ranks through MPI. Inside a Slurm job, the launcher then starts it with `mpirun -n 1`."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """The steps of one stage. They run one after the other in one allocation, while its services run.

    A job may be stopped at any time and run again from its first step, because steps find the work that is done.
    `stage` and `role` choose resources and a container, if the launcher has a choice. The job reads and writes `paths`.
    Every node must see these paths, and the container, too.
    """

    name: str
    steps: Sequence[JobStep]
    log_dir: Path
    stage: str = ""
    role: JobRole = "engine"
    paths: Sequence[Path] = ()
    num_nodes: int = 1
    num_ranks_per_node: int = 1
    num_gpus_per_node: int = 0
    """GPUs that the steps and services use on a machine with GPUs. Other machines ignore it."""
    env: Mapping[str, str] = field(default_factory=dict)
    services: Sequence[Service] = ()


class Launcher(Protocol):
    """Runs a job to its end. Raises `JobFailedError` with the end of the log.

    If jobs can outlive the orchestrator, the launcher follows the job that is already running and starts no second one.
    """

    def run(self, job: Job) -> None: ...
