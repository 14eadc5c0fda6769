"""Anchor: a judge that never changes judges a sample of the iteration's candidates beside M_t.

From the two judges' scores come the figures that `report.alarms` watches for reward hacking, where nobody knows
the truth. The input `policy` is the anchor: M1, or another judge (`anchor.model`). Verdicts are sampled anew also in
the first iteration, when M1 is the judge itself: a pair is chosen by noisy scores, so the margin by the *same*
scores is too large, and only fresh ones compare fairly.

Not covered: what the anchor itself cannot see. An answer that fools M1 fools M1 as an anchor, too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from nemo_srl.artifacts import Table
from nemo_srl.chat import ChatTemplate
from nemo_srl.judging import agreement
from nemo_srl.judging.verdicts import mean_score
from nemo_srl.protocols import GenerationRequest
from nemo_srl.records import Candidate, Judgement, Metric, PreferencePair
from nemo_srl.stages import Context, Result, Stage, Step, settings_of
from nemo_srl.stages.calls import open_caller
from nemo_srl.stages.judgements import judge_request, judgements_of

Scores = Mapping[str, float]
"""Mean scores by candidate key, of candidates that have one."""


def scores_of(judgements: Iterable[Judgement]) -> dict[str, float]:
    """The mean score of each candidate that has any."""
    by_key: dict[str, list[float | None]] = defaultdict(list)
    for j in judgements:
        by_key[j.candidate_key].append(j.score)
    return {key: score for key, scores in by_key.items() if (score := mean_score(scores)) is not None}


def compare(
    candidates: Sequence[Candidate], pairs: Sequence[PreferencePair], *, own: Scores, anchor: Scores, seed: int
) -> list[Metric]:
    """How M_t's scores compare with the anchor's, over the given candidates and the pairs made of them.

    self_minus_anchor   mean over candidates of M_t's score less the anchor's
    anchor_score        mean over candidates of the anchor's score
    own_margin          mean over pairs of chosen less rejected, by M_t
    anchor_margin       the same by the anchor
    anchor_agreement    share of the pairs in which the anchor prefers the chosen one, too; its ties count half
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
    return [_metric(name, groups_of_values, seed=seed) for name, groups_of_values in values.items()]


def _metric(name: str, groups: Sequence[Sequence[float]], *, seed: int) -> Metric:
    e = agreement.mean_estimate(groups, seed=seed)
    return Metric(name=name, value=e.value, n=e.n, low=e.low, high=e.high)


def run(ctx: Context) -> Result:
    cfg = ctx.cfg
    all_candidates: list[Candidate] = ctx.inputs["candidates"].read()
    own: list[Judgement] = ctx.inputs["judgements"].read()
    sample = set(list(dict.fromkeys(c.prompt_id for c in all_candidates))[: cfg.anchor.num_prompts])
    candidates = [c for c in all_candidates if c.prompt_id in sample]
    pairs = [p for p in ctx.inputs["pairs"].read() if p.prompt_id in sample]
    chat = ChatTemplate(ctx.inputs["policy"].model_dir, chat_template=cfg.model.chat_template)
    requests = [_request(c, chat, ctx) for c in candidates]
    with open_caller(ctx) as caller:
        completions = caller.complete(requests, "judge", title="anchor")
    anchor = [j for c in candidates for j in judgements_of(c.key, completions[f"anchor/{c.key}"], cfg.judge)]
    keys = {c.key for c in candidates}
    scored = [j.score for j in own if j.candidate_key in keys]
    entropy = agreement.score_entropy(scored, max_score=cfg.judge.max_score)
    num_scored = sum(score is not None for score in scored)
    metrics = [
        *compare(candidates, pairs, own=scores_of(own), anchor=scores_of(anchor), seed=cfg.seed),
        Metric(name="score_entropy", value=entropy, n=num_scored),
        Metric(name="distinct_responses", value=_distinct(candidates), n=len(candidates)),
    ]
    return Result(ctx.output.write(metrics), {m.name: m.value for m in metrics if m.value is not None})


def _distinct(candidates: Sequence[Candidate]) -> float:
    """Share of the candidates that are not word for word another one to the same prompt."""
    return len({(c.prompt_id, c.response) for c in candidates}) / len(candidates)


def _request(c: Candidate, chat: ChatTemplate, ctx: Context) -> GenerationRequest:
    return judge_request(f"anchor/{c.key}", instruction=c.prompt, response=c.response, chat=chat, cfg=ctx.cfg)


STAGE = Stage(
    name="anchor",
    output=lambda path, identity: Table(path, identity, Metric),
    settings=("anchor.num_prompts", *settings_of("judge"), "model.chat_template", "seed"),
    steps=(Step("run", run),),
    engines=("judge",),
)
