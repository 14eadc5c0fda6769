"""Part `run` of gpu.py: the default recipe as a whole, from M0 to the report, with the time of each stage."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from gpu_session import ROOT, Session

from nemo_srl import models
from nemo_srl.errors import ModelError

DEFAULT_MODEL = "smollm2-135m-instruct"
RANDOM_SHAPE = "SmolLM2-135M-Instruct"
UNTRAINED = {"num_iterations": 1, "sft.learning_rate": 1e-3, "sft.min_learning_rate": 1e-4, "sft.max_epochs": 10}
"""Settings with which a model of random weights learns how verdicts look, so that there are pairs to train on."""
SMALL = {"candidates.max_tokens": 24, "judge.num_judgements": 1, "evaluation.num_prompts": 2}
NUM_PROMPTS = 24


def run(session: Session, model: str) -> None:
    """`model` is a directory, a name that can be fetched, "random", or "": the default model if it can be had."""
    path, is_random = find_model(session, model)
    if path is None:
        return
    name = (
        f"one iteration from random weights, {Path(path).parent.name}" if is_random else f"default, {Path(path).name}"
    )
    run_dir, log = session.directory / "run", session.directory / "run.log"
    settings = {"run_dir": run_dir, "model.path": path}
    settings |= {"engine.device": session.device, "trainer.platform": session.device}
    if is_random:
        # It could not write instructions of its own.
        settings |= {**UNTRAINED, "prompts.path": write_prompts(session.directory / "prompts.jsonl")}
    settings |= SMALL if session.small else {}
    command = [sys.executable, str(ROOT / "recipes" / "iterate.py"), *(f"{k}={v}" for k, v in settings.items())]
    started = time.monotonic()
    reason = session.run(command, log)
    seconds, stages = time.monotonic() - started, stage_seconds(run_dir)
    times = ", ".join(f"{stage} {value:.0f}" for stage, value in stages.items())
    values = {"seconds": seconds, "stages": stages, "model": path}
    if reason:
        session.add(name, f"failed: {reason}. Done until then, in s: {times}", failed=True, values=values)
    else:
        session.add(name, f"{seconds:.0f} s; stages, in s: {times}", values=values)


def find_model(session: Session, model: str) -> tuple[str | None, bool]:
    """M0, and whether it has random weights. None if it cannot be made."""
    if model not in ("", "random"):
        return model, False
    if not model and not session.small:
        try:
            return str(models.resolve(DEFAULT_MODEL, Path("~/.cache/nemo_srl").expanduser())), False
        except ModelError as e:
            print(f"{e}\nA model with random weights takes its place.")
    directory = session.model("tiny" if session.small else RANDOM_SHAPE)
    return (str(directory / "model") if directory else None), True


def write_prompts(path: Path) -> Path:
    """Instructions of the seed in the place of new ones."""
    rows = [json.loads(line) for line in (ROOT / "data/seed/ift.jsonl").read_text().splitlines()[:NUM_PROMPTS]]
    lines = [json.dumps({"prompt_id": row["example_id"], "text": row["instruction"]}) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def stage_seconds(run_dir: Path) -> dict[str, float]:
    """The seconds of every published stage, in the order in which they ended."""
    manifests = sorted(run_dir.glob("iter_*/*/manifest.json"), key=lambda path: path.stat().st_mtime)
    return {str(path.parent.relative_to(run_dir)): json.loads(path.read_text())["seconds"] for path in manifests}
