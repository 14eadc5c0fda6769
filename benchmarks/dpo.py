"""DPO on the CPU: NeMo-Aligner on this project's CPU platform against TRL's DPOTrainer, on the same pairs.

    pip install trl==0.12.2 accelerate
    python benchmarks/dpo.py [--model DIR] [--num-pairs 8] [--steps 6] [--output FILE]

Both train the same model (by default SmolLM2-135M-Instruct) in float32, with the same Adam, a constant learning rate
and the same two rows in a micro-batch. Every step sees every pair, so that the order of rows does not matter. Each
runs in a process of its own, one after the other. The time of a step is from the end of one step to the end of the
next one, with everything in between, also the reference's log-probabilities. The first steps are left out. The losses
are printed side by side: a speed counts only where they agree. Memory is the process's peak resident set.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from nemo_srl.chat import ChatTemplate
from nemo_srl.config import DPOConfig
from nemo_srl.models import resolve
from nemo_srl.protocols import DPORow, TrainingTask

ROOT = Path(__file__).resolve().parents[1]
LEARNING_RATE, BETA, MICRO_BATCH_SIZE = 1e-6, 0.1, 2
NUM_WARMUP_STEPS = 2


def make_rows(model_dir: Path, num_pairs: int) -> list[DPORow]:
    """The best and the worst answer to instructions of the EFT seed."""
    by_instruction: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for line in (ROOT / "data/seed/eft.jsonl").read_text().splitlines():
        row = json.loads(line)
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


def run_ours(model_dir: Path, rows: list[DPORow], steps: int, work_dir: Path) -> dict[str, Any]:
    from nemo_srl.trainers import open_trainer
    from nemo_srl.trainers.nemo_aligner.settings import NemoAlignerSettings

    trainer = open_trainer(NemoAlignerSettings(precision="32", micro_batch_size=MICRO_BATCH_SIZE))
    optim = DPOConfig(
        learning_rate=LEARNING_RATE, min_learning_rate=LEARNING_RATE, beta=BETA, max_epochs=steps,
        global_batch_size=len(rows), save_interval=10**6, gradient_clip_val=1.0,
    )  # fmt: skip
    training, ends = work_dir / "training", list[float]()
    trainer.prepare(TrainingTask(algorithm="dpo", model_dir=model_dir, rows=rows, optim=optim, seed=1234), training)

    def watch() -> None:
        while len(ends) < steps:
            if len(trainer.metrics(training)) > len(ends):
                ends.append(time.perf_counter())
            time.sleep(0.01)

    threading.Thread(target=watch, daemon=True).start()
    trainer.train(training)
    return {"ends": ends, "losses": [step["loss"] for step in trainer.metrics(training)]}


def run_trl(model_dir: Path, rows: list[DPORow], steps: int, work_dir: Path) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig as TRLConfig
    from trl import DPOTrainer

    ends, losses = list[float](), list[float]()

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(time.perf_counter())

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **kwargs: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    args = TRLConfig(
        output_dir=str(work_dir), use_cpu=True, per_device_train_batch_size=MICRO_BATCH_SIZE,
        gradient_accumulation_steps=len(rows) // MICRO_BATCH_SIZE, max_steps=steps, learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant", beta=BETA, adam_beta1=0.9, adam_beta2=0.98, weight_decay=0.0, max_grad_norm=1.0,
        logging_steps=1, save_strategy="no", report_to=[], max_length=1024, max_prompt_length=896, disable_tqdm=True,
    )  # fmt: skip
    model, reference = (AutoModelForCausalLM.from_pretrained(model_dir, torch_dtype=torch.float32) for _ in range(2))
    data = Dataset.from_list([{"prompt": r.prompt, "chosen": r.chosen, "rejected": r.rejected} for r in rows])
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    DPOTrainer(
        model=model, ref_model=reference, args=args, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()]
    ).train()
    return {"ends": ends, "losses": losses}


def child(method: str, model_dir: Path, num_pairs: int, steps: int, output: Path) -> None:
    rows = make_rows(model_dir, num_pairs)
    with tempfile.TemporaryDirectory() as directory:
        run = run_trl if method == "trl" else run_ours
        found = run(model_dir, rows, steps, Path(directory))
    ends = found.pop("ends")
    found["seconds"] = [b - a for a, b in itertools.pairwise(ends)]
    found["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    output.write_text(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--num-pairs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", choices=("trl", "ours"), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    model_dir = resolve(args.model, Path("~/.cache/nemo_srl").expanduser())
    if args.child:
        child(args.child, model_dir, args.num_pairs, args.steps, args.result)
        return
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        for method in ("trl", "ours"):
            result = Path(directory) / f"{method}.json"
            command = [sys.executable, __file__, "--child", method, "--result", str(result), "--model", str(model_dir)]
            command += ["--num-pairs", str(args.num_pairs), "--steps", str(args.steps)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            results[method] = json.loads(result.read_text())
    for name, r in results.items():
        r["median_seconds"] = statistics.median(r["seconds"][NUM_WARMUP_STEPS - 1 :])
        losses = " ".join(f"{x:.4f}" for x in r["losses"])
        print(f"{name:5} {r['median_seconds']:.2f} s a step, peak {r['peak_gb']:.2f} GB, losses {losses}")
    trl, ours = results["trl"], results["ours"]
    speed, memory = trl["median_seconds"] / ours["median_seconds"], ours["peak_gb"] / trl["peak_gb"]
    print(f"speed {speed:.2f} x TRL, memory {memory:.2f} of it")
    if args.output:
        found = {"machine": platform.machine(), "cores": os.cpu_count(), "num_pairs": args.num_pairs, **results}
        args.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
