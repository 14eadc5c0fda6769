"""Evaluation: both axes of one model, on held-out data that no stage trains on.

Instruction following: the model answers the held-out instructions as in `candidates` and judges its own
answers as in `judgements` (self-score, lengths, ties, pairs per 100 prompts). Judging: it judges the
held-out EFT answers, whose scores were given by a good judge (pairwise accuracy and its kin, paper table 4).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from statistics import fmean

from nemo_srl.artifacts import Table
from nemo_srl.chat import ChatTemplate
from nemo_srl.judging import agreement
from nemo_srl.judging.verdicts import mean_score
from nemo_srl.records import Candidate, EFTExample, Judgement, Metric, Prompt
from nemo_srl.stages import Context, Result, Stage, Step, settings_of
from nemo_srl.stages.calls import Caller, open_caller
from nemo_srl.stages.candidates import answer_requests, candidates_of
from nemo_srl.stages.judgements import judge_request, judgements_of
from nemo_srl.stages.pairs import build_pairs


def instructions_of(examples: Iterable[EFTExample], limit: int) -> list[Prompt]:
    """The distinct instructions, in their order."""
    texts = list(dict.fromkeys(x.instruction for x in examples))[:limit]
    return [Prompt(prompt_id=f"answer-{i:06d}", text=text) for i, text in enumerate(texts)]


def answer_and_judge(ctx: Context, caller: Caller, prompts: list[Prompt]) -> tuple[list[Candidate], list[Judgement]]:
    chat = ChatTemplate(ctx.inputs["policy"].model_dir, chat_template=ctx.cfg.model.chat_template)
    answers = caller.complete(answer_requests(prompts, chat, ctx.cfg), "candidates", title="held-out answers")
    candidates = candidates_of(prompts, answers)
    requests = [
        judge_request(f"self/{c.key}", instruction=c.prompt, response=c.response, chat=chat, cfg=ctx.cfg)
        for c in candidates
    ]
    verdicts = caller.complete(requests, "judge", title="self-judgements")
    return candidates, [j for c in candidates for j in judgements_of(c.key, verdicts[f"self/{c.key}"], ctx.cfg.judge)]


def judge_examples(ctx: Context, caller: Caller, examples: Sequence[EFTExample]) -> list[Judgement]:
    chat = ChatTemplate(ctx.inputs["policy"].model_dir, chat_template=ctx.cfg.model.chat_template)
    requests = [
        judge_request(f"eft/{x.key}", instruction=x.instruction, response=x.response, chat=chat, cfg=ctx.cfg)
        for x in examples
    ]
    verdicts = caller.complete(requests, "judge", title="held-out judgements")
    return [j for x in examples for j in judgements_of(x.key, verdicts[f"eft/{x.key}"], ctx.cfg.judge)]


def answering_metrics(candidates: list[Candidate], judgements: list[Judgement], *, min_margin: float) -> list[Metric]:
    """Self-score, lengths, ties and pairs per 100 prompts."""
    pairs, dropped = build_pairs(candidates, judgements, min_margin=min_margin)
    num_prompts = len(pairs) + dropped.total()
    scores = _mean_scores(judgements)
    scored = [s for s in scores.values() if s is not None]
    return [
        Metric(name="self_score", value=fmean(scored) if scored else None, n=len(scored)),
        Metric(name="response_tokens", value=fmean(c.num_tokens for c in candidates), n=len(candidates)),
        Metric(name="response_characters", value=fmean(len(c.response) for c in candidates), n=len(candidates)),
        Metric(
            name="truncated_rate",
            value=fmean(c.finish_reason == "length" for c in candidates),
            n=len(candidates),
        ),
        Metric(name="tied_prompt_rate", value=dropped["tied"] / num_prompts, n=num_prompts),
        Metric(name="pairs_per_100_prompts", value=100 * len(pairs) / num_prompts, n=num_prompts),
    ]


def judging_metrics(
    examples: Sequence[EFTExample],
    judgements: list[Judgement],
    *,
    max_score: int,
    num_bootstrap: int,
    seed: int,
) -> list[Metric]:
    """How well the model's scores agree with the given ones, per instruction."""
    scores = _mean_scores(judgements)
    groups: dict[str, list[EFTExample]] = {}
    for x in examples:
        groups.setdefault(x.instruction, []).append(x)
    found = agreement.reward_model_metrics(
        [
            agreement.ScoreGroup(human=tuple(float(x.score) for x in group), model=tuple(scores[x.key] for x in group))
            for group in groups.values()
        ],
        max_score=max_score,
        num_bootstrap=num_bootstrap,
        seed=seed,
    )
    estimates = {f.name: getattr(found, f.name) for f in dataclasses.fields(found)}
    return [Metric(name=name, value=e.value, n=e.n, low=e.low, high=e.high) for name, e in estimates.items()]


def verdict_metrics(judgements: list[Judgement], *, max_score: int) -> list[Metric]:
    """Valid verdicts, and how the scores are spread (entropy 0: always the same one)."""
    scores = [j.score for j in judgements if j.score is not None]
    return [
        Metric(name="valid_verdict_rate", value=len(scores) / len(judgements), n=len(judgements)),
        Metric(name="score_entropy", value=agreement.score_entropy(scores, max_score=max_score), n=len(scores)),
        *(
            Metric(name=f"score_share_{k}", value=count / len(scores), n=len(scores))
            for k, count in enumerate(agreement.histogram(scores, max_score=max_score))
            if scores
        ),
    ]


def _mean_scores(judgements: Iterable[Judgement]) -> dict[str, float | None]:
    by_key: dict[str, list[float | None]] = {}
    for j in judgements:
        by_key.setdefault(j.candidate_key, []).append(j.score)
    return {key: mean_score(scores) for key, scores in by_key.items()}


def run(ctx: Context) -> Result:
    cfg = ctx.cfg
    held_out: list[EFTExample] = ctx.inputs["eft_eval"].read()
    prompts = instructions_of(held_out, cfg.evaluation.num_prompts)
    texts = {p.text for p in prompts}
    examples = [x for x in held_out if x.instruction in texts]
    with open_caller(ctx) as caller:
        candidates, own = answer_and_judge(ctx, caller, prompts)
        on_examples = judge_examples(ctx, caller, examples)
    metrics = [
        *answering_metrics(candidates, own, min_margin=cfg.pairs.min_margin),
        *judging_metrics(
            examples,
            on_examples,
            max_score=cfg.judge.max_score,
            num_bootstrap=cfg.evaluation.num_bootstrap,
            seed=cfg.seed,
        ),
        *verdict_metrics(own + on_examples, max_score=cfg.judge.max_score),
    ]
    return Result(ctx.output.write(metrics), {})


STAGE = Stage(
    name="evaluation",
    output=lambda path, identity: Table(path, identity, Metric),
    settings=(
        "evaluation", "candidates", *settings_of("judge"), "pairs", "model.chat_template", "seed",
    ),
    steps=(Step("run", run),),
    engines=("candidates", "judge"),
)  # fmt: skip
