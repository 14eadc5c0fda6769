"""The whole loop on TensorRT-LLM's stand-in: servers start on M0, M1 and M2, answer with them, and are gone after."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from nemo_srl import estimates
from tests.support import RECIPE, composed
from tests.test_loop import overrides
from tests.tiny_loop import ROOT

__all__ = ["overrides"]  # a fixture


def test_the_loop_on_servers(tmp_path: Path, overrides: list[str]) -> None:
    path = f"{ROOT / 'tests' / 'stubs'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = [
        sys.executable, str(ROOT / "recipes" / "iterate.py"), f"recipe={RECIPE}", f"run_dir={tmp_path / 'run'}",
        *overrides, "engine=trtllm", "engine.max_concurrency=8",
    ]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, "PATH": path}, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "| M2" in done.stdout
    logs = {path.name: path.read_text() for path in (tmp_path / "run" / "logs").glob("*-trtllm-0.log")}
    assert set(logs) == {f"iter_{job}-trtllm-0.log" for job in ("00-evaluation_m0", "00-evaluation", "01-evaluation")}
    for stage, model in (
        ("iter_00-evaluation_m0", "model"),
        ("iter_00-evaluation", "iter_00/sft/hf"),
        ("iter_01-evaluation", "iter_01/policy/hf"),
    ):
        assert f"{model} on GPUs 0" in logs[f"{stage}-trtllm-0.log"]
    # All stages that ask M1 share one start of its servers.
    kept = [line.split()[-1] for line in logs["iter_00-evaluation-trtllm-0.log"].splitlines() if "kept for" in line]
    assert kept == [f"iter_01-{stage}" for stage in ("prompts", "candidates", "judgements", "anchor")]
    starts = sum(log.count("serving ") for log in logs.values())
    assert starts == estimates.num_server_starts(composed(*overrides, "engine=trtllm")), (
        "as recipes/plan.py counts them"
    )
    identity = json.loads((tmp_path / "run" / "iter_01" / "candidates" / "manifest.json").read_text())["identity"]
    assert identity["engine.name"] == "trtllm"
    listed = subprocess.run(["ps", "-ef"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path) not in listed
