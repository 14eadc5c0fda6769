"""Judgements: M_t reads its own answers with the rubric, K times each, and gives 0 to 5 points.

A verdict without a score in the required format has `score=None`. It is counted, and it never becomes a number. Only
the verdict is read for a score, never the prompt, so an answer that says "Score: 5" cannot grade itself. Candidates
without an answer are not judged.

The input `judge` is M_t, or another model (`judge.model`). Where code checks the answers (`judge.mode=verifier`), the
stage is `BY_CODE`: it has no judge, and runs without any job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

from nemo_srl.config import Config
from nemo_srl.judging import Material, asks_models, reader
from nemo_srl.judging.verifier import VerifierReader
from nemo_srl.records import Candidate, Judgement, VerifiablePrompt
from nemo_srl.stages.base import CHAT, Context, Made, Need, settings_of, table_stage
from nemo_srl.stages.calls import open_caller
from nemo_srl.stages.candidates import answered
from nemo_srl.workload import Assumptions, Generated


def run(ctx: Context) -> Made[Judgement]:
    # In the table's order, so that the judgements of one prompt are adjacent and share its prefix.
    material = {c.key: (c.prompt, c.response) for c in answered(ctx.read("candidates", Candidate))}
    if not ctx.has("judge"):
        return _by_code(ctx, material)
    with open_caller(ctx) as caller:
        judgements = caller.judge.ask(material, title="judgements")
    return Made(judgements, {**_figures(judgements), **caller.figures()})


def _by_code(ctx: Context, material: Material) -> Made[Judgement]:
    cfg = ctx.cfg.judge
    found = VerifierReader(ctx.read("checked", VerifiablePrompt)) if ctx.has("checked") else reader(cfg)
    judgements = found.judgements(material, {}, cfg)
    return Made(judgements, _figures(judgements))


def _figures(judgements: Sequence[Judgement]) -> dict[str, float]:
    figures = {"num_judgements": float(len(judgements)), "valid_rate": fmean(j.score is not None for j in judgements)}
    if coverages := [j.coverage for j in judgements if j.coverage is not None]:  # if scores are expectations
        figures["mean_coverage"] = fmean(coverages)
    return figures


def work(cfg: Config, a: Assumptions) -> Generated | None:
    if not asks_models(reader(cfg.judge)):
        return None
    verdict = cfg.judge.num_generated(a.mean_verdict_tokens)
    num_passes = 1 + bool(cfg.pairs.anchor) + bool(cfg.pairs.second_judge)
    num_candidates = num_passes * cfg.prompts.num_prompts * cfg.candidates.num_samples
    answer = min(a.mean_response_tokens, cfg.candidates.max_tokens)
    prompt = a.mean_rubric_tokens + a.mean_prompt_tokens + answer
    return Generated(
        num_tokens=num_candidates * cfg.judge.num_judgements * verdict, num_prompt_tokens=num_candidates * prompt
    )


def summary(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    return [("verdicts", f"{metrics['num_judgements']:.0f}, {1 - metrics['valid_rate']:.1%} without a score")]


STAGE = table_stage(
    "judgements",
    Judgement,
    run,
    version=2,  # what counts as the score of a verdict (nemo_srl/judging/form.py)
    needs={"judge": Need(None, formerly="policy"), "candidates": Candidate},
    settings=(*settings_of("judge"), *CHAT, "seed"),
    engines=("judge",),
    model="judge",
    work=work,
    summary=summary,
)

BY_CODE = table_stage(
    "judgements",
    Judgement,
    run,
    needs={"candidates": Candidate, "checked": Need(VerifiablePrompt, optional=True)},
    settings=("judge.mode", "judge.verifier", "judge.max_score"),
    summary=summary,
)
"""The same stage for answers that code checks. `checked` are the prompts of `judge.verifier_path`."""
