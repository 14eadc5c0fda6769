"""How often servers start in a run: once for all stages in a row that ask one model."""

from __future__ import annotations

import pytest

from nemo_srl import estimates, server_starts
from nemo_srl.config import Config
from nemo_srl.workload import Assumptions
from tests.support import composed


def starts(cfg: Config) -> list[tuple[str, int]]:
    """The stages for which servers start, and their GPUs."""
    return [(x.stage, x.num_gpus) for x in server_starts.served(cfg) if x.starts]


def test_the_default_run_starts_each_model_once_and_m1_again_for_the_anchor() -> None:
    cfg = composed("engine=trtllm")
    assert cfg.num_iterations == 2
    assert [stage for stage, _ in starts(cfg)] == [
        "evaluation", "evaluation", "evaluation", "anchor", "evaluation",
    ]  # fmt: skip
    assert len(server_starts.served(cfg)) == 12, "a start for each stage"
    assert starts(composed("engine=embedded")) == []


def test_small_work_starts_few_replicas_and_uses_more_where_they_run() -> None:
    cfg = composed(recipe="srl-llama2-70b-8n8g-tp8pp4")
    assert starts(cfg) == [
        ("prompts", 8), ("evaluation", 8), ("evaluation", 16), ("evaluation", 16), ("anchor", 8), ("evaluation", 8),
    ]  # fmt: skip
    anchors = [x.num_gpus for x in server_starts.served(cfg) if x.stage == "anchor"]
    assert anchors == [16, 8], "the first one finds M1's servers"


def test_a_hosted_judge_has_no_servers() -> None:
    hosted = ("+engine@judge.engine=openai", "judge.engine.base_url=http://host/v1")
    cfg = composed("engine=trtllm", *hosted)
    assert {x.stage for x in server_starts.served(cfg)} == {"prompts", "candidates", "evaluation"}


def test_a_refresh_asks_the_model_before_it_once_more() -> None:
    cfg = composed("engine=trtllm", "data.rankings_path=ranked.jsonl", "num_iterations=1")
    assert [stage for stage, _ in starts(cfg)] == ["evaluation", "evaluation", "eft", "evaluation"]


def test_the_plan_of_70b_needs_half_of_what_a_start_for_each_stage_on_8_nodes_did() -> None:
    cfg, a = composed(recipe="srl-llama2-70b-8n8g-tp8pp4"), Assumptions()
    fewer, minutes, gpu_hours = estimates.saved_by_sharing(cfg, a)
    assert (fewer, minutes) == (6, 90)
    assert gpu_hours == pytest.approx(12 * 16 / 4 - 16)


def test_minutes_that_are_saved_in_one_allocation_are_those_of_all_its_gpus_and_no_container() -> None:
    cfg = composed("launcher=srun", recipe="srl-llama2-70b-8n8g-tp8pp4")
    assert estimates.saved_by_sharing(cfg, Assumptions()) == (6, 60, pytest.approx(64))
