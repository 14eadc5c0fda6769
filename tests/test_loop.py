"""The whole loop as a user runs it, with the real NeMo-Aligner, on a model that trains in seconds.

One run is left alone. Another is killed again and again, wherever it happens to be, and started again until it ends
(`tools/kill_campaign.py`): both must have published the same bytes.
"""

from __future__ import annotations

import json
import random
import shutil
from functools import partial
from pathlib import Path

import pytest

from tests.tiny_loop import published, start
from tools.kill_campaign import Counts, Disturbed, set_protected


@pytest.fixture(scope="module")
def overrides(tiny_overrides: list[str]) -> list[str]:
    return tiny_overrides


@pytest.fixture(scope="module")
def undisturbed(tiny_run: Path) -> Path:
    return tiny_run


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


def test_a_run_disturbed_again_and_again_ends_with_the_same_bytes(
    tmp_path: Path, overrides: list[str], undisturbed: Path
) -> None:
    counts = Counts()
    # A run needs some 80 seconds of the processors. So it does not end before three kills.
    run = Disturbed(tmp_path, overrides, random.Random(7), counts, longest=12)
    for _ in range(6):
        run.kill()
    run.fault("read-only", partial(set_protected, run.run_dir))
    run.finish(published(undisturbed / "run"))
    assert counts.failures == []
    assert counts.kills.total() >= 3
    assert counts.num_calls > 100


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
    assert changed.wait(60) == 2
    assert "dpo.beta: 0.1 -> 0.3" in (undisturbed / "changed").read_text()
    assert published(run_dir) == before
