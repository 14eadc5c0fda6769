"""Candidates: M_t answers every prompt N times (paper section 3.1.1: N 4, T 0.7, p 0.9)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from nemo_srl.config import Config
from nemo_srl.protocols import GenerationRequest
from nemo_srl.records import Candidate, Completion, Prompt
from nemo_srl.stages.base import MODEL, Context, Made, table_stage
from nemo_srl.stages.calls import Caller, open_caller
from nemo_srl.workload import Assumptions, Generated


def answers_to(prompts: Sequence[Prompt], ctx: Context, caller: Caller, *, title: str) -> list[Candidate]:
    """N answers to every prompt, in the order of the prompts."""
    ids = {p.key: ctx.chat.encode(ctx.chat.render(p.text)) for p in prompts}
    n, seed = ctx.cfg.candidates.num_samples, ctx.cfg.seed
    requests = [GenerationRequest(key=p.key, prompt_token_ids=ids[p.key], text=p.text, n=n, seed=seed) for p in prompts]
    found = caller.complete(requests, "candidates", title=title)
    return [candidate(p.key, c.index, p.text, c) for p in prompts for c in found[p.key]]


def candidate(prompt_id: str, sample_index: int, prompt: str, c: Completion) -> Candidate:
    """The answer `c` as a record."""
    return Candidate(
        prompt_id=prompt_id, sample_index=sample_index, prompt=prompt, response=c.text.strip(),
        num_tokens=c.num_tokens, finish_reason=c.finish_reason, reason=c.reason,
    )  # fmt: skip


def answered(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those with an answer. The others are neither measured nor judged."""
    return [c for c in candidates if c.is_answered]


def length_figures(candidates: Sequence[Candidate]) -> dict[str, float]:
    """The mean length of the answers, and the share of them that was cut off. At least one candidate has an answer."""
    answers = answered(candidates)
    return {
        "mean_tokens": fmean(a.num_tokens for a in answers),
        "truncated_rate": fmean(a.finish_reason == "length" for a in answers),
    }


def run(ctx: Context) -> Made[Candidate]:
    with open_caller(ctx) as caller:
        candidates = answers_to(ctx.read("prompts", Prompt), ctx, caller, title="candidates")
    return Made(candidates, {"num_candidates": len(candidates), **length_figures(candidates), **caller.figures()})


def work(cfg: Config, a: Assumptions) -> Generated:
    answer = min(a.mean_response_tokens, cfg.candidates.max_tokens)
    n = cfg.prompts.num_prompts
    return Generated(num_tokens=n * cfg.candidates.num_samples * answer, num_prompt_tokens=n * a.mean_prompt_tokens)


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
