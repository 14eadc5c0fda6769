"""The three seams: engines, trainers, launchers. A backend is any object with these methods.

Nothing is inherited, and no seam knows of another: an engine never hears of Slurm, a trainer never of
chat templates.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from nemo_srl.config.training import OptimConfig
from nemo_srl.records import Completion


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How to sample, with the same meaning on every engine.

    `temperature` 0 is greedy. `top_p` keeps the smallest set of tokens whose probability reaches it.
    `max_tokens` is always given (TensorRT-LLM runs requests one at a time without it). Generation
    ends at the model's end-of-sequence tokens, which are not part of the text. With `num_logprobs`,
    completions carry that many of the most probable tokens wherever a number was generated
    (`Completion.number_logprobs`); not every engine can.
    """

    temperature: float
    top_p: float
    max_tokens: int
    num_logprobs: int = 0


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """`n` samples of the continuation of one prompt, given as token ids without further specials.

    `seed` decides the samples together with `key` and the sample's index, and nothing else does: not
    the batch that a request shares, nor the order of requests. (Servers keep this as far as they can:
    what TensorRT-LLM samples depends on its batches.) `text` is the prompt before its chat template;
    engines that talk to a server with a tokenizer and template of its own send it as the user's turn,
    after `earlier_turns`: pairs of what the user and the assistant said before.

    A sample also ends where its text has one of the strings of `stop`, which stays in it. That only saves
    tokens: an engine that cannot do it, or not everywhere, lets the model end by itself.
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
        self,
        requests: Sequence[GenerationRequest],
        params: SamplingParams,
        *,
        completed: Collection[str] = (),
    ) -> Iterator[tuple[Completion, ...]]:
        """Yield completions in any order, as they end; those that end together come as one tuple.

        `completed` holds the keys of completions (`Completion.key`) that a previous, interrupted call
        with the same requests already yielded; they are not yielded again. The whole list of
        requests is passed all the same, so that an engine can form the same batches as before.
        Raises `EngineError`; `DataError` for a prompt that leaves no room in the context.
        """
        ...

    def close(self) -> None:
        """Free the model; ends processes that the engine started."""
        ...


@dataclass(frozen=True, kw_only=True)
class SFTRow:
    """Rendered text: `prompt` with its chat template, and `response` without an end-of-sequence token."""

    prompt: str
    response: str


@dataclass(frozen=True, kw_only=True)
class DPORow:
    """Rendered text, as in `SFTRow`. `*_reward` are the judge's mean scores, which some losses (RPO) use."""

    prompt: str
    chosen: str
    rejected: str
    chosen_reward: float
    rejected_reward: float


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


class Trainer(Protocol):
    """Trains in three steps. Each has its own process or processes, and files in `work_dir` connect them.

    `prepare` and `export` run in one process. `train` runs on every rank of the job. After a crash it may be run again
    and goes on from its last checkpoint. All raise `ConfigError` or `DataError`.
    """

    def prepare(self, task: TrainingTask, work_dir: Path) -> None:
        """Check everything. Write the data, the trainer's configuration and the starting weights."""
        ...

    def train(self, work_dir: Path) -> None:
        """Train to the end. Raises `StoppedError` when it was asked to stop earlier, and saved its work."""
        ...

    def export(self, work_dir: Path, model_dir: Path) -> Mapping[str, float]:
        """Write the trained model as a Hugging Face directory, and return a summary of the training."""
        ...

    def metrics(self, work_dir: Path) -> list[dict[str, Any]]:
        """One mapping per step, with `step` (from 1), `loss` and more; empty before the first. Also after `export`."""
        ...


@dataclass(frozen=True, kw_only=True)
class JobStep:
    """One command of a job: on one process, or as one process per rank of the job."""

    name: str
    command: Sequence[str]
    distributed: bool = False


EXIT_STOPPED = 75
"""Exit status of a step that was asked to stop and saved its work first (`StoppedError`; EX_TEMPFAIL of sysexits)."""

JobRole = Literal["trainer", "engine", "cpu"]
"""What kind of machine and container a job needs: a training's, an engine's, or neither's."""

SERVICES_VARIABLE = "NEMO_SRL_SERVICES"
"""Environment variable in which a step finds its job's services: JSON, `{name: base URL}`."""


@dataclass(frozen=True, kw_only=True)
class Service:
    """A server that must be healthy before a job's steps start, and is stopped after them.

    `{host}` and `{port}` in `command` are replaced by what the launcher chose: 127.0.0.1, or an address of the node
    that other nodes reach, and a free port of it. It is healthy when every one of `health_paths` answers 200. It gets
    `num_gpus` of the GPUs that the job may use on its node.
    """

    name: str
    command: Sequence[str]
    health_paths: tuple[str, ...]
    start_timeout_seconds: float
    num_gpus: int = 0
    node: int = 0
    """Number of the job's node that it runs on; the steps that are not distributed run on node 0."""
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Job:
    """The steps of one stage, run one after the other in one allocation, while its services run.

    A job may be stopped at any point and run again from its first step: steps find what they have done.
    `stage` and `role` choose resources and a container where there is a choice. `paths` is what the job
    reads and writes; every node must see it, and so must the container.
    """

    name: str
    steps: Sequence[JobStep]
    log_dir: Path
    stage: str = ""
    role: JobRole = "cpu"
    paths: Sequence[Path] = ()
    num_nodes: int = 1
    num_ranks_per_node: int = 1
    num_gpus_per_node: int = 0
    """What the steps and services would use where there are GPUs; a CPU platform has none to ask for."""
    env: Mapping[str, str] = field(default_factory=dict)
    services: Sequence[Service] = ()


class Launcher(Protocol):
    """Runs a job to its end. Raises `JobFailedError` with the tail of the log.

    A launcher whose jobs outlive the orchestrator takes up the one that it finds instead of a second one.
    """

    def run(self, job: Job) -> None: ...
