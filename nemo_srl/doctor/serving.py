"""The recipe's engine on a tiny model, through the client that stages use.

`python -m nemo_srl.doctor.serving ASKED.json` runs in the engine's container while the job's servers run. It asks for
samples with and without log-probabilities, and keeps one answer as the server sent it.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_srl import engines, jsonio, registry
from nemo_srl.artifacts import read_json, write_atomic
from nemo_srl.doctor import sampling
from nemo_srl.doctor.findings import Finding, not_checked
from nemo_srl.errors import NemoSrlError
from nemo_srl.protocols import SERVICES_VARIABLE, GenerationRequest, JobStep, SamplingParams
from nemo_srl.records import Completion

if TYPE_CHECKING:
    from nemo_srl.doctor.site import Site

ASKED, RESULT = "serving.json", "serving-result.json"
NUM_LOGPROBS = 20
REMEDY_START = (
    "The end of the server's log says why. In a job of Slurm, a bare trtllm-serve (engine.command) is started by "
    "mpirun, which the image must have. If MPI takes the step for its own, set cluster.mpi=none. Use the image of "
    "containers/trtllm.Dockerfile (TensorRT-LLM 1.2.1)."
)
REMEDY_SAMPLES = (
    "The server samples otherwise than it was asked. Attach this report to an issue. To go on now, use another engine "
    "(engine=vllm), or another version of the server."
)
REMEDY_LOGPROBS = "Use judge.mode=sampled, or an engine that gives them (engine=vllm)."


def settings(site: Site) -> Any:
    """The recipe's engine with one replica on each node, which has at most the model's heads as GPUs."""
    from nemo_srl.doctor.site import with_known

    size, nodes = site.engine_size, site.engine_nodes
    tensor = max(t for t in (1, 2, 4, 8) if t <= min(size.tensor_parallel_size, sampling.HEADS))
    return with_known(
        site.cfg.engine, num_nodes=nodes, num_replicas=nodes, tensor_parallel_size=tensor, pipeline_parallel_size=1,
        max_seq_len=None, max_model_len=None, max_concurrency=min(32, getattr(site.cfg.engine, "max_concurrency", 32)),
    )  # fmt: skip


def check(site: Site) -> Iterator[Finding]:
    """Start the servers on two nodes at most, ask them, and compare with arithmetic."""
    engine = site.cfg.engine
    tried = f"engine={engine.name} on a tiny model with two ends: n={sampling.N}, mixed lengths, end tokens, logprobs"
    if not site.engine_size.num_replicas and not site.engine_size.in_process and engine.name == "openai":
        yield not_checked("serving", "engine=openai: its servers are not this cluster's, and have their own model",
                          tried=tried)  # fmt: skip
        return
    model_dir, chosen = site.directory / "known-model", settings(site)
    sampling.write_model(model_dir)
    services = engines.services(chosen, model_dir, site.directory / "servers")
    asked = site.write(ASKED, {"engine": asdict(chosen), "model_dir": str(model_dir), "directory": str(site.directory)})
    nodes = 1 + max((s.node for s in services), default=0)
    gpus = max(sum(s.num_gpus for s in services if s.node == node) for node in range(nodes))
    step = JobStep(name="ask", command=["-m", "nemo_srl.doctor.serving", str(asked)])
    job = site.job("serving", [step], role="engine", num_nodes=nodes, services=services,
                   num_gpus_per_node=gpus or site.engine_size.gpus_per_replica)  # fmt: skip
    try:
        site.run(job)
        found = site.read(RESULT)
    except NemoSrlError as e:
        yield Finding(name="serving", ok=False, text=str(e), tried=tried, remedy=REMEDY_START)
        return
    yield judge_samples(found, tried)
    yield judge_logprobs(found, is_needed=site.cfg.judge.mode == "expected")


def judge_samples(found: dict[str, Any], tried: str) -> Finding:
    """`found` is what `ask` wrote."""
    name, given = "serving.samples", found["samples"]
    if "error" in given:
        return Finding(name=name, ok=False, text=given["error"], tried=tried, remedy=REMEDY_SAMPLES)
    completions = [Completion(**row) for row in given["completions"]]
    problems = list(sampling.problems(completions))
    reasons = ", ".join(f"{n} {reason}" for reason, n in sorted(Counter(c.finish_reason for c in completions).items()))
    text = f"{len(completions)} samples ({reasons})"
    if sent := _as_sent(found.get("raw")):
        text += f"; the finish reasons of n={sampling.N} as the server sends them: {sent}"
    if problems:
        return Finding(name=name, ok=False, text=f"{text}. {'; '.join(problems)}", tried=tried, remedy=REMEDY_SAMPLES)
    return Finding(name=name, ok=True, text=f"{text}; lengths and both ends as computed", tried=tried)


def judge_logprobs(found: dict[str, Any], *, is_needed: bool) -> Finding:
    """Only `judge.mode=expected` needs log-probabilities."""
    name, given = "serving.logprobs", found["logprobs"]
    tried = f"log-probabilities of digits ({NUM_LOGPROBS} alternatives), against arithmetic"
    problem = given.get("error") or next(sampling.wrong_logprobs([Completion(**c) for c in given["completions"]]), "")
    if not problem:
        return Finding(name=name, ok=True, text="right for all digits", tried=tried)
    if not is_needed:
        return not_checked(name, f"{problem}. The recipe does not need them (judge.mode)", tried=tried)
    return Finding(name=name, ok=False, text=problem, tried=tried, remedy=REMEDY_LOGPROBS)


def _as_sent(raw: Any) -> str:
    choices = raw.get("answer", {}).get("choices") if isinstance(raw, dict) else None
    return "" if not choices else ", ".join(str(choice.get("finish_reason")) for choice in choices)


# ---- in the job


def ask(given: dict[str, Any]) -> dict[str, Any]:
    """Samples, samples with log-probabilities, and one answer as it was sent. What fails has an `error`."""
    from transformers import AutoTokenizer

    model_dir = Path(given["model_dir"])
    engine_settings = registry.load("engines", given["engine"]["name"]).settings(**given["engine"])
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    requests = [
        GenerationRequest(
            key=f"prompt-{i}", prompt_token_ids=tuple(tokenizer.encode(f"Prompt {i}")), n=sampling.N, seed=1
        )
        for i in range(sampling.NUM_PROMPTS)
    ]
    found: dict[str, Any] = {"raw": _raw(requests[0])}
    for name, num_logprobs in (("samples", 0), ("logprobs", NUM_LOGPROBS)):
        params = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=sampling.MAX_TOKENS, num_logprobs=num_logprobs)
        try:
            engine = engines.open_engine(engine_settings, model_dir)
            try:
                made = [c for several in engine.generate(requests, params) for c in several]
            finally:
                engine.close()
            found[name] = {"completions": [asdict(c) for c in made]}
        except NemoSrlError as e:
            found[name] = {"error": str(e)}
    return found


def _raw(request: GenerationRequest) -> dict[str, Any]:
    """What the first server answers to one request with n samples. None of it is judged."""
    urls: dict[str, str] = json.loads(os.environ.get(SERVICES_VARIABLE, "{}"))
    if not urls:
        return {}
    base = next(iter(urls.values()))
    try:
        with urllib.request.urlopen(f"{base}/v1/models", timeout=60) as answer:
            model = json.load(answer)["data"][0]["id"]
        body = {
            "model": model, "prompt": list(request.prompt_token_ids), "n": sampling.N, "temperature": 1.0, "top_p": 1.0,
            "max_tokens": sampling.MAX_TOKENS, "stop_token_ids": [0, 1], "include_stop_str_in_output": True,
            "add_special_tokens": False, "seed": 1,
        }  # fmt: skip
        headers = {"Content-Type": "application/json"}
        post = urllib.request.Request(f"{base}/v1/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(post, timeout=60) as answer:
            return {"body": body, "answer": json.load(answer)}
    except (OSError, ValueError, KeyError, IndexError) as e:
        return {"error": f"{type(e).__name__}: {e}"}


def main(asked: Path) -> None:
    given = read_json(asked)
    write_atomic(Path(given["directory"]) / RESULT, jsonio.dumps(ask(given)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
