"""Candidates: M_t answers every prompt N times (paper section 3.1.1: N 4, T 0.7, p 0.9)."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from nemo_srl.chat import ChatTemplate
from nemo_srl.config import Config
from nemo_srl.protocols import GenerationRequest
from nemo_srl.records import Candidate, Completion, Prompt
from nemo_srl.stages.base import MODEL, Context, Made, table_stage
from nemo_srl.stages.calls import open_caller
from nemo_srl.workload import Assumptions, Generated


def answer_requests(prompts: list[Prompt], chat: ChatTemplate, cfg: Config) -> list[GenerationRequest]:
    """One request of N samples for every prompt."""
    return [
        GenerationRequest(
            key=p.prompt_id,
            prompt_token_ids=chat.encode(chat.render(p.text)),
            text=p.text,
            n=cfg.candidates.num_samples,
            seed=cfg.seed,
        )
        for p in prompts
    ]


def candidates_of(prompts: list[Prompt], completions: dict[str, list[Completion]]) -> list[Candidate]:
    """The answers as records."""
    return [
        Candidate(
            prompt_id=p.prompt_id,
            sample_index=c.index,
            prompt=p.text,
            response=c.text.strip(),
            num_tokens=c.num_tokens,
            finish_reason=c.finish_reason,
        )
        for p in prompts
        for c in completions[p.prompt_id]
    ]


def run(ctx: Context) -> Made[Candidate]:
    prompts = ctx.read("prompts", Prompt)
    with open_caller(ctx) as caller:
        completions = caller.complete(answer_requests(prompts, ctx.chat, ctx.cfg), "candidates", title="candidates")
    candidates = candidates_of(prompts, completions)
    return Made(
        candidates,
        {
            "num_candidates": len(candidates),
            "mean_tokens": fmean(c.num_tokens for c in candidates),
            "truncated_rate": fmean(c.finish_reason == "length" for c in candidates),
        },
    )


def work(cfg: Config, a: Assumptions) -> Generated:
    answer = min(a.mean_response_tokens, cfg.candidates.max_tokens)
    return Generated(num_tokens=cfg.prompts.num_prompts * cfg.candidates.num_samples * answer)


def summary(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    return [("answers", f"{metrics['num_candidates']:.0f}, {metrics['truncated_rate']:.0%} cut off")]


STAGE = table_stage(
    "candidates",
    Candidate,
    run,
    needs={"policy": MODEL, "prompts": Prompt},
    settings=("candidates", "model.chat_template", "seed"),
    engines=("candidates",),
    work=work,
    summary=summary,
)
