"""Anchor: a judge that never changes also judges some of the iteration's candidates.

Nobody knows the true scores. `nemo_srl/report/alarms.py` compares the scores of M_t and of the anchor to find reward
hacking. The input `judge` is the anchor: M1, or another judge (`anchor.model`). In the first iteration M1 is the judge
itself, and its verdicts are still sampled again. Pairs are chosen by noisy scores, so their margins by the *same*
scores are too large. Only new scores give a fair comparison.

Not covered: an answer that fools M1 as a judge also fools M1 as the anchor.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from nemo_srl.config import Config
from nemo_srl.judging import agreement, mean_scores
from nemo_srl.records import Candidate, Judgement, Metric, PreferencePair
from nemo_srl.stages.base import CHAT, Context, Made, Need, figures, settings_of, table_stage
from nemo_srl.stages.calls import open_caller
from nemo_srl.stages.candidates import answered
from nemo_srl.workload import Assumptions, Generated

Scores = Mapping[str, float]
"""Mean scores by candidate key, of candidates that have one."""


def compare(
    candidates: Sequence[Candidate], pairs: Sequence[PreferencePair], *, own: Scores, anchor: Scores, seed: int
) -> list[Metric]:
    """Compares M_t's scores with the anchor's, for the given candidates and the pairs made from them.

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
    differences = [[own[c.key] - anchor[c.key] for c in group] for group in groups.values()]
    anchored = [[anchor[c.key] for c in group] for group in groups.values()]
    margins: list[tuple[float, float]] = []
    for p in pairs:
        by_text = {c.response: anchor[c.key] for c in groups.get(p.prompt_id, ())}
        if p.chosen in by_text and p.rejected in by_text:
            margins.append((p.chosen_score - p.rejected_score, by_text[p.chosen] - by_text[p.rejected]))
    values: dict[str, list[list[float]]] = {
        "self_minus_anchor": differences,
        "anchor_score": anchored,
        "own_margin": [[own_margin] for own_margin, _ in margins],
        "anchor_margin": [[anchor_margin] for _, anchor_margin in margins],
        "anchor_agreement": [[0.5 + (m > 0) / 2 - (m < 0) / 2] for _, m in margins],
    }
    return [agreement.mean_estimate(found, seed=seed).named(name) for name, found in values.items()]


def run(ctx: Context) -> Made[Metric]:
    cfg = ctx.cfg
    all_candidates = ctx.read("candidates", Candidate)
    own = ctx.read("judgements", Judgement)
    sample = set(list(dict.fromkeys(c.prompt_id for c in all_candidates))[: cfg.anchor.num_prompts])
    candidates = [c for c in answered(all_candidates) if c.prompt_id in sample]
    pairs = [p for p in ctx.read("pairs", PreferencePair) if p.prompt_id in sample]
    material = {c.key: (c.prompt, c.response) for c in candidates}
    with open_caller(ctx) as caller:
        anchor = caller.judge.absolute.ask(material, title="anchor", prefix="anchor/")
    scored = [j.score for j in own if j.candidate_key in material]
    entropy = agreement.score_entropy(scored, max_score=cfg.judge.max_score)
    num_scored = sum(score is not None for score in scored)
    n = len(candidates)
    distinct = {(c.prompt_id, c.response) for c in candidates}  # equal responses to a prompt count once
    metrics = [
        *compare(candidates, pairs, own=mean_scores(own), anchor=mean_scores(anchor), seed=cfg.seed),
        Metric(name="score_entropy", value=entropy, n=num_scored),
        Metric(name="distinct_responses", value=len(distinct) / n if n else None, n=n),
    ]
    return Made(metrics, {**figures(metrics), **caller.figures()})


def work(cfg: Config, a: Assumptions) -> Generated | None:
    num_judged = min(cfg.anchor.num_prompts, cfg.prompts.num_prompts) * cfg.candidates.num_samples
    if not num_judged:
        return None
    verdict = min(a.mean_verdict_tokens, cfg.judge.max_tokens)
    prompt = a.mean_rubric_tokens + a.mean_prompt_tokens + min(a.mean_response_tokens, cfg.candidates.max_tokens)
    return Generated(num_tokens=num_judged * cfg.judge.num_judgements * verdict, num_prompt_tokens=num_judged * prompt)


STAGE = table_stage(
    "anchor",
    Metric,
    run,
    version=2,  # what counts as the score of a verdict (nemo_srl/judging/form.py)
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
