"""Anchor: a judge that never changes also judges some of the iteration's candidates.

Nobody knows the true scores. `nemo_srl/report/alarms.py` compares the scores of M_t and of the anchor to find reward
hacking. The input `judge` is the anchor: M1, or another judge (`anchor.model`). In the first iteration M1 is the judge
itself, and its verdicts are still sampled again. Pairs are chosen by noisy scores, so their margins by the *same*
scores are too large. Only new scores give a fair comparison. So this is no run of `judgements` with another judge: in
the first iteration that would sample the same verdicts again. The anchor is asked in the way of `judge.mode`, as M_t
was, because scores of two readers are on two scales.

Not covered: an answer that fools M1 as a judge also fools M1 as the anchor.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence

from nemo_srl.config import Config, JudgeConfig
from nemo_srl.judging import agreement, mean_scores, reader
from nemo_srl.judging.intervals import SHARE, Limits, ratio, sums_of
from nemo_srl.records import Candidate, Judgement, Metric, PreferencePair
from nemo_srl.stages.base import CHAT, Context, Made, Need, figures, settings_of, table_stage
from nemo_srl.stages.calls import open_caller
from nemo_srl.stages.candidates import answered
from nemo_srl.workload import Assumptions, Generated

Scores = Mapping[str, float]
"""Mean scores by candidate key, of candidates that have one."""
_LEVELS = frozenset({"self_minus_anchor", "anchor_score"})
"""Metrics that need scores on a scale that does not depend on the other answers."""


def compare(
    candidates: Sequence[Candidate], pairs: Sequence[PreferencePair], *, own: Scores, anchor: Scores, max_score: float
) -> list[Metric]:
    """Compares M_t's scores with the anchor's, for the given candidates and the pairs made from them.

    Both scores are from 0 to `max_score`.

    self_minus_anchor   mean over candidates of M_t's score minus the anchor's
    anchor_score        mean over candidates of the anchor's score
    own_margin          mean over pairs of M_t's score of chosen minus rejected
    anchor_margin       the same with the anchor's scores
    anchor_agreement    share of the pairs in which the anchor also prefers the chosen one; its ties count half
    """
    groups: dict[str, list[Candidate]] = defaultdict(list)
    for c in candidates:
        if c.key in own and c.key in anchor:
            groups[c.prompt_id].append(c)
    margins: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for p in pairs:
        by_text = {c.response: anchor[c.key] for c in groups.get(p.prompt_id, ())}
        if p.chosen in by_text and p.rejected in by_text:
            mine, others = p.chosen_score - p.rejected_score, by_text[p.chosen] - by_text[p.rejected]
            margins[p.prompt_id].append((mine, others))
    difference, points = (-max_score, max_score), (0.0, max_score)
    values: dict[str, tuple[Mapping[str, Sequence[float]], Limits]] = {
        "self_minus_anchor": ({k: [own[c.key] - anchor[c.key] for c in g] for k, g in groups.items()}, difference),
        "anchor_score": ({k: [anchor[c.key] for c in g] for k, g in groups.items()}, points),
        "own_margin": ({k: [mine for mine, _ in found] for k, found in margins.items()}, difference),
        "anchor_margin": ({k: [others for _, others in found] for k, found in margins.items()}, difference),
        "anchor_agreement": (
            {k: [0.5 + (m > 0) / 2 - (m < 0) / 2 for _, m in found] for k, found in margins.items()},
            SHARE,
        ),
    }
    return [ratio(sums_of(found), limits).named(name) for name, (found, limits) in values.items()]


def spread(judgements: Sequence[Judgement], cfg: JudgeConfig) -> list[Metric]:
    """Whether the judge tells answers apart, in the terms of its reader.

    score_entropy   of stated points: from 0 (always the same points) to 1 (all equally often)
    tie_rate        of shares of wins: share of the pairs of answers to a prompt that have the same share. A judge that
                    goes by the order in which it reads the answers ties all of them.

    An expectation has neither: it is nearly always different, and its histogram says nothing of that.
    """
    if not reader(cfg).absolute:
        if any(j.coverage is not None for j in judgements):
            return []
        scores = [j.score for j in judgements]
        entropy = agreement.score_entropy(scores, max_score=cfg.max_score)
        return [Metric(name="score_entropy", value=entropy, n=sum(score is not None for score in scores))]
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for key, score in mean_scores(judgements).items():
        by_prompt[key.rsplit("/", 1)[0]].append(score)
    ties = {k: [float(a == b) for a, b in itertools.combinations(found, 2)] for k, found in by_prompt.items()}
    return [ratio(sums_of(ties), SHARE).named("tie_rate")]


def run(ctx: Context) -> Made[Metric]:
    cfg = ctx.cfg
    all_candidates = ctx.read("candidates", Candidate)
    own = ctx.read("judgements", Judgement)
    sample = set(list(dict.fromkeys(c.prompt_id for c in all_candidates))[: cfg.anchor.num_prompts])
    candidates = [c for c in answered(all_candidates) if c.prompt_id in sample]
    pairs = [p for p in ctx.read("pairs", PreferencePair) if p.prompt_id in sample]
    material = {c.key: (c.prompt, c.response) for c in candidates}
    with open_caller(ctx) as caller:
        anchor = caller.judge.ask(material, title="anchor", prefix="anchor/")
    n = len(candidates)
    distinct = {(c.prompt_id, c.response) for c in candidates}  # equal responses to a prompt count once
    scores = {"own": mean_scores(own), "anchor": mean_scores(anchor)}
    compared = compare(candidates, pairs, **scores, max_score=float(cfg.judge.max_score))
    if reader(cfg.judge).absolute:  # shares of wins among a prompt's own answers, whose mean is always the same
        compared = [m for m in compared if m.name not in _LEVELS]
    metrics = [
        *compared,
        *spread([j for j in own if j.candidate_key in material], cfg.judge),
        Metric(name="distinct_responses", value=len(distinct) / n if n else None, n=n),
    ]
    return Made(metrics, {**figures(metrics), **caller.figures()})


def work(cfg: Config, a: Assumptions) -> Generated | None:
    num_judged = min(cfg.anchor.num_prompts, cfg.prompts.num_prompts) * cfg.candidates.num_samples
    if not num_judged:
        return None
    verdict = cfg.judge.num_generated(a.mean_verdict_tokens)
    prompt = a.mean_rubric_tokens + a.mean_prompt_tokens + min(a.mean_response_tokens, cfg.candidates.max_tokens)
    return Generated(num_tokens=num_judged * cfg.judge.num_judgements * verdict, num_prompt_tokens=num_judged * prompt)


STAGE = table_stage(
    "anchor",
    Metric,
    run,
    version=3,  # the anchor is asked in the same way as the judge; intervals (nemo_srl/judging/intervals.py)
    needs={
        "judge": Need(None, formerly="policy"),
        "candidates": Candidate,
        "judgements": Judgement,
        "pairs": PreferencePair,
    },
    settings=("anchor.num_prompts", *settings_of("judge"), *CHAT, "seed"),
    engines=("judge",),
    model="judge",
    work=work,
)
