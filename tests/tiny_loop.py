"""A whole self-rewarding run that takes a minute, as a program: its settings, and how to start, kill and read it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from nemo_srl.artifacts import MANIFEST
from tests.support import RECIPE
from tests.tiny import make_model, texts_of, write_seed

ROOT = Path(__file__).resolve().parent.parent
RUBRIC = "Grade: {instruction} / {response} Score:"


def tiny_settings(base: Path) -> dict[str, Any]:
    """Settings of a run that takes a minute. Writes its seed and its model to `base`."""
    data = write_seed(base / "seed")
    model = make_model(base / "model", texts_of(base / "seed"))
    return {
        **data,
        "model.path": str(model),
        "judge.rubric": f"'{RUBRIC}'",
        "judge.max_tokens": 12,
        "judge.temperature": 1.0,
        "num_iterations": 1,
        "engine.dtype": "float32",
        "trainer.precision": "32",
        "sft.learning_rate": 3e-3,
        "sft.min_learning_rate": 1e-3,
        "sft.max_epochs": 20,
        "sft.global_batch_size": 8,
        "sft.max_seq_length": 128,
        "sft.save_interval": 20,
        "prompts.num_prompts": 6,
        "prompts.min_words": 1,
        "prompts.max_rouge_l": 1.0,
        "prompts.temperature": 1.0,
        "prompts.top_p": 1.0,
        "prompts.max_tokens": 24,
        "prompts.max_rounds": 50,
        "candidates.temperature": 1.0,
        "candidates.max_tokens": 24,
        "trainer.micro_batch_size": 1,
        "prompts.language": "any",
        "dpo.global_batch_size": 2,
        "dpo.max_epochs": 1,
        "dpo.max_seq_length": 128,
        "dpo.save_interval": 1,
    }


def start(run_dir: Path, overrides: Sequence[str], log: Path, *, prefix: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """Start recipes/iterate.py. `prefix` is a command that runs it, such as `setpriv ...`."""
    program = [sys.executable, str(ROOT / "recipes" / "iterate.py"), f"recipe={RECIPE}"]
    command = [*prefix, *program, f"run_dir={run_dir}", *overrides]
    with log.open("ab") as f:
        return subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True)


def kill_everything(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to the orchestrator and whatever it has started, all at once."""
    try:
        orchestrator = psutil.Process(process.pid)
        family = [orchestrator, *orchestrator.children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=60)


def published(run_dir: Path) -> dict[str, tuple[str, str]]:
    """Digest of content and identity of every artifact."""
    found = {}
    for path in sorted(run_dir.glob(f"iter_*/*/{MANIFEST}")):
        manifest = json.loads(path.read_text())
        found[str(path.parent.relative_to(run_dir))] = (manifest["digest"], json.dumps(manifest["identity"]))
    return found
