"""Repeats the judging of a finished run: with one HF `generate` pass per call, as the peers do it, and with our engine.

The benchmark takes the judgements on the first answers of iteration 1. `iter_01/judgements/journal.jsonl` holds every
model call of that stage. In `transformers`, each call is one pass that makes as many tokens as the journal has for it.
The embedded engine gets the requests that the stage would make now, and these end at the score. The tokens are counted
as in the journal for both, so a ratio of rates is a ratio of times.

It does not measure judging by comparison, nor the time to load a model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from generation_workloads import Measurement, measure
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from nemo_srl.artifacts import DATA, JOURNAL, SPEC, read_jsonl
from nemo_srl.chat import ChatTemplate
from nemo_srl.config import Config, load
from nemo_srl.engines import open_engine
from nemo_srl.engines.embedded.settings import EmbeddedSettings
from nemo_srl.judging import Judge
from nemo_srl.protocols import GenerationEngine, GenerationRequest, SamplingParams
from nemo_srl.records import Candidate, Completion

WORKLOAD = "judgements"


def replay(run_dir: Path, *, num_answers: int, batch_size: int) -> list[Measurement]:
    """Measure the judging of the run's first `num_answers` answers."""
    stage_dir, policy_dir = run_dir / "iter_01" / "judgements", run_dir / "iter_00" / "sft" / "hf"
    settings = json.loads((stage_dir / SPEC).read_text())["config"]
    settings = {key: settings[key] for key in ("run_dir", "judge", "seed")}
    cfg = load(settings, Config)
    answers = read_jsonl(run_dir / "iter_01" / "candidates" / DATA, Candidate)[:num_answers]
    journal = read_jsonl(stage_dir / JOURNAL, Completion)
    requests = judge_requests(answers, journal, ChatTemplate(policy_dir), cfg)
    wanted = {r.key for r in requests}
    calls = [c for c in journal if c.request_key in wanted]
    print(f"{len(calls)} calls: {len(answers)} answers x {cfg.judge.num_judgements} verdicts, {policy_dir}")

    found = []
    for dtype in ("float32", "bfloat16"):
        model = AutoModelForCausalLM.from_pretrained(policy_dir, torch_dtype=getattr(torch, dtype)).eval()
        name = f"HF generate, call by call, {dtype}"
        found.append(measure(name, WORKLOAD, partial(one_by_one, model, requests, calls, cfg)))
    for dtype in ("float32", "bfloat16"):
        engine = open_engine(EmbeddedSettings(dtype=dtype, max_batch_size=batch_size), policy_dir)
        found.append(measure(f"embedded, {dtype}", WORKLOAD, partial(ours, engine, requests, calls, cfg)))
    return found


def judge_requests(
    answers: Sequence[Candidate], journal: Sequence[Completion], chat: ChatTemplate, cfg: Config
) -> list[GenerationRequest]:
    """The requests that a judge makes for `answers`. The judge is answered from the journal."""
    asked: list[GenerationRequest] = []

    def complete(
        requests: Sequence[GenerationRequest], *, num_logprobs: int, title: str
    ) -> dict[str, list[Completion]]:
        asked.extend(requests)
        return {r.key: [c for c in journal if c.request_key == r.key] for r in requests}

    judge = Judge(complete, chat, cfg.judge, seed=cfg.seed)
    judge.ask({a.key: (a.prompt, a.response) for a in answers}, title=WORKLOAD)
    return asked


@torch.inference_mode()
def one_by_one(model: Any, requests: Sequence[GenerationRequest], calls: Sequence[Completion], cfg: Config) -> int:
    prompts = {r.key: torch.tensor([r.prompt_token_ids]) for r in requests}
    for call in tqdm(calls, desc="transformers", leave=False, disable=None):
        prompt = prompts[call.request_key]
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=call.num_tokens,
            max_new_tokens=call.num_tokens,
            do_sample=cfg.judge.temperature > 0,
            temperature=cfg.judge.temperature,
            top_p=cfg.judge.top_p,
            top_k=0,
            pad_token_id=0,
        )
    return sum(call.num_tokens for call in calls)


def ours(
    engine: GenerationEngine, requests: Sequence[GenerationRequest], calls: Sequence[Completion], cfg: Config
) -> int:
    params = SamplingParams(temperature=cfg.judge.temperature, top_p=cfg.judge.top_p, max_tokens=cfg.judge.max_tokens)
    num_made = sum(len(completions) for completions in engine.generate(requests, params))
    assert num_made == len(calls), f"{num_made} calls, and the journal has {len(calls)}"
    return sum(call.num_tokens for call in calls)
