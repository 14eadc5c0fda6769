"""Shows whether this machine trains correctly: a tiny SFT, DPO and generation, compared with stored results.

The SFT learns its answers by heart, so that the trained model, exported and served by the embedded engine, must give
them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from nemo_srl.config import ClusterConfig
from nemo_srl.config.load import default_settings
from nemo_srl.doctor.findings import Finding, guarded
from nemo_srl.doctor.tiny import EXPECTED, TAUGHT, compare, task, write_model
from nemo_srl.doctor.training import step, write_lesson
from nemo_srl.engines import open_engine
from nemo_srl.errors import NemoSrlError
from nemo_srl.launchers import open_launcher
from nemo_srl.protocols import GenerationRequest, Job, SamplingParams
from nemo_srl.trainers import open_trainer, trainer_backend

MIN_DISK_GB, MIN_MEMORY_GB = 10, 8
"""What the default recipe needs."""


def examine(settings: Any, directory: Path) -> Iterator[Finding]:
    """Yield each finding as soon as it is known. `settings` are a trainer's, and files go to `directory`.

    A check that fails does not end the others.
    """
    yield guarded("platform", lambda: trainer_backend(settings).describe(settings))
    for name, check in (("gpus", _gpus), ("memory", _memory), ("disk", partial(_disk, directory))):
        yield guarded(name, check)
    write_model(directory / "model")
    for algorithm in ("sft", "dpo"):
        yield guarded(algorithm, partial(_train, algorithm, settings, directory))
    yield guarded("generation", partial(_generate, directory / "sft-model"))


def _gpus() -> str:
    if not shutil.which("nvidia-smi"):
        return "none (there is no nvidia-smi)"
    command = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader"]
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        raise NemoSrlError(f"nvidia-smi fails: {done.stdout}{done.stderr}. Install or restart the NVIDIA driver.")
    return "; ".join(f"{line} used" for line in done.stdout.strip().splitlines())


def _memory() -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    text = f"{total:.1f} GB, {os.cpu_count()} cores"
    if total < 0.9 * MIN_MEMORY_GB:  # a machine of 8 GB shows somewhat less
        raise NemoSrlError(f"{text}. The default recipe needs {MIN_MEMORY_GB} GB. Use a smaller model, or more memory.")
    return text


def _disk(directory: Path) -> str:
    free = shutil.disk_usage(directory).free / 1e9
    text = f"{free:.0f} GB free for {directory}"
    if free < MIN_DISK_GB:
        raise NemoSrlError(f"{text}. The default recipe needs {MIN_DISK_GB} GB. Free some, or set run_dir elsewhere.")
    return text


def _train(algorithm: str, settings: Any, directory: Path) -> str:
    """Train and export as a stage does. Raises what the trainer and the launcher do, and for wrong losses."""
    trainer, work_dir = open_trainer(settings), directory / algorithm
    trainer.prepare(task(algorithm, directory / "model"), work_dir)
    lesson = write_lesson(directory, algorithm, settings, model_dir=directory / "model")
    launcher = open_launcher(default_settings("launcher"), ClusterConfig())
    job = Job(name=algorithm, steps=[step(lesson, "train")], log_dir=directory, role="trainer", num_gpus_per_node=1)
    launcher.run(job)
    trainer.export(work_dir, directory / f"{algorithm}-model")
    return compare([float(row["loss"]) for row in trainer.metrics(work_dir)], EXPECTED[algorithm])


def _generate(model_dir: Path) -> str:
    """Let the embedded engine answer, greedily and in float32."""
    from transformers import AutoTokenizer

    if not model_dir.exists():
        raise NemoSrlError("not checked, because the SFT failed")
    tokenizer, settings = AutoTokenizer.from_pretrained(model_dir), default_settings("engine")
    settings.dtype = "float32"
    requests = [GenerationRequest(key=p, prompt_token_ids=tuple(tokenizer.encode(p)), n=1, seed=1) for p in TAUGHT]
    engine = open_engine(settings, model_dir)
    made = engine.generate(requests, SamplingParams(temperature=0, top_p=1, max_tokens=32))
    answers = {completion.request_key: completion.text for several in made for completion in several}
    engine.close()
    if wrong := [
        f"{p!r}: {answers[p]!r} instead of {answer!r}" for p, answer in TAUGHT.items() if answers[p] != answer
    ]:
        raise NemoSrlError(f"the trained model does not answer as it was taught. {'; '.join(wrong)}")
    return f"the trained model answers as it was taught, {len(answers)} of {len(answers)}"
