"""vLLM as the server of a job on a real Slurm (tests/slurm)."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import Cluster, wait_for

pytestmark = pytest.mark.timeout(3600)

ORCHESTRATOR = """
import sys
from pathlib import Path
from nemo_srl.experiment import Experiment
from nemo_srl.records import Prompt
from nemo_srl.stages import candidates
from tests.support import composed
with Experiment(composed(*sys.argv[1:])) as exp:
    source = exp.source(exp.cfg.prompts.path, Prompt)
    exp.run(candidates.STAGE, 1, policy=exp.base_model(), prompts=source)
"""


def test_a_stage_has_its_server_in_its_job(
    cluster: Cluster, tiny_model: Callable[[Path], Path], engine: dict[str, Any]
) -> None:
    base = cluster.shared / "vllm"
    model = tiny_model(base)
    rows = [{"prompt_id": f"p{i}", "text": f"Name color number {i}."} for i in range(4)]
    (base / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "run_dir": base / "run",
        "model.path": model,
        "prompts.path": base / "prompts.jsonl",
        "candidates.max_tokens": 24,
        "engine": "vllm",
        "engine.command": json.dumps(engine["command"]),
        "+engine.extra_options.enforce_eager": "true",
        **{f"engine.{key}": engine[key] for key in ("dtype", "max_num_seqs")},
        "launcher": "slurm",
        "launcher.poll_seconds": 0.5,
        "cluster.exclusive": "false",
        "cluster.time": "'30'",
        "cluster.gpus_per_node": "null",
        "cluster.engine.python": sys.executable,
    }
    process = cluster.start(
        sys.executable, "-c", ORCHESTRATOR, *(f"{key}={value}" for key, value in settings.items()), log=base / "log"
    )
    assert process.wait(1800) == 0, (base / "log").read_text()[-4000:]
    made = [json.loads(line) for line in (base / "run/iter_01/candidates/data.jsonl").read_text().splitlines()]
    assert len({row["response"] for row in made}) == 16
    (path,) = (base / "run/logs").glob("servers-*-vllm-0.log")
    log = path.read_text()
    assert log.count('"POST /v1/completions HTTP/1.1" 200 OK') == 4
    wait_for(lambda: cluster.run("squeue", "--noheader") == "")
