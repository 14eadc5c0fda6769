"""Candidates: M_t answers every prompt N times (paper section 3.1.1: N 4, T 0.7, p 0.9)."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from nemo_srl.artifacts import Table
from nemo_srl.chat import ChatTemplate
from nemo_srl.config import Config
from nemo_srl.protocols import GenerationRequest
from nemo_srl.records import Candidate, Completion, Prompt
from nemo_srl.stages import Context, Lines, Result, Stage, Step
from nemo_srl.stages.calls import open_caller


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


def run(ctx: Context) -> Result:
    prompts: list[Prompt] = ctx.inputs["prompts"].read()
    chat = ChatTemplate(ctx.inputs["policy"].model_dir, chat_template=ctx.cfg.model.chat_template)
    with open_caller(ctx) as caller:
        completions = caller.complete(answer_requests(prompts, chat, ctx.cfg), "candidates", title="candidates")
    candidates = candidates_of(prompts, completions)
    return Result(
        ctx.output.write(candidates),
        {
            "num_candidates": len(candidates),
            "mean_tokens": fmean(c.num_tokens for c in candidates),
            "truncated_rate": fmean(c.finish_reason == "length" for c in candidates),
        },
    )


def summary(metrics: Mapping[str, float]) -> Lines:
    return [("answers", f"{metrics['num_candidates']:.0f}, {metrics['truncated_rate']:.0%} cut off")]


STAGE = Stage(
    name="candidates",
    output=lambda path, identity: Table(path, identity, Candidate),
    settings=("candidates", "model.chat_template", "seed"),
    steps=(Step("run", run),),
    engines=("candidates",),
    summary=summary,
)
