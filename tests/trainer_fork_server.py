"""Runs trainings for the tests in forks of one process that has imported NeMo once (12 s instead of 12 s each).

Started as `python -m tests.trainer_fork_server`. Reads a JSON object a line from standard input,
`{"work_dir": ..., "num_ranks": 2, "at_step": null, "signal": null}`, runs one process per rank and answers with a line
`{"exit_codes": [0, 0]}`. With `"lost_at_save": 2`, rank 1 is gone when its second save ends. With `"chunk_rows": 3`,
three rows make a chunk of the reference's log-probabilities. With `"share_beginnings": 0`, every sequence is whole, as
on the other platforms. With `"frozen": path`, each rank puts what it does not train into the file `path`, as it is at
the end. With context parallelism, attention is that of `context_parallel_attention`. Everything that the ranks print
goes to `<work_dir>/log_<rank>.txt`.

Not covered: that `train` works in a process of its own, which the tests with torchrun and `Trainer` do.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from tests.ports import free_port


def main() -> None:
    import torch

    torch.set_num_threads(1)  # a fork inherits no threads, so none may have been started here
    from nemo_srl.trainers.nemo_aligner.platforms import cpu, products

    if products.onednn_is_exact():
        products.use(products.ONEDNN)  # what a training of a larger model may choose, with an attention of its own
    cpu.install()
    import nemo_srl.trainers.nemo_aligner.session  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        port = free_port()
        pids = [_fork(job, rank, port) for rank in range(job["num_ranks"])]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        print(json.dumps({"exit_codes": codes}), flush=True)


def _fork(job: dict, rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        log = os.open(Path(job["work_dir"]) / f"log_{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(job["num_ranks"]),
            "LOCAL_WORLD_SIZE": str(job["num_ranks"]),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        from nemo_srl.trainers.nemo_aligner.platforms import cpu
        from nemo_srl.trainers.nemo_aligner.session import run_session
        from tests import context_parallel_attention

        if job["at_step"] is not None and rank == 0:
            _signal_at(job["at_step"], job["signal"])
        if "chunk_rows" in job:
            from nemo_srl.trainers.nemo_aligner import reference

            reference.CHUNK_ROWS = job["chunk_rows"]
        if job.get("lost_at_save") and rank == 1:
            _die_at_the_end_of_save(job["lost_at_save"])

        def adapt_plan(cfg: DictConfig) -> None:
            cpu.adapt_plan(cfg)
            cfg.model.data.share_beginnings = bool(job.get("share_beginnings", True))
            if (size := cfg.model.context_parallel_size) > 1:
                cfg.model.data.share_beginnings = False
                cfg.model.data.pad_length_to_multiple_of *= 2 * size
                context_parallel_attention.install()

        run_session(Path(job["work_dir"]), adapt_plan=adapt_plan)
        if "frozen" in job:
            _save_frozen(f"{job['frozen']}_{rank}")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _save_frozen(path: str) -> None:
    import torch
    from megatron.core.distributed import DistributedDataParallel

    (model,) = (x for x in gc.get_objects() if type(x) is DistributedDataParallel)
    frozen = {name: p.detach() for name, p in model.module.named_parameters() if not p.requires_grad}
    torch.save(frozen, path)


def _signal_at(step: int, number: int) -> None:
    """Send this process a signal when it has made `step` steps, of which the last is in no checkpoint yet."""
    from nemo_srl.trainers.nemo_aligner.metrics import MetricsFile

    log_metrics = MetricsFile.log_metrics

    def log_and_signal(self: MetricsFile, metrics: dict, step_index: int | None = None) -> None:
        log_metrics(self, metrics, step_index)
        if step_index == step - 1 and "train/loss" in metrics:
            os.kill(os.getpid(), number)

    MetricsFile.log_metrics = log_and_signal


def _die_at_the_end_of_save(number: int) -> None:
    """End this process without a word when the other ranks wait for it, at the end of its save number `number`."""
    from nemo_srl.trainers.nemo_aligner import session

    saves = []
    finish = session.finish_checkpoint

    def die(checkpoint_path: object, **more: Any) -> None:
        if checkpoint_path not in saves:
            saves.append(checkpoint_path)
        if len(saves) == number:
            os._exit(9)
        finish(checkpoint_path, **more)

    session.finish_checkpoint = die


if __name__ == "__main__":
    main()
