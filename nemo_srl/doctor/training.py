"""Tiny trainings. `python -m nemo_srl.doctor.training LESSON.json STEP` runs one step of one, in a job.

Steps are those of every training stage: `prepare` and `export` in one process, and `train` on every rank. A lesson
that is to be stopped has the fourth step `train_and_stop` instead (`stopping.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_srl import jsonio, registry
from nemo_srl.artifacts import read_json, write_atomic
from nemo_srl.doctor import tiny
from nemo_srl.doctor.findings import Finding
from nemo_srl.errors import NemoSrlError, StoppedError
from nemo_srl.protocols import EXIT_STOPPED, JobStep, Trainer
from nemo_srl.trainers import open_trainer

if TYPE_CHECKING:
    from nemo_srl.doctor.site import Site


@dataclass(frozen=True)
class Lesson:
    """What a step needs to know. It lies in `directory/<name>.json`."""

    name: str
    algorithm: str
    directory: Path
    model_dir: Path
    trainer: dict[str, Any]
    """The settings of the trainer."""
    optim: dict[str, Any]
    """Settings of the training that differ from the usual ones."""

    @classmethod
    def read(cls, path: Path) -> Lesson:
        given = read_json(path)
        return cls(**{**given, "directory": Path(given["directory"]), "model_dir": Path(given["model_dir"])})

    @property
    def work_dir(self) -> Path:
        return self.directory / self.name

    @property
    def path(self) -> Path:
        return self.directory / f"{self.name}.json"

    def open_trainer(self) -> Trainer:
        return open_trainer(registry.load("trainers", self.trainer["name"]).settings(**self.trainer))


def write_lesson(
    directory: Path, algorithm: str, settings: Any, *, model_dir: Path, name: str = "", **optim: Any
) -> Lesson:
    """Write what the steps of a training read. `settings` are a trainer's."""
    lesson = Lesson(name or algorithm, algorithm, directory, model_dir, asdict(settings), optim)
    text = {**asdict(lesson), "directory": str(directory), "model_dir": str(model_dir)}
    write_atomic(lesson.path, jsonio.dumps(text, indent=2) + "\n")
    return lesson


def step(lesson: Lesson, name: str) -> JobStep:
    """A step of a job. `train` runs on every rank."""
    command = ["-m", "nemo_srl.doctor.training", str(lesson.path), name]
    return JobStep(name=name, command=command, distributed=name.startswith("train"))


@dataclass(frozen=True)
class Sizes:
    """Nodes, ranks of each, and the parallel sizes of a tiny training: TP=2 and PP=2 where there are four ranks."""

    num_nodes: int
    num_ranks_per_node: int
    tensor_parallel_size: int
    pipeline_parallel_size: int

    def __str__(self) -> str:
        nodes = "1 node" if self.num_nodes == 1 else f"{self.num_nodes} nodes"
        return f"TP={self.tensor_parallel_size} PP={self.pipeline_parallel_size} on {nodes}"


def sizes(site: Site) -> Sizes:
    """The recipe's own nodes and ranks decide, up to four ranks. The tiny model has two layers and two query groups."""
    nodes, ranks = site.trainer_nodes, int(site.cfg.trainer.num_ranks_per_node)
    ranks = 4 if nodes == 1 and ranks >= 4 else min(ranks, 2)
    world = nodes * ranks
    tensor = 2 if world == 4 or (world == 2 and nodes == 1) else 1
    return Sizes(nodes, ranks, tensor, world // tensor)


def settings(site: Site, *, precision: str) -> Any:
    """The recipe's trainer with the sizes of a tiny training, and with the defaults of what decides about its result,
    because the stored losses are those of a plain training."""
    from nemo_srl.doctor.site import with_known

    s, trainer = sizes(site), site.cfg.trainer
    decisive = registry.load("trainers", trainer.name).decisive
    usual = {f.name: f.default for f in fields(trainer) if f.name in decisive and f.default is not MISSING}
    return with_known(
        trainer, **{**usual, "precision": precision}, num_nodes=s.num_nodes, devices=s.num_ranks_per_node,
        micro_batch_size=1, tensor_model_parallel_size=s.tensor_parallel_size,
        pipeline_model_parallel_size=s.pipeline_parallel_size, context_parallel_size=1,
        sequence_parallel=trainer.sequence_parallel and s.tensor_parallel_size > 1,
        ub_tp_comm_overlap=False, optimizer_cpu_offload=False,
    )  # fmt: skip


REMEDY = (
    "The end of the log says where it failed. If ranks do not meet: `ports` above, and cluster.env.NCCL_SOCKET_IFNAME. "
    "If NCCL fails, run again with cluster.env.NCCL_DEBUG=INFO."
)
WRONG_LOSSES = (
    "The sums of this stack are wrong. Compare the versions above with containers/README.md. Does it fail on one node, "
    "too (trainer.num_nodes=1)? If not, the connections between the nodes are at fault."
)


def check(site: Site, algorithm: str) -> Iterator[Finding]:
    """Train in float32 over the nodes, export, and compare the losses of the first steps with the stored ones."""
    tiny.write_model(site.directory / "model")
    lesson = write_lesson(
        site.directory, algorithm, settings(site, precision="32"), model_dir=site.directory / "model",
        max_epochs=tiny.SHORT_EPOCHS,
    )  # fmt: skip
    s = sizes(site)
    job = site.job(
        algorithm, [step(lesson, "prepare"), step(lesson, "train"), step(lesson, "export")], role="trainer",
        num_nodes=s.num_nodes, num_ranks_per_node=s.num_ranks_per_node, num_gpus_per_node=s.num_ranks_per_node,
    )  # fmt: skip
    tried = f"{algorithm.upper()} of a tiny model with {s}, float32, against stored losses, and its export"
    try:
        site.run(job)
        losses = site.read(f"{algorithm}-losses.json")["losses"]
    except NemoSrlError as e:
        yield Finding(name=algorithm, ok=False, text=str(e), tried=tried, remedy=REMEDY)
        return
    try:
        text = tiny.compare(losses, tiny.EXPECTED_SHORT[algorithm], remedy="")
    except NemoSrlError as e:
        yield Finding(name=algorithm, ok=False, text=str(e), tried=tried, remedy=WRONG_LOSSES)
    else:
        yield Finding(name=algorithm, ok=True, text=text, tried=tried)


def run_step(lesson: Lesson, name: str) -> None:
    """Run a step. Raises what the trainer does."""
    trainer = lesson.open_trainer()
    if name == "prepare":
        trainer.prepare(tiny.task(lesson.algorithm, lesson.model_dir, **lesson.optim), lesson.work_dir)
    elif name == "train":
        trainer.train(lesson.work_dir)
    elif name == "train_and_stop":
        from nemo_srl.doctor import stopping

        stopping.train(lesson, trainer)
    else:
        losses = [float(row["loss"]) for row in trainer.metrics(lesson.work_dir)]
        trainer.export(lesson.work_dir, lesson.directory / f"{lesson.name}-model")
        write_atomic(lesson.directory / f"{lesson.name}-losses.json", jsonio.dumps({"losses": losses}))


def main(lesson_file: Path, name: str) -> int:
    try:
        run_step(Lesson.read(lesson_file), name)
    except StoppedError as e:
        print(f"stopped: {e}", file=sys.stderr)
        return EXIT_STOPPED
    except NemoSrlError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
