"""Evaluation: how a model answers and how it judges, on held-out data that no stage trains on.

Answering: the model answers the held-out instructions as in `candidates` and judges its own answers (self-score,
lengths, ties, pairs per 100 prompts). Judging: it judges the held-out EFT answers, which have scores of a good judge
(pairwise accuracy and the other metrics of the paper's table 4). Both use scores that can be compared between models,
even if the iterations compare candidates in pairs.

The answers and all judgements are published beside the metrics, as parts. So is what each instruction adds to the
metrics of judging (`groups`), which shows whether a model judges the same answers better than another model.

A question without an answer, and an answer without a verdict, are missing and no zeros. `unanswered_rate` and
`unanswered_verdict_rate` count them, if there are any. The other metrics are over the rest, as their `n` shows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from nemo_srl.config import Config, PairsConfig
from nemo_srl.judging import agreement, mean_scores
from nemo_srl.judging.intervals import Sums, rows_of
from nemo_srl.pairing import build_pairs
from nemo_srl.records import Candidate, EFTExample, Judgement, Metric, Prompt, Record
from nemo_srl.stages.base import CHAT, MODEL, Context, Made, settings_of, table_stage
from nemo_srl.stages.calls import open_caller
from nemo_srl.stages.candidates import answered, answers_to, length_figures
from nemo_srl.stages.unanswered import missing_rate
from nemo_srl.workload import Assumptions, Generated

_HELD_OUT_ANSWERS = 4  # to an instruction, in the seed data of this package


def instructions_of(examples: Iterable[EFTExample], limit: int) -> list[Prompt]:
    """The first `limit` distinct instructions, in the order of the examples."""
    texts = list(dict.fromkeys(x.instruction for x in examples))[:limit]
    return [Prompt(prompt_id=f"answer-{i:06d}", text=text) for i, text in enumerate(texts)]


def answering_metrics(candidates: list[Candidate], judgements: list[Judgement], cfg: PairsConfig) -> list[Metric]:
    """Self-score, lengths, ties and pairs per 100 prompts. A prompt with fewer than two answers counts in neither."""
    scores, answers = mean_scores(judgements), answered(candidates)
    pairs, dropped = build_pairs(candidates, scores, cfg)
    num_prompts = len({p.prompt_id for p in pairs}) + dropped.total() - dropped["unanswered"]
    n, lengths = len(answers), length_figures(candidates)
    return [
        Metric(name="self_score", value=fmean(scores.values()) if scores else None, n=len(scores)),
        Metric(name="response_tokens", value=lengths["mean_tokens"], n=n),
        Metric(name="response_characters", value=fmean(len(c.response) for c in answers) if answers else None, n=n),
        Metric(name="truncated_rate", value=lengths["truncated_rate"], n=n),
        _share("tied_prompt_rate", dropped["tied"], num_prompts),
        _share("pairs_per_100_prompts", 100 * len(pairs), num_prompts),
        *missing_rate("unanswered_rate", len(candidates) - n, len(candidates)),
    ]


def _share(name: str, number: float, n: int) -> Metric:
    return Metric(name=name, value=number / n if n else None, n=n)


def judging_sums(examples: Sequence[EFTExample], judgements: Sequence[Judgement], *, max_score: int) -> dict[str, Sums]:
    """How well the model's scores agree with the given scores: what each instruction adds to each metric."""
    scores = mean_scores(judgements)
    # An expectation never reaches the highest score. It counts as that score if it is rounded to it.
    is_expected = any(j.coverage is not None for j in judgements)
    by_instruction: dict[str, list[EFTExample]] = {}
    for x in examples:
        by_instruction.setdefault(x.instruction, []).append(x)
    groups = {
        text: agreement.ScoreGroup(human=[float(x.score) for x in group], model=[scores.get(x.key) for x in group])
        for text, group in by_instruction.items()
    }
    return agreement.reward_model_sums(groups, highest=max_score - 0.5 if is_expected else max_score)


def judging_metrics(sums: Mapping[str, Sums]) -> list[Metric]:
    """The metrics of `judging_sums`."""
    return [estimate.named(name) for name, estimate in agreement.estimates_of(sums).items()]


def verdict_metrics(judgements: list[Judgement], *, max_score: int) -> list[Metric]:
    """The share of valid verdicts, and the spread of scores (entropy 0: always the same score)."""
    scores = [j.score for j in judgements if j.score is not None]
    n, counts = len(scores), agreement.histogram(scores, max_score=max_score)
    num_missing = sum(bool(j.reason) for j in judgements)
    return [
        _share("valid_verdict_rate", n, len(judgements) - num_missing),
        *missing_rate("unanswered_verdict_rate", num_missing, len(judgements)),
        Metric(name="score_entropy", value=agreement.score_entropy(scores, max_score=max_score), n=n),
        *(Metric(name=f"score_share_{k}", value=count / n, n=n) for k, count in enumerate(counts) if n),
    ]


def run(ctx: Context) -> Made[Metric]:
    cfg, max_score = ctx.cfg, ctx.cfg.judge.max_score
    held_out = ctx.read("eft_eval", EFTExample)
    prompts = instructions_of(held_out, cfg.evaluation.num_prompts)
    texts = {p.text for p in prompts}
    examples = [x for x in held_out if x.instruction in texts]
    with open_caller(ctx) as caller:
        answers = answers_to(prompts, ctx, caller, title="held-out answers")
        judge = caller.judge.absolute
        mine = {c.key: (c.prompt, c.response) for c in answered(answers)}
        own = judge.ask(mine, title="self-judgements", prefix="self/")
        given = {x.key: (x.instruction, x.response) for x in examples}
        judgements = judge.ask(given, title="held-out judgements", prefix="eft/")
    sums = judging_sums(examples, judgements, max_score=max_score)
    metrics = [
        *answering_metrics(answers, own, cfg.pairs),
        *judging_metrics(sums),
        *verdict_metrics(own + judgements, max_score=max_score),
    ]
    parts: dict[str, Sequence[Record]] = {
        "answers": answers,
        "self_judgements": own,
        "judgements": judgements,
        "groups": rows_of(sums),
    }
    return Made(metrics, caller.figures(), parts)


def work(cfg: Config, a: Assumptions) -> Generated:
    answer = min(a.mean_response_tokens, cfg.candidates.max_tokens)
    verdict = cfg.judge.num_generated(a.mean_verdict_tokens)
    num_answers = cfg.evaluation.num_prompts * cfg.candidates.num_samples
    num_judged = num_answers + cfg.evaluation.num_prompts * _HELD_OUT_ANSWERS
    prompt = a.mean_rubric_tokens + a.mean_prompt_tokens + answer
    return Generated(
        num_tokens=num_answers * answer + num_judged * cfg.judge.num_judgements * verdict,
        num_prompt_tokens=cfg.evaluation.num_prompts * a.mean_prompt_tokens + num_judged * prompt,
    )


STAGE = table_stage(
    "evaluation",
    Metric,
    run,
    version=4,  # intervals of few groups (nemo_srl/judging/intervals.py), and what counts as a 5 in expected mode
    needs={"policy": MODEL, "eft_eval": EFTExample},
    settings=(
        "evaluation",
        "candidates",
        *settings_of("judge"),
        *settings_of("pairs"),
        *CHAT,
        "seed",
    ),
    engines=("candidates", "judge"),
    per="model",
    work=work,
)
