"""What TensorRT-LLM takes, as recorded, and its refusals of what it does not take."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CONTRACT = Path(__file__).parent / "contracts" / "trtllm-1.2.json"


def contract() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(CONTRACT.read_text())
    return found


def unknown_names(section: str, given: Mapping[str, Any]) -> list[str]:
    return sorted(set(given) - set(contract()[section]))


def problem_with_options(options: Mapping[str, Any]) -> str:
    """What TensorRT-LLM would refuse in options of its LLM API. Empty if nothing."""
    for section, part in (
        ("llm_args", options),
        ("kv_cache_config", options.get("kv_cache_config", {})),
        ("scheduler_config", options.get("scheduler_config", {})),
        ("cuda_graph_config", options.get("cuda_graph_config", {})),
    ):
        if unknown := unknown_names(section, part):
            return f"Extra inputs are not permitted: {section} {unknown}"
    policy = options.get("scheduler_config", {}).get("capacity_scheduler_policy", "MAX_UTILIZATION")
    return "" if policy in contract()["capacity_scheduler_policy"] else f"capacity_scheduler_policy {policy}"
