"""One training step on the CPU: this project against TRL, and against an earlier version of itself.

    python -m venv trl && trl/bin/pip install trl==1.16.0          # it needs a newer transformers than NeMo
    python benchmarks/dpo.py --trl-python trl/bin/python [--output FILE]
    git worktree add earlier 7c0ccd5
    python benchmarks/dpo.py --against earlier --sft [--output FILE]

All train the same model (by default SmolLM2-135M-Instruct) in float32 on the same rows, with the same Adam and a
constant learning rate.

DPO: pairs of the EFT seed. Every step sees every pair, so that the order of rows does not matter. TRL runs in both of
its modes: with a reference model in every step, and with the reference's log-probabilities computed before the first
step (`precompute_ref_log_probs`), which is not part of any step's time. Activation checkpointing, which TRL turns on by
itself, is off: it saves memory and takes time.
SFT (`--sft`): the rows and the batches of `conf/recipe/srl-smollm2-135m-cpu.yaml`. A micro-batch
has as many rows as the recipe says, and in the earlier version as many as its recipe said.

Each training is a process of its own. They take turns, `--rounds` times. The time of a step is from the end of one step
to the end of the next one, with everything in between. The first two steps are left out, and the medians of all rounds
are compared. One more step at the end is not timed but profiled: it tells the share of matrix products, which no
trainer can do without. Memory is the process's peak resident set. Losses are printed side by side: a speed counts only
where they agree. In SFT, versions before 7907863 average them in another way, so there they agree roughly.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from nemo_srl import cli
from nemo_srl.chat import ChatTemplate
from nemo_srl.config import Config, load
from nemo_srl.judging import reader
from nemo_srl.models import resolve
from nemo_srl.protocols import DPORow, SFTRow
from nemo_srl.records import EFTExample

ROOT = Path(__file__).resolve().parents[1]
DPO = {"learning_rate": 1e-6, "beta": 0.1, "micro_batch_size": 2, "max_length": 1024}
NUM_WARMUP_STEPS = 2


@dataclass(frozen=True)
class Method:
    """How to run one of the trainings."""

    python: str
    program: str
    package_dir: Path | None = None
    """Where its package `nemo_srl` lies."""
    precompute: bool = False
    micro_batch_size: int | None = None
    """None: that of the task."""

    def run(self, task: dict[str, Any], directory: Path) -> dict[str, Any]:
        task_file, result_file = directory / "task.json", directory / "result.json"
        own = {"precompute": self.precompute, "micro_batch_size": self.micro_batch_size or task["micro_batch_size"]}
        task_file.write_text(json.dumps(task | own))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(directory / "cache")}
        environment.pop("PYTHONPATH", None)
        if self.package_dir:
            environment["PYTHONPATH"] = str(self.package_dir)
        command = [self.python, str(ROOT / "benchmarks" / self.program), str(task_file), str(result_file)]
        subprocess.run(command, check=True, env=environment, cwd=self.package_dir, stdout=subprocess.DEVNULL)
        found: dict[str, Any] = json.loads(result_file.read_text())
        return found


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def dpo_rows(model_dir: Path, num_pairs: int) -> list[DPORow]:
    """The best and the worst answer to instructions of the EFT seed."""
    by_instruction: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in read_json_lines(ROOT / "data/seed/eft.jsonl"):
        by_instruction[row["instruction"]].append(row)
    chat, rows = ChatTemplate(model_dir), []
    for instruction, answers in by_instruction.items():
        best, worst = max(answers, key=lambda x: x["score"]), min(answers, key=lambda x: x["score"])
        if best["score"] > worst["score"] and best["response"] and worst["response"]:
            rows.append(
                DPORow(
                    prompt=chat.render(instruction), chosen=best["response"], rejected=worst["response"],
                    chosen_reward=float(best["score"]), rejected_reward=float(worst["score"]),
                )
            )  # fmt: skip
    return rows[:num_pairs]


def recipe() -> Config:
    """The recipe with the measured rows."""
    cli.register_schemas((), schema=Config)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return load(compose("iterate", overrides=["run_dir=unused", "recipe=srl-smollm2-135m-cpu"]), Config)


def sft_rows(model_dir: Path, cfg: Config, num_rows: int) -> list[SFTRow]:
    """A sample of the recipe's rows: answers, and verdicts on answers."""
    chat, lesson = ChatTemplate(model_dir), reader(cfg.judge).lesson
    texts = [(x["instruction"], x["response"]) for x in read_json_lines(ROOT / cfg.data.ift_path)]
    texts += [lesson(EFTExample(**x), cfg.judge) for x in read_json_lines(ROOT / str(cfg.data.eft_path))]
    rows = [SFTRow(prompt=chat.render(prompt), response=chat.response_text(answer)) for prompt, answer in texts]
    return random.Random(0).sample(rows, num_rows)


def make_task(args: argparse.Namespace, model_dir: Path) -> dict[str, Any]:
    """What the programs of all methods read. The last of its steps is the one that is profiled."""
    steps = args.steps + 1
    if args.sft:
        cfg = recipe()
        size = cfg.sft.global_batch_size
        rows: list[Any] = sft_rows(model_dir, cfg, size * steps)
        settings = {
            "learning_rate": cfg.sft.learning_rate, "max_length": cfg.sft.max_seq_length,
            "micro_batch_size": cfg.trainer.micro_batch_size,
        }  # fmt: skip
    else:
        rows, size, settings = dpo_rows(model_dir, args.num_pairs), args.num_pairs, DPO
    return {
        "algorithm": "sft" if args.sft else "dpo",
        "model_dir": str(model_dir),
        "rows": [asdict(row) for row in rows],
        "batch_size": size,
        "epochs": 1 if args.sft else steps,
        "steps": steps,
        **settings,
    }


def make_methods(args: argparse.Namespace) -> dict[str, Method]:
    methods = {"nemo_srl": Method(sys.executable, "training_nemo_srl.py", ROOT)}
    if args.against:
        size = args.earlier_micro_batch_size if args.sft else None
        methods["earlier"] = Method(
            sys.executable, "training_nemo_srl.py", args.against.resolve(), micro_batch_size=size
        )
    if args.trl_python and not args.sft:
        # Not resolved: a virtual environment is found by the name of its link to the interpreter.
        python = str(args.trl_python.absolute())
        methods["trl"] = Method(python, "training_trl.py")
        methods["trl, precomputed"] = Method(python, "training_trl.py", precompute=True)
    return methods


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the rounds of one method."""
    seconds = [t for run in runs for t in run["seconds"][NUM_WARMUP_STEPS - 1 :]]
    return {
        "median_seconds": statistics.median(seconds),
        "seconds": [run["seconds"] for run in runs],
        "losses": runs[0]["losses"],
        "same_losses_in_all_rounds": all(run["losses"] == runs[0]["losses"] for run in runs),
        "peak_gb": max(run["peak_gb"] for run in runs),
        "products": statistics.median(run["products"] for run in runs),
        "attention": statistics.median(run["attention"] for run in runs),
        "num_threads": runs[0]["num_threads"],
    }


def print_table(results: dict[str, dict[str, Any]]) -> None:
    ours = results["nemo_srl"]
    print(f"{'':17} s a step  speed of nemo_srl  peak GB  memory of nemo_srl  products  attention kernel  losses")
    for name, r in results.items():
        speed, memory = r["median_seconds"] / ours["median_seconds"], ours["peak_gb"] / r["peak_gb"]
        losses = " ".join(f"{x:.4f}" for x in r["losses"])
        print(
            f"{name:17} {r['median_seconds']:8.2f}  {speed:16.2f}x  {r['peak_gb']:7.2f}  {memory:17.2f}x  "
            f"{r['products']:8.0%}  {r['attention']:16.0%}  {losses}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--sft", action="store_true", help="SFT instead of DPO")
    parser.add_argument("--num-pairs", type=int, default=8, help="in a step of DPO")
    parser.add_argument("--steps", type=int, default=6, help="in each round, without the one that is profiled")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--trl-python", type=Path, help="an interpreter that has TRL")
    parser.add_argument("--against", type=Path, help="a checkout of an earlier version of this project")
    parser.add_argument("--earlier-micro-batch-size", type=int, default=4, help="of its SFT; 4 was its recipe's")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    methods = make_methods(args)
    if len(methods) == 1:
        parser.error("nothing to compare with: give --against, or --trl-python for DPO")
    if args.steps <= NUM_WARMUP_STEPS:
        parser.error(f"--steps: must be above {NUM_WARMUP_STEPS}, because these are not counted")
    task = make_task(args, resolve(args.model, Path("~/.cache/nemo_srl").expanduser()))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in methods}
    for number in range(args.rounds):
        for name, method in methods.items():
            print(f"round {number + 1} of {args.rounds}: {name}", file=sys.stderr)
            with tempfile.TemporaryDirectory() as directory:
                runs[name].append(method.run(task, Path(directory)))
    results = {name: summary(found) for name, found in runs.items()}
    print_table(results)
    if args.output:
        settings = {key: task[key] for key in ("algorithm", "batch_size", "micro_batch_size", "steps")}
        found = {"machine": platform.machine(), "cores": os.cpu_count(), "rounds": args.rounds, **settings, **results}
        args.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
