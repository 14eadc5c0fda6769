"""Part `generation` of gpu.py: the embedded engine against transformers, with the same tokens to make.

`gpu_generation.py CASE_FILE RESULT_FILE` measures the embedded engine.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gpu_session import Session

SHAPES = ("SmolLM2-135M-Instruct", "Llama-3.2-1B-Instruct")
MIN_SPEEDUP = 5.0
"""Over `generate` in static batches."""
TOP_P = 0.9
BATCH_SIZE, SMALL_BATCH_SIZE = 256, 8


def run(session: Session) -> None:
    for shape in ("tiny",) if session.small else SHAPES:
        if (directory := session.model(shape)) is None:
            continue
        config = json.loads((directory / "model" / "config.json").read_text())
        case = {
            "model": directory / "endless", "workloads": directory / "workloads.json", "top_p": TOP_P,
            "temperature": temperature(config), "batch_size": SMALL_BATCH_SIZE if session.small else BATCH_SIZE,
            "unused_token": config["vocab_size"], "kind": "generation",
        }  # fmt: skip
        ours = session.measure(f"{shape}, embedded", "gpu_generation.py", case)
        if ours is None:
            continue
        session.add(f"{shape}, embedded", rates(ours), values=ours)
        for method, name in (("static batches", "HF generate"), ("continuous batching", "HF continuous batching")):
            found = session.measure(f"{shape}, {name}", "gpu_peers.py", {**case, "method": method}, peers=True)
            if found is not None:
                ratio = total_seconds(found) / total_seconds(ours)
                is_goal = method == "static batches"
                session.add(
                    f"{shape}, {name} (transformers {found['versions']['transformers']})",
                    f"{rates(found)}. embedded: {ratio:.2f} x as fast",
                    goal=f"{MIN_SPEEDUP:g} x as fast" if is_goal else "",
                    reached=ratio >= MIN_SPEEDUP if is_goal and not session.small else None,
                    values={**found, "speedup": ratio},
                )


def temperature(config: Mapping[str, Any]) -> float:
    """At this temperature, top-p keeps a few tokens, as with a trained model.

    With weights of standard deviation 0.02, logits have that of 0.02 * sqrt(hidden_size). At temperature 1 nearly the
    whole vocabulary would be in top-p, and sampling would take another path than in a real run.
    """
    return 0.02 * math.sqrt(config["hidden_size"]) / 8


def rates(found: Mapping[str, Any]) -> str:
    parts = [f"{name} {x['num_tokens'] / x['seconds']:,.0f}" for name, x in found["workloads"].items()]
    return f"{', '.join(parts)} tokens/s"


def total_seconds(found: Mapping[str, Any]) -> float:
    """Of all workloads. Their numbers of tokens are equal, so a ratio of times is one of rates."""
    return sum(x["seconds"] for x in found["workloads"].values())


def measure(case: Mapping[str, Any]) -> dict[str, Any]:
    """Tokens and seconds of each workload by the embedded engine."""
    from generation_workloads import Workload

    from nemo_srl.engines import open_engine
    from nemo_srl.engines.embedded.settings import EmbeddedSettings
    from nemo_srl.protocols import SamplingParams

    settings = EmbeddedSettings(dtype="bfloat16", device=case["device"], max_batch_size=case["batch_size"])
    engine = open_engine(settings, Path(case["model"]))

    def generate(workload: Workload) -> int:
        params = SamplingParams(temperature=case["temperature"], top_p=case["top_p"], max_tokens=workload.max_tokens)
        return sum(c.num_tokens for several in engine.generate(workload.requests(), params) for c in several)

    found = {}
    for fields in json.loads(Path(case["workloads"]).read_text()):
        workload = Workload(**{**fields, "prompts": [tuple(x) for x in fields["prompts"]]})
        generate(replace(workload, max_tokens=2))  # warms up
        start = time.perf_counter()
        num_tokens = generate(workload)
        found[workload.name] = {"num_tokens": num_tokens, "seconds": time.perf_counter() - start}
    return {"workloads": found}


if __name__ == "__main__":
    found = measure(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(found))
