"""Candidates: M_t answers every prompt N times (paper section 3.1.1: N 4, T 0.7, p 0.9)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from nemo_srl.config import Config
from nemo_srl.errors import DataError
from nemo_srl.protocols import GenerationRequest
from nemo_srl.records import ANSWERED, Candidate, Completion, Prompt
from nemo_srl.stages.base import CHAT, MODEL, Context, Made, table_stage
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
        num_tokens=c.num_tokens, finish_reason=c.finish_reason, reason=c.reason, thinking=c.thinking.strip(),
    )  # fmt: skip


def answered(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Those with an answer. The others are neither measured nor judged."""
    return [c for c in candidates if c.is_answered]


def length_figures(candidates: Sequence[Candidate]) -> dict[str, float]:
    """The mean length of what was generated, and the share of it that was cut off. For models that think: how many were
    still thinking then. At least one call has an answer."""
    generated = [c for c in candidates if c.finish_reason in ANSWERED]
    figures = {
        "mean_tokens": fmean(c.num_tokens for c in generated),
        "truncated_rate": fmean(c.finish_reason == "length" for c in generated),
    }
    if any(c.thinking for c in candidates):
        figures["num_still_thinking"] = len(generated) - len(answered(candidates))
    return figures


def run(ctx: Context) -> Made[Candidate]:
    with open_caller(ctx) as caller:
        candidates = answers_to(ctx.read("prompts", Prompt), ctx, caller, title="candidates")
    if not answered(candidates):
        raise DataError(
            f"candidates.max_tokens={ctx.cfg.candidates.max_tokens}: the model was still thinking there in all "
            f"{len(candidates)} candidates, so there is no answer. Raise it. If the model does not think, set "
            "model.thinking_tags=[]."
        )
    return Made(candidates, {"num_candidates": len(candidates), **length_figures(candidates), **caller.figures()})


def work(cfg: Config, a: Assumptions) -> Generated:
    answer = min(a.mean_response_tokens, cfg.candidates.max_tokens)
    n = cfg.prompts.num_prompts * (2 if cfg.pairs.anchor else 1)  # the earlier model answers, too
    return Generated(num_tokens=n * cfg.candidates.num_samples * answer, num_prompt_tokens=n * a.mean_prompt_tokens)


def summary(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    lines = [("answers", f"{metrics['num_candidates']:.0f}, {metrics['truncated_rate']:.0%} cut off")]
    if thinking := metrics.get("num_still_thinking"):
        lines.append(("no answer: still thinking at the end", f"{thinking:.0f}"))
    return lines


STAGE = table_stage(
    "candidates",
    Candidate,
    run,
    version=2,  # thoughts are no part of a response
    needs={"policy": MODEL, "prompts": Prompt},
    settings=("candidates", *CHAT, "seed"),
    engines=("candidates",),
    work=work,
    summary=summary,
)
