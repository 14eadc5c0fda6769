"""`python -m nemo_srl.worker STAGE_DIR STEP...`: run steps of the stage described in STAGE_DIR/stage.json.

That file, and the artifacts that it names, are all that a step reads. So you can run a step again by hand to study a
failure. Exit status 2 means an error that the user can correct; the last line of output is its message. Exit status 75
(`EXIT_STOPPED`) means that the step was asked to stop and saved its work. The worker ends when the process that started
it ends, so that no worker of a killed orchestrator writes to the run directory.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_srl import jsonio, registry, shared_storage
from nemo_srl.artifacts import SPEC, STEPS, Artifact, BaseModel, Model, SourceFile, Table, read_json, write_atomic
from nemo_srl.config import Config, load
from nemo_srl.errors import OF_THE_DISK, NemoSrlError, StoppedError, explained
from nemo_srl.locks import DirectoryLock
from nemo_srl.models import families
from nemo_srl.protocols import EXIT_STOPPED
from nemo_srl.stages import Context, Input, Stage, stage_at


def describe(stage: Stage[Any], cfg: Config, iteration: int, inputs: Mapping[str, Input], output: Artifact) -> None:
    """Write `stage.json`."""
    spec = {
        "stage": stage.name,
        "module": stage.module,
        "iteration": iteration,
        "config": asdict(cfg),
        "identity": dict(output.identity),
        "inputs": {name: _describe_input(x) for name, x in inputs.items()},
    }
    write_atomic(output.path / SPEC, jsonio.dumps(spec, indent=2) + "\n")


def _describe_input(x: Input) -> dict[str, str]:
    match x:
        case BaseModel():
            return {"kind": "base_model", "path": str(x.model_dir.absolute()), "digest": x.content_digest}
        case SourceFile() | Table():
            kind, record = "file" if isinstance(x, SourceFile) else "table", x.record
            name = f"{record.__module__}:{record.__name__}"
            return {"kind": kind, "path": str(x.path.absolute()), "record": name}
        case _:
            return {"kind": "model", "path": str(x.path.absolute())}


def _open_input(row: Mapping[str, str]) -> Input:
    path = Path(row["path"])
    if row["kind"] == "base_model":
        return BaseModel(path, row["digest"])
    if row["kind"] == "model":
        return Model(path, {})
    # An older description names a record of this package without its module.
    name = row["record"] if ":" in row["record"] else f"nemo_srl.records:{row['record']}"
    record = registry.imported(name, key="record")
    return SourceFile(path, record) if row["kind"] == "file" else Table(path, {}, record)


def set_up(cfg: Config) -> None:
    """Register the user's own model family. Every process must do this before it reads a model."""
    if cfg.model.family:
        families.register(cfg.model.family)


def run_steps(stage_dir: Path, step_names: Sequence[str]) -> None:
    """Run steps of a stage, one after the other. Raises `RunDirBusyError` while another process runs steps of it.

    Rank 0 has the lock for all ranks, which cannot work without it.
    """
    shared_storage.appears((stage_dir / SPEC).exists, stage_dir, shared_storage.seconds_to_wait())
    busy = f"{stage_dir}: another worker still runs in this directory ({{owner}}). Wait, or end it."
    with DirectoryLock(stage_dir / ".lock", busy=busy) if rank() == 0 else nullcontext():
        for name in step_names:
            _run_step(stage_dir, name)


def _run_step(stage_dir: Path, step_name: str) -> None:
    """Run a step. The last step publishes the stage's artifact, with the time and memory of all steps on rank 0."""
    started = time.monotonic()
    spec = read_json(stage_dir / SPEC)
    stage = stage_at(spec.get("module", f"nemo_srl.stages.{spec['stage']}"))
    cfg = load(spec["config"], Config)
    set_up(cfg)
    inputs = {name: _open_input(row) for name, row in spec["inputs"].items()}
    ctx = Context(cfg, spec["iteration"], inputs, stage.output(stage_dir, spec["identity"]), stage.model)
    result = next(s for s in stage.steps if s.name == step_name).run(ctx)
    if rank() == 0:
        costs = _record_cost(stage_dir, step_name, time.monotonic() - started)
        if result is not None:
            ctx.output.publish(
                stage=stage.name,
                digest=result.digest,
                metrics=result.metrics,
                seconds=sum(c["seconds"] for c in costs.values()),
                peak_memory_bytes=int(max(c["peak_memory_bytes"] for c in costs.values())),
                parts=result.parts,
            )


def rank() -> int:
    """The rank of this process, from torchrun or srun."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def _record_cost(stage_dir: Path, step_name: str, seconds: float) -> dict[str, dict[str, float]]:
    """Add the step's time and peak resident memory to `steps.json`. Returns all steps so far."""
    path = stage_dir / STEPS
    costs: dict[str, dict[str, float]] = read_json(path) if path.exists() else {}
    kibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before = costs.get(step_name, {"seconds": 0.0, "peak_memory_bytes": 0.0})
    costs[step_name] = {
        "seconds": before["seconds"] + seconds,  # a job that starts again runs its finished steps again
        "peak_memory_bytes": max(before["peak_memory_bytes"], 1024.0 * kibibytes),
    }
    write_atomic(path, jsonio.dumps(costs, indent=2) + "\n")
    return costs


def die_with_parent() -> None:
    """Make the kernel kill this process when its parent ends for any reason. Does nothing except on Linux."""
    if sys.platform != "linux":
        return
    pr_set_pdeathsig = 1
    parent = os.getppid()
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the call
        os.kill(os.getpid(), signal.SIGKILL)


def _of_the_disk(error: Exception, stage_dir: Path) -> str | None:
    """What is wrong with the disk, if a step failed for that reason. None for other reasons."""
    if isinstance(error, OSError) and error.errno in OF_THE_DISK:
        return explained(error)
    # The writers of torch and safetensors have errors of their own, which say little. torch's writer of checkpoints can
    # at least be told by the file of its source. Some space may be free again, because other processes share the disk.
    least = 1 << 30 if "inline_container.cc" in str(error) else 1 << 20
    if shutil.disk_usage(stage_dir).free < least:
        return explained(OSError(errno.ENOSPC, "full"))
    return None


def main(stage_dir: Path, step_names: Sequence[str]) -> int:
    die_with_parent()
    # torch reads this at its first large tensor. Without huge pages, page faults take a quarter of a CPU training.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    try:
        run_steps(stage_dir, step_names)
        return 0
    except StoppedError as e:
        print(f"stopped: {e}", file=sys.stderr)
        return EXIT_STOPPED
    except NemoSrlError as e:
        message = str(e)
    except Exception as e:
        if (explanation := _of_the_disk(e, stage_dir)) is None:
            raise
        message = f"{stage_dir}: {explanation}"
    print(f"error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
