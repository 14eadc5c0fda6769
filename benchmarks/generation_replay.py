"""The judging of a finished run once more: one HF `generate` pass per call, as the peers do it, and the run's own way.

The first answers' judgements of iteration 1 are taken from `iter_01/judgements/journal.jsonl`, where every
model call of that stage is kept. In `transformers` each call is one pass with as many tokens as the
journal has for it; the embedded engine is given the requests that the stage would make now, which end at the
score. Tokens are counted as the journal has them for both, so that ratios of rates are ratios of times.

Not covered: judging by comparison; the time to load a model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from generation_workloads import Measurement, measure
from omegaconf import OmegaConf
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from nemo_srl.artifacts import DATA, JOURNAL, SPEC, read_jsonl
from nemo_srl.chat import ChatTemplate
from nemo_srl.config import Config
from nemo_srl.engines.embedded import EmbeddedEngine
from nemo_srl.protocols import GenerationRequest, SamplingParams
from nemo_srl.records import Candidate, Completion
from nemo_srl.stages.judgements import judge_request

WORKLOAD = "judgements"


def replay(run_dir: Path, *, num_answers: int, batch_size: int) -> list[Measurement]:
    """Measure the judging of the run's first `num_answers` answers."""
    stage_dir, policy_dir = run_dir / "iter_01" / "judgements", run_dir / "iter_00" / "sft" / "hf"
    settings = json.loads((stage_dir / SPEC).read_text())["config"]
    settings = {key: settings[key] for key in ("run_dir", "judge", "seed")}
    cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), settings))
    assert isinstance(cfg, Config)
    answers = read_jsonl(run_dir / "iter_01" / "candidates" / DATA, Candidate)[:num_answers]
    chat = ChatTemplate(policy_dir)
    requests = [judge_request(a.key, instruction=a.prompt, response=a.response, chat=chat, cfg=cfg) for a in answers]
    wanted = {r.key for r in requests}
    calls = [c for c in read_jsonl(stage_dir / JOURNAL, Completion) if c.request_key in wanted]
    print(f"{len(calls)} calls: {len(answers)} answers x {cfg.judge.num_judgements} verdicts, {policy_dir}")

    found = []
    for dtype in ("float32", "bfloat16"):
        model = AutoModelForCausalLM.from_pretrained(policy_dir, torch_dtype=getattr(torch, dtype)).eval()
        name = f"HF generate, call by call, {dtype}"
        found.append(measure(name, WORKLOAD, partial(one_by_one, model, requests, calls, cfg)))
    for dtype in ("float32", "bfloat16"):
        engine = EmbeddedEngine(policy_dir, dtype=dtype, max_batch_size=batch_size)
        found.append(measure(f"embedded, {dtype}", WORKLOAD, partial(ours, engine, requests, calls, cfg)))
    return found


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
    engine: EmbeddedEngine, requests: Sequence[GenerationRequest], calls: Sequence[Completion], cfg: Config
) -> int:
    params = SamplingParams(temperature=cfg.judge.temperature, top_p=cfg.judge.top_p, max_tokens=cfg.judge.max_tokens)
    num_made = sum(len(completions) for completions in engine.generate(requests, params))
    assert num_made == len(calls), f"{num_made} calls instead of the journal's {len(calls)}"
    return sum(call.num_tokens for call in calls)
