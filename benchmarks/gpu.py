"""Everything on one GPU, in at most 8 minutes: correct losses, the speed of DPO and of generation, the plan, a run.

    python benchmarks/gpu.py                       # all parts; writes benchmarks/results/gpu.json
    python benchmarks/gpu.py --trl-path DIR        # DIR has TRL, which needs a newer transformers than NeMo
    python benchmarks/gpu.py --only losses,generation
    python benchmarks/gpu.py --device cpu --small --seconds 1800   # a dry run without a GPU, with a tiny model

The parts, in their order:

    losses      SFT and DPO of a tiny model: the trainer's CPU platform against its CUDA platform
    generation  tokens/s of the embedded engine against HF `generate` and transformers' continuous batching, bfloat16
    dpo-1b      one DPO step of a Llama-3.2-1B's shape in bf16-O2: tokens/s, memory and MFU, against TRL and the plan
    run         the default recipe from M0 to the report, with the time of each stage
    dpo-3b      as dpo-1b

Every measurement has a process of its own. One that fails is a row of the table, and the exit status is then 1. The
others go on. A part that is not done when its time is over has failed, too. After every measurement, the JSON file has
all rows so far, with the figures behind them.

The time of a training step is the median of 10, after 3 that warm up, from the end of one step to the end of the next.
MFU is model FLOPs per second (gpu_device.training_flops) over the GPU's dense bfloat16 peak by its data sheet.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import gpu_dpo
import gpu_generation
import gpu_losses
import gpu_run
from gpu_session import Session, table


@dataclass(frozen=True)
class Part:
    """`share` of the whole time is the most that it may take. The last part has less if others took all of theirs."""

    run: Callable[[Session], None]
    share: float


def parts(model: str) -> dict[str, Part]:
    return {
        "losses": Part(gpu_losses.run, 0.2),
        "generation": Part(gpu_generation.run, 0.35),
        "dpo-1b": Part(partial(gpu_dpo.run, part="dpo-1b"), 0.5),
        "run": Part(partial(gpu_run.run, model=model), 0.5),
        "dpo-3b": Part(partial(gpu_dpo.run, part="dpo-3b"), 0.5),
    }


def run(session: Session, chosen: dict[str, Part], *, seconds: float) -> None:
    """Run the parts one after the other."""
    ends = time.monotonic() + seconds
    session.begin("machine", seconds)
    machine = session.measure("device", "gpu_device.py", {})
    if machine is None:
        return
    session.about["machine"] = machine
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    session.add(
        machine["name"],
        f"peak {machine['peak_tflops']:.3g} TFLOP/s ({machine['peak_source']}), large matrix product "
        f"{machine['matmul_tflops']:.3g} TFLOP/s; Python {machine['python']}, {versions}",
    )
    for name, part in chosen.items():
        session.begin(name, min(part.share * seconds, ends - time.monotonic()))
        try:
            part.run(session)
        except Exception as e:  # such as a figure that is missing: the other parts go on
            session.fail(name, f"{type(e).__name__}: {e}")


def main() -> None:
    known = parts("")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models, to try every part; no goal is judged")
    parser.add_argument("--only", default=",".join(known), help="the parts to run, with commas between them")
    parser.add_argument("--seconds", type=float, default=480.0, help="for all parts together")
    parser.add_argument(
        "--model", default="", help="M0 of the part `run`: a directory, a name that can be fetched, or random; without "
        "it smollm2-135m-instruct, or random weights if that cannot be had",
    )  # fmt: skip
    parser.add_argument("--trl-path", type=Path, help="a folder for PYTHONPATH with TRL and its needs")
    parser.add_argument("--work-dir", type=Path, help="keeps models, logs and the run here; at least 40 GB")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/gpu.json"))
    args = parser.parse_args()
    wanted = args.only.split(",")
    if unknown := sorted(set(wanted) - set(known)):
        parser.error(f"--only={args.only}: there is no part {unknown[0]!r}. The parts are {', '.join(known)}.")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if args.work_dir:
        args.work_dir.mkdir(parents=True, exist_ok=True)
    directory = Path(tempfile.mkdtemp(prefix="gpu-", dir=args.work_dir))
    session = Session(
        directory=directory, output=args.output, device=args.device, small=args.small, trl_path=args.trl_path
    )
    session.about["date"] = date.today().isoformat()
    chosen = {name: part for name, part in parts(args.model).items() if name in wanted}
    try:
        run(session, chosen, seconds=args.seconds)
    finally:
        print(f"\n{table(session.rows)}\n\n{args.output} has all figures.")
        if not args.work_dir:
            shutil.rmtree(directory)
    if failed := [row for row in session.rows if row.failed]:
        sys.exit(f"error: {len(failed)} of {len(session.rows)} rows failed.")


if __name__ == "__main__":
    main()
