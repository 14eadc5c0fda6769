"""The whole loop as a user runs it, with the real NeMo-Aligner, on a model that trains in seconds.

One run is left alone. Another is killed (SIGKILL to the orchestrator and all it started) again and again,
wherever it happens to be, and started again until it ends: both must have published the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from nemo_srl.artifacts import JOURNAL, MANIFEST
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
        "evaluation.num_bootstrap": 50,
    }


@pytest.fixture(scope="module")
def overrides(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return [f"{key}={value}" for key, value in tiny_settings(tmp_path_factory.mktemp("tiny")).items()]


def start(run_dir: Path, overrides: list[str], log: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "recipes" / "iterate.py"), f"run_dir={run_dir}", *overrides]
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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, overrides: list[str]) -> Path:
    base = tmp_path_factory.mktemp("undisturbed")
    process = start(base / "run", overrides, base / "log")
    assert process.wait(600) == 0, (base / "log").read_text()[-4000:]
    return base


def published(run_dir: Path) -> dict[str, tuple[str, str]]:
    """Digest of content and identity of every artifact."""
    found = {}
    for path in sorted(run_dir.glob(f"iter_*/*/{MANIFEST}")):
        manifest = json.loads(path.read_text())
        found[str(path.parent.relative_to(run_dir))] = (manifest["digest"], json.dumps(manifest["identity"]))
    return found


def test_the_loop_ends_with_a_table_and_everything_it_made(undisturbed: Path) -> None:
    run_dir = undisturbed / "run"
    assert set(published(run_dir)) == {
        "iter_00/sft",
        "iter_00/evaluation_m0",
        "iter_00/evaluation",
        *(f"iter_01/{s}" for s in ("prompts", "candidates", "judgements", "pairs", "anchor", "policy", "evaluation")),
    }
    log = (undisturbed / "log").read_text()
    assert "| M0" in log
    assert "| M2" in log
    assert "valid verdicts" in (run_dir / "report.md").read_text()
    pairs = [json.loads(line) for line in (run_dir / "iter_01/pairs/data.jsonl").read_text().splitlines()]
    assert all(p["chosen"] != p["rejected"] and p["chosen_score"] > p["rejected_score"] for p in pairs)


def test_the_trained_models_load_as_hugging_face_models_and_differ(undisturbed: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    m1, m2 = (undisturbed / "run" / part / "hf" for part in ("iter_00/sft", "iter_01/policy"))
    weights = [AutoModelForCausalLM.from_pretrained(m).state_dict()["model.norm.weight"] for m in (m1, m2)]
    assert not weights[0].equal(weights[1])
    assert AutoTokenizer.from_pretrained(m2).chat_template


def test_a_run_killed_again_and_again_ends_with_the_same_bytes(
    tmp_path: Path, overrides: list[str], undisturbed: Path
) -> None:
    rng = random.Random(7)
    run_dir, log = tmp_path / "run", tmp_path / "log"
    journalled: dict[str, int] = {}
    num_kills = 0
    for patience in (2.0, 4.0, 8.0, 11.0, 6.0, 9.0, 7.0):
        process = start(run_dir, overrides, log)
        deadline = time.monotonic() + patience * rng.uniform(0.8, 1.2)
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        num_kills += process.poll() is None
        kill_everything(process)
        for journal in run_dir.glob(f"iter_*/*/{JOURNAL}"):
            calls = journal.read_bytes().count(b"\n")
            key = str(journal.relative_to(run_dir))
            assert calls >= journalled.get(key, 0), "a completed model call was lost"
            journalled[key] = calls
    assert num_kills >= 3
    assert start(run_dir, overrides, log).wait(600) == 0, log.read_text()[-4000:]
    assert published(run_dir) == published(undisturbed / "run")
    for journal in run_dir.glob(f"iter_*/*/{JOURNAL}"):
        calls_made = [json.loads(line) for line in journal.read_text().split("\n")[:-1]]
        keys = [(call["request_key"], call["index"]) for call in calls_made]
        assert len(keys) == len(set(keys)), "a completed model call was repeated"


def test_the_policy_is_the_same_under_pipeline_parallelism_and_the_run_goes_on_with_it(
    tmp_path: Path, overrides: list[str], undisturbed: Path
) -> None:
    from safetensors.torch import load_file

    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed / "run", run_dir)
    for stage in ("policy", "evaluation"):
        shutil.rmtree(run_dir / "iter_01" / stage)
    parallel = [*overrides, "trainer.pipeline_model_parallel_size=2"]
    assert start(run_dir, parallel, tmp_path / "log").wait(600) == 0, (tmp_path / "log").read_text()[-4000:]
    assert "torch.distributed.run" in (run_dir / "logs" / "iter_01-policy.log").read_text()
    one, two = (load_file(d / "iter_01/policy/hf/model.safetensors") for d in (undisturbed / "run", run_dir))
    assert one.keys() == two.keys()
    for name in one:
        assert (one[name] - two[name]).abs().max() < 1e-4, name


def test_a_finished_run_says_so_at_once_and_refuses_changed_settings(overrides: list[str], undisturbed: Path) -> None:
    run_dir, log = undisturbed / "run", undisturbed / "again"
    before = published(run_dir)
    assert start(run_dir, overrides, log).wait(60) == 0
    assert log.read_text().count("kept") == len(before)
    changed = start(run_dir, [*overrides, "dpo.beta=0.3"], undisturbed / "changed")
    assert changed.wait(60) == 1
    assert "dpo.beta: 0.1 -> 0.3" in (undisturbed / "changed").read_text()
    assert published(run_dir) == before
