"""How much memory the tensors of a training take: `python -m tests.training_memory WORK_DIR:RANKS ...`.

For every prepared work directory, one line of JSON of rank 0 after its second step, when the optimizer has its state:
`{"parameters": ..., "weights": bytes, "gradients": bytes, "optimizer": bytes, "passing": bytes}`. Bytes are those of
storages, each counted once: views of one buffer take no memory of their own. `passing` is what the second step
allocates at most, beyond what was there before: PyTorch's allocator reports it to the profiler.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.ports import free_port


def main(jobs: list[str]) -> None:
    import torch

    torch.set_num_threads(1)
    from nemo_srl.trainers.nemo_aligner.platforms import cpu

    cpu.install()
    import nemo_srl.trainers.nemo_aligner.session  # noqa: F401
    from tests.trainer_fork_server import _fork

    measure_at_second_step(os.dup(1))
    for job in jobs:
        work_dir, _, num_ranks = job.rpartition(":")
        port = free_port()
        training = {"work_dir": work_dir, "num_ranks": int(num_ranks), "at_step": None}
        pids = [_fork(training, rank, port) for rank in range(int(num_ranks))]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        assert set(codes) == {0}, (Path(work_dir) / "log_0.txt").read_text()[-3000:]


def measure_at_second_step(out: int) -> None:
    """In this process and its forks; lines go to the file descriptor `out`."""
    import torch

    from nemo_srl.trainers.nemo_aligner.metrics import MetricsFile

    log_metrics = MetricsFile.log_metrics
    second_step = torch.autograd.profiler.profile(profile_memory=True)

    def log_and_measure(self: MetricsFile, metrics: Any, step: int | None = None) -> None:
        log_metrics(self, metrics, step)
        if "train/loss" not in metrics or os.environ["RANK"] != "0":
            return
        if step == 0:
            second_step.__enter__()
        elif step == 1:
            second_step.__exit__(None, None, None)
            figures = {**measured(), "passing": peak(second_step)}
            os.write(out, json.dumps(figures).encode() + b"\n")

    MetricsFile.log_metrics = log_and_measure  # type: ignore[method-assign]


def measured() -> dict[str, int]:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    # By their types: asking some proxies among all objects for their class would import what is not installed.
    (model,) = (x for x in gc.get_objects() if type(x) is DistributedDataParallel)
    (optimizer,) = (x for x in gc.get_objects() if type(x) is DistributedOptimizer)
    weights = storages(model.parameters())
    gradients = storages(t for p in model.parameters() for t in (p.grad, getattr(p, "main_grad", None)))
    states = storages(tensors({**optimizer.optimizer.state}))
    masters = storages(p for group in optimizer.optimizer.param_groups for p in group["params"])
    own = {key: size for key, size in {**states, **masters}.items() if key not in weights and key not in gradients}
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": sum(weights.values()),
        "gradients": sum(gradients.values()),
        "optimizer": sum(own.values()),
    }


def peak(profile: Any) -> int:
    """The highest sum of what was allocated and not yet freed."""
    events = [e for e in profile.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda event: event.start_ns())]  # negative where memory is freed
    return max(itertools.accumulate(changes))


def tensors(value: Any) -> Iterable[Any]:
    """All tensors in nested dictionaries."""
    for child in value.values():
        if isinstance(child, dict):
            yield from tensors(child)
        elif hasattr(child, "untyped_storage"):
            yield child


def storages(found: Iterable[Any]) -> dict[int, int]:
    """Bytes by the address of the storage."""
    all_storages = [t.untyped_storage() for t in found if t is not None]
    return {s.data_ptr(): s.nbytes() for s in all_storages}


if __name__ == "__main__":
    main(sys.argv[1:])
