"""Judgements: M_t reads its own answers with the rubric, K times each, and gives 0 to 5 points.

A verdict without a score in the asked format is `score=None`, counted, and no number at all. Only the
verdict is read for a score, never the prompt, so an answer that says "Score: 5" cannot grade itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from nemo_srl.artifacts import Table
from nemo_srl.chat import ChatTemplate
from nemo_srl.config import Config, JudgeConfig
from nemo_srl.judging import verdicts
from nemo_srl.judging.expected import score_of
from nemo_srl.judging.pairwise import comparison_requests, judgements_of_comparisons
from nemo_srl.protocols import GenerationRequest
from nemo_srl.records import Candidate, Completion, Judgement
from nemo_srl.stages import Context, Lines, Result, Stage, Step, settings_of
from nemo_srl.stages.calls import open_caller, verdict_request


def judge_request(key: str, *, instruction: str, response: str, chat: ChatTemplate, cfg: Config) -> GenerationRequest:
    """One request for all K verdicts on one response."""
    prompt = verdicts.render(cfg.judge.rubric, instruction=instruction, response=response)
    return verdict_request(key, prompt, stop=verdicts.score_lines(cfg.judge.max_score), chat=chat, cfg=cfg)


def judgements_of(key: str, completions: list[Completion], cfg: JudgeConfig) -> list[Judgement]:
    """The verdicts on one response, with the scores that could be read in them."""
    return [
        Judgement(
            candidate_key=key,
            judgement_index=c.index,
            verdict=c.text.strip(),
            score=score.value,
            coverage=score.coverage,
        )
        for c, score in ((c, score_of(c, cfg)) for c in completions)
    ]


def _coverage(judgements: list[Judgement]) -> dict[str, float]:
    """How much probability the judge gave to points at all, where scores are expectations."""
    coverages = [j.coverage for j in judgements if j.coverage is not None]
    return {"mean_coverage": fmean(coverages)} if coverages else {}


def run(ctx: Context) -> Result:
    candidates: list[Candidate] = ctx.inputs["candidates"].read()
    chat = ChatTemplate(ctx.inputs["policy"].model_dir, chat_template=ctx.cfg.model.chat_template)
    pairwise = ctx.cfg.judge.mode == "pairwise"
    # In the table's order, so that the judgements of one prompt are adjacent and share its prefix.
    if pairwise:
        requests = comparison_requests(candidates, chat, ctx.cfg)
    else:
        requests = [
            judge_request(c.key, instruction=c.prompt, response=c.response, chat=chat, cfg=ctx.cfg) for c in candidates
        ]
    with open_caller(ctx) as caller:
        completions = caller.complete(requests, "judge", title="judgements")
    if pairwise:
        judgements = judgements_of_comparisons(candidates, completions, ctx.cfg.judge)
    else:
        judgements = [j for key, cs in completions.items() for j in judgements_of(key, cs, ctx.cfg.judge)]
    return Result(
        ctx.output.write(judgements),
        {
            "num_judgements": len(judgements),
            "valid_rate": fmean(j.score is not None for j in judgements),
            **_coverage(judgements),
        },
    )


def summary(metrics: Mapping[str, float]) -> Lines:
    return [("verdicts", f"{metrics['num_judgements']:.0f}, {1 - metrics['valid_rate']:.1%} without a score")]


STAGE = Stage(
    name="judgements",
    output=lambda path, identity: Table(path, identity, Judgement),
    settings=(*settings_of("judge"), "model.chat_template", "seed"),
    steps=(Step("run", run),),
    engines=("judge",),
    summary=summary,
)
