"""Meta-judge: M_t compares its own verdicts on an answer, and the better one is preferred (Meta-Rewarding, Wu et al.
2024, arXiv 2407.19594, section 2.3).

Of each prompt, the answer is taken whose verdicts disagree the most: their scores have the highest variance. M_t
compares every two of its verdicts, in both orders. The ratings by maximum likelihood (`nemo_srl/judging/elo.py`)
decide: the chosen verdict has the highest rating, and the rejected one the lowest. `policy` trains on these pairs and
on those of answers together.

Such a judge likes long verdicts (section 2.3). So a pair is left out if its chosen verdict has more characters than
`verdict_pairs.max_chars`.

Verdicts without a score take no part, and equal verdicts count once. An iteration without any such pair is no error:
the verdicts may agree, or no comparison may name a winner. The figures say how many did.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import pvariance

from nemo_srl.config import Config
from nemo_srl.judging import elo, reader, rubrics
from nemo_srl.judging.elo import Battle
from nemo_srl.judging.pairwise import WINNER_LINES, first_share
from nemo_srl.protocols import GenerationRequest
from nemo_srl.records import Candidate, Completion, Judgement, PreferencePair
from nemo_srl.stages import own_verdicts
from nemo_srl.stages.base import Context, Made
from nemo_srl.stages.calls import open_caller
from nemo_srl.workload import Assumptions, Generated


@dataclass(frozen=True)
class Disputed:
    """An answer, and two or more different verdicts on it, each with its score."""

    answer: Candidate
    verdicts: Sequence[Judgement]


def disputed(candidates: Sequence[Candidate], judgements: Sequence[Judgement]) -> list[Disputed]:
    """For each prompt, the answer whose scores have the highest variance. Prompts without any dispute are left out."""
    by_key: dict[str, dict[str, Judgement]] = defaultdict(dict)
    scores: dict[str, list[float]] = defaultdict(list)
    for j in judgements:
        if j.score is not None:
            by_key[j.candidate_key].setdefault(j.verdict, j)
            scores[j.candidate_key].append(j.score)
    by_prompt: dict[str, list[Candidate]] = defaultdict(list)
    for c in candidates:
        if len(by_key[c.key]) > 1 and pvariance(scores[c.key]) > 0:
            by_prompt[c.prompt_id].append(c)
    best = [min(group, key=lambda c: (-pvariance(scores[c.key]), c.sample_index)) for group in by_prompt.values()]
    return [Disputed(c, list(by_key[c.key].values())) for c in best]


def comparison(rubric: str, case: Disputed, first: int, second: int) -> str:
    """The prompt that shows the judge two of the verdicts."""
    return rubrics.render(
        rubric,
        instruction=case.answer.prompt,
        response=case.answer.response,
        verdict_a=case.verdicts[first].verdict,
        verdict_b=case.verdicts[second].verdict,
    )


def preferred(case: Disputed, battles: Sequence[Battle], weights: tuple[float, float]) -> tuple[int, int] | None:
    """The verdicts with the highest and the lowest rating. None if all have the same."""
    found = elo.ratings(len(case.verdicts), battles, weights=weights)
    best, worst = found.index(max(found)), found.index(min(found))
    return (best, worst) if found[best] - found[worst] > 1e-6 else None


def pair(case: Disputed, prompt: str, best: int, worst: int) -> PreferencePair:
    """The two verdicts as a pair. A verdict has no score of its own, so the scores say only which one is better."""
    return PreferencePair(
        prompt_id=f"{case.answer.key}/verdict",
        prompt=prompt,
        chosen=case.verdicts[best].verdict,
        rejected=case.verdicts[worst].verdict,
        chosen_score=0.0,
        rejected_score=-1.0,
    )


def is_too_long(p: PreferencePair, limit: int) -> bool:
    """Whether the chosen verdict has more characters than the limit. 0 is no limit."""
    return 0 < limit < len(p.chosen)


def run(ctx: Context) -> Made[PreferencePair]:
    cfg = ctx.cfg
    cases = disputed(ctx.read("candidates", Candidate), ctx.read("judgements", Judgement))
    random.Random(f"{cfg.seed}:{ctx.iteration}:meta_judge").shuffle(cases)
    cases = cases[: cfg.verdict_pairs.num_prompts]
    places = [
        (i, *pair) for i, case in enumerate(cases) for pair in itertools.permutations(range(len(case.verdicts)), 2)
    ]
    requests = [_request(ctx, cases[i], a, b) for i, a, b in places]
    with open_caller(ctx) as caller:
        found = caller.complete(requests, "judge", title="meta-judge") if requests else {}
        figures = caller.figures()
    battles: list[list[Battle]] = [[] for _ in cases]
    for (i, a, b), request in zip(places, requests, strict=True):
        battles[i] += [Battle(a, b, share) for share in _shares(found[request.key])]
    weights = elo.position_weights(itertools.chain(*battles))
    material = {case.answer.key: (case.answer.prompt, case.answer.response) for case in cases}
    prompts = reader(cfg.judge).questions(material, cfg.judge)
    found_pairs = [
        pair(case, str(prompts[case.answer.key]), *order)
        for case, fought in zip(cases, battles, strict=True)
        if (order := preferred(case, fought, weights))
    ]
    num_decided = sum(b.first_share != 0.5 for b in itertools.chain(*battles))
    shares = {"decided_rate": num_decided / len(requests), "first_place_weight": weights[0]} if requests else {}
    pairs = [p for p in found_pairs if not is_too_long(p, cfg.verdict_pairs.max_chars)]
    shares["num_too_long"] = len(found_pairs) - len(pairs)
    return own_verdicts.made(pairs, len(cases), {**shares, **figures})


def _request(ctx: Context, case: Disputed, first: int, second: int) -> GenerationRequest:
    text = comparison(ctx.cfg.verdict_pairs.meta_rubric, case, first, second)
    a, b = (case.verdicts[i].judgement_index for i in (first, second))
    return GenerationRequest(
        key=f"{case.answer.key}/{a:02d}-vs-{b:02d}",
        prompt_token_ids=ctx.chat.encode(ctx.chat.render(text)),
        text=text,
        n=1,
        seed=ctx.cfg.seed,
        stop=WINNER_LINES if ctx.cfg.judge.stop_at_score else (),
    )


def _shares(completions: Sequence[Completion]) -> list[float]:
    return [share for c in completions if (share := first_share(c)) is not None]


def work(cfg: Config, a: Assumptions) -> Generated | None:
    if cfg.verdict_pairs.source != "meta_judge" or not cfg.verdict_pairs.num_prompts:
        return None
    k = cfg.judge.num_judgements
    num_calls = min(cfg.verdict_pairs.num_prompts, cfg.prompts.num_prompts) * k * (k - 1)
    verdict = min(a.mean_verdict_tokens, cfg.judge.max_tokens)
    prompt = a.mean_rubric_tokens + a.mean_prompt_tokens + a.mean_response_tokens + 2 * verdict
    return Generated(num_tokens=num_calls * verdict, num_prompt_tokens=num_calls * prompt)


def summary(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    decided = f", {metrics['decided_rate']:.0%} of the comparisons decided" if "decided_rate" in metrics else ""
    return [("verdict pairs", f"{metrics['num_pairs']:.0f} of {metrics['num_answers']:.0f} answers{decided}")]


STAGE = own_verdicts.stage("meta_judge", run, work=work, summary=summary)
