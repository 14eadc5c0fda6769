"""Runs trainings for the tests in forks of one process that has imported NeMo once (12 s instead of 12 s each).

Started as `python -m tests.trainer_fork_server`. Reads a JSON object a line from standard input,
`{"work_dir": ..., "num_ranks": 2, "at_step": null, "signal": null}`, runs one process per rank and answers with a line
`{"exit_codes": [0, 0]}`. With `"lost_at_save": 2`, rank 1 is gone when its second save ends. With `"chunk_rows": 3`,
three rows make a chunk of the reference's log-probabilities. With `"share_beginnings": 0`, every sequence is whole, as
on the other platforms. With `"length": 128`, all are padded to that, as `ub_tp_comm_overlap` plans it. With `"frozen":
path`, each rank puts what it does not train into the file `path`, as it is at the end. With `"logits": path`, the
model's logits before the first step are in the file `path`. With `"rows": path`, each rank adds a line for each step to
the file `path`_<rank>, the numbers of the rows. With context parallelism, attention is that of
`context_parallel_attention`. Everything that the ranks print goes to `<work_dir>/log_<rank>.txt`.

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
        if "rows" in job:
            _record_rows(Path(f"{job['rows']}_{rank}"))
        if "logits" in job:
            _save_logits(Path(job["work_dir"]), job["logits"])

        def adapt_plan(cfg: DictConfig) -> None:
            cpu.adapt_plan(cfg)
            cfg.model.data.share_beginnings = bool(job.get("share_beginnings", True))
            cfg.model.data.pad_length_to_multiple_of = job.get("length", cfg.model.data.pad_length_to_multiple_of)
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


def _record_rows(path: Path) -> None:
    from nemo_srl.trainers.nemo_aligner import divergence

    inner = divergence.watch

    def watch(loop: Any, *more: Any) -> None:
        inner(loop, *more)
        step = loop.train_single_step

        def train_single_step(batch: dict[str, Any]) -> Any:
            with path.open("a") as file:
                file.write(json.dumps(batch["row"].tolist()) + "\n")
            return step(batch)

        loop.train_single_step = train_single_step

    divergence.watch = watch


def _save_logits(work_dir: Path, path: str) -> None:
    """When the model is ready, save `tokens` [rows, sequence] of the training's rows and their `logits` in `path`.

    The logits are those of every token, padding included, over the whole vocabulary: [rows, sequence, vocabulary].
    """
    from nemo_srl.trainers.nemo_aligner import session

    prepare = session._compute_what_is_needed

    def prepare_and_save(model: Any, cfg: DictConfig) -> Any:
        micro_batches = prepare(model, cfg)
        _write_logits(model, micro_batches, work_dir, path)
        return micro_batches

    session._compute_what_is_needed = prepare_and_save


def _write_logits(model: Any, micro_batches: Any, work_dir: Path, path: str) -> None:
    import torch
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
    from safetensors.torch import save_file

    from nemo_srl.trainers.nemo_aligner.batches import round_up
    from nemo_srl.trainers.nemo_aligner.data import TRAIN_FILE, read_rows

    of_rows = [r["prompt_ids"] + r.get("response_ids", r.get("chosen_ids")) for r in read_rows(work_dir / TRAIN_FILE)]
    rows = [torch.tensor(ids) for ids in of_rows]
    length = round_up(max(map(len, rows)), micro_batches.multiple)
    tokens = torch.stack([torch.nn.functional.pad(ids, (0, length - len(ids))) for ids in rows])
    positions = torch.arange(length).expand_as(tokens)
    micro_batches._targets.set(torch.arange(tokens.numel()))  # every token is one

    def forward(_: object, module: Any) -> tuple[torch.Tensor, Any]:
        return module(tokens, positions, None), lambda output, **_: output

    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward, data_iterator=None, model=model.model, num_microbatches=1, forward_only=True,
            seq_length=length, micro_batch_size=len(rows), collect_non_loss_data=True,
        )  # fmt: skip
    if parallel_state.is_pipeline_last_stage():
        logits = gather_from_tensor_model_parallel_region(outputs[0]).reshape(length, len(rows), -1).transpose(0, 1)
        if parallel_state.get_tensor_model_parallel_rank() == 0:
            save_file({"tokens": tokens, "logits": logits.float().contiguous()}, path)


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
