"""Verdict pairs: they teach M_t to judge in each iteration, and need nobody's scores.

Code damages an answer of M_t (`nemo_srl/data/damage.py`). So it knows that the damaged one is worse, although it does
not know how good the answer was. Each of the two answers makes a pair: one prompt of the judge, and two verdicts on it.
For the answer, the chosen verdict has the points that M_t gave, and the rejected one has fewer. For the damaged answer,
it is the other way round. `policy` trains on these pairs and on those of answers together.

`taught_verdicts.py` and `meta_judge.py` make pairs of verdicts in other ways (`verdict_pairs.source`).

The verdicts are the score alone. So this suits a judge whose EFT examples have no justifications. `preflight` checks
that.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from nemo_srl.config import JudgeConfig
from nemo_srl.data import damage
from nemo_srl.errors import DataError
from nemo_srl.judging import mean_scores, reader
from nemo_srl.pairing import Scored, best_complete
from nemo_srl.records import Candidate, EFTExample, Judgement, PreferencePair
from nemo_srl.stages.base import Context, Made, table_stage

LOST_POINTS: Mapping[str, int] = {"cut": 1, "looped": 1, "swapped": 3}
"""How many points a damage takes away at least: completeness, or the absence of repetition; an answer to another
instruction is off topic, and keeps no rule of this one."""


def best_answers(candidates: Sequence[Candidate], scores: Mapping[str, float]) -> list[Candidate]:
    """The best answer to each prompt by M_t's own scores, among those that were not cut off at `max_tokens`."""
    by_prompt: dict[str, list[Scored]] = defaultdict(list)
    for c in candidates:
        if c.key in scores:
            by_prompt[c.prompt_id].append(Scored(c, scores[c.key]))
    return [best.candidate for group in by_prompt.values() if (best := best_complete(group))]


def damaged(answer: Candidate, others: Sequence[Candidate], kind: str, rng: random.Random) -> str | None:
    """`answer` with this damage. `others` are answers to other prompts. None if it cannot be done."""
    if kind == "swapped":
        return rng.choice(others).response if others else None
    return {"cut": damage.cut, "looped": damage.looped}[kind](answer.response, rng)


@dataclass(frozen=True)
class Damaged:
    """An answer, and a copy that is worse by its making."""

    answer: Candidate
    worse: str
    points: int
    """M_t's own points for the answer, rounded."""
    fewer: int
    """The points of the copy, by what the damage costs at least."""


def damaged_answers(
    candidates: Sequence[Candidate], scores: Mapping[str, float], limit: int, rng: random.Random
) -> tuple[list[Damaged], Counter[str]]:
    """The best answers to `limit` prompts at most, each with a damaged copy, and how often each damage was done."""
    answers = best_answers(candidates, scores)
    rng.shuffle(answers)
    found: list[Damaged] = []
    counts: Counter[str] = Counter()
    for answer in answers:
        if len(found) == limit:
            break
        kind = min(LOST_POINTS, key=lambda k: counts[k])  # each kind as often as the others
        others = [x for x in answers if x.prompt_id != answer.prompt_id]
        worse, points = damaged(answer, others, kind, rng), round(scores[answer.key])
        fewer = max(0, points - LOST_POINTS[kind])
        if worse and worse != answer.response and fewer < points:
            counts[kind] += 1
            found.append(Damaged(answer, worse, points, fewer))
    return found, counts


def verdicts(x: Damaged, cfg: JudgeConfig) -> Iterator[PreferencePair]:
    """The two pairs of an answer and its damaged copy."""
    answer, points, fewer = x.answer, x.points, x.fewer
    for name, response, right, wrong in (
        ("answer", answer.response, points, fewer),
        ("damaged", x.worse, fewer, points),
    ):
        lessons = [
            reader(cfg).lesson(
                EFTExample(
                    example_id=answer.key, instruction=answer.prompt, response=response, justification="", score=score
                ),
                cfg,
            )
            for score in (right, wrong)
        ]
        (prompt, chosen), (_, rejected) = lessons
        yield PreferencePair(
            prompt_id=f"{answer.prompt_id}/{name}",
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            chosen_score=0.0,  # by how many points a verdict is wrong, below zero
            rejected_score=float(fewer - points),
        )


def run(ctx: Context) -> Made[PreferencePair]:
    cfg = ctx.cfg
    rng = random.Random(f"{cfg.seed}:{ctx.iteration}:verdict_pairs")
    scores = mean_scores(ctx.read("judgements", Judgement))
    candidates = ctx.read("candidates", Candidate)
    found, counts = damaged_answers(candidates, scores, cfg.verdict_pairs.num_prompts, rng)
    pairs = [p for x in found for p in verdicts(x, cfg.judge)]
    if not pairs:
        num_answers = len(best_answers(candidates, scores))
        raise DataError(
            f"verdict_pairs.num_prompts={cfg.verdict_pairs.num_prompts}: none of {num_answers} answers that ended "
            "before candidates.max_tokens has a point and could be damaged. For a run without such pairs, set "
            "verdict_pairs.num_prompts=0. The finished stages are kept."
        )
    return Made(pairs, {"num_pairs": len(pairs), **{f"num_{kind}": counts[kind] for kind in LOST_POINTS}})


STAGE = table_stage(
    "verdict_pairs",
    PreferencePair,
    run,
    needs={"candidates": Candidate, "judgements": Judgement},
    settings=("verdict_pairs", "judge.rubric", "judge.mode", "judge.max_score", "seed"),
    summary=lambda metrics: [("verdict pairs", f"{metrics['num_pairs']:.0f}")],
)
