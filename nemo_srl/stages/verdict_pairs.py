"""Verdict pairs: they teach M_t to judge in each iteration, and need nobody's scores.

Code damages an answer of M_t (`nemo_srl/data/damage.py`). So it knows that the damaged one is worse, although it does
not know how good the answer was. Each of the two answers makes a pair: one prompt of the judge, and two verdicts on it.
For the answer, the chosen verdict has the points that M_t gave, and the rejected one has fewer. For the damaged answer,
it is the other way round. `policy` trains on these pairs and on those of answers together.

An EFT example can make a pair as well (`verdict_pairs.num_seed`). Its own verdict is chosen, and the rejected one has
another score.

`taught_verdicts.py` and `meta_judge.py` make pairs of verdicts in other ways (`verdict_pairs.source`).

The verdicts are the score alone. So this suits a judge whose EFT examples have no justifications. `preflight` checks
that.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from nemo_srl.config import Config, JudgeConfig
from nemo_srl.data import damage
from nemo_srl.errors import DataError
from nemo_srl.judging import mean_scores, reader
from nemo_srl.pairing import Scored, best_complete
from nemo_srl.records import Candidate, EFTExample, Judgement, PreferencePair
from nemo_srl.stages.base import Context, Made, Need, table_stage

LOST_POINTS: Mapping[str, int] = {"cut": 1, "looped": 1, "swapped": 3, "stuck": 2, "asked": 3, "reversed": 3}
"""How many of all points no copy with this damage can have: completeness, the absence of repetition, or both. What is
no answer to the instruction is off topic, and keeps no rule of it."""


def best_answers(candidates: Sequence[Candidate], scores: Mapping[str, float]) -> list[Candidate]:
    """The best answer to each prompt by M_t's own scores, among those that were not cut off at `max_tokens`."""
    by_prompt: dict[str, list[Scored]] = defaultdict(list)
    for c in candidates:
        if c.key in scores:
            by_prompt[c.prompt_id].append(Scored(c, scores[c.key]))
    return [best.candidate for group in by_prompt.values() if (best := best_complete(group))]


def damaged(answer: Candidate, others: Sequence[Candidate], kind: str, rng: random.Random) -> str | None:
    """`answer` with this damage. `others` are answers to other prompts. None if it cannot be done."""
    if kind in ("swapped", "asked"):
        if not others:
            return None
        other = rng.choice(others)
        return other.response if kind == "swapped" else other.prompt
    if kind == "reversed":
        return damage.in_reverse(answer.response)
    return {"cut": damage.cut, "looped": damage.looped, "stuck": damage.stuck}[kind](answer.response, rng)


@dataclass(frozen=True)
class Damaged:
    """An answer, and a copy that is worse by its making."""

    answer: Candidate
    worse: str
    points: int
    """M_t's own points for the answer, rounded."""
    fewer: int
    """The points of the copy: fewer than the answer's, and none that the damage takes away."""


def damaged_answers(
    candidates: Sequence[Candidate], scores: Mapping[str, float], limit: int, rng: random.Random, *, max_score: int
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
        fewer = max(0, min(points - 1, max_score - LOST_POINTS[kind]))
        if worse and worse != answer.response and fewer < points:
            counts[kind] += 1
            found.append(Damaged(answer, worse, points, fewer))
    return found, counts


def verdicts(x: Damaged, cfg: JudgeConfig) -> Iterator[PreferencePair]:
    """The two pairs of an answer and its damaged copy."""
    for name, response, right, wrong in (
        ("answer", x.answer.response, x.points, x.fewer),
        ("damaged", x.worse, x.fewer, x.points),
    ):
        example = EFTExample(
            example_id=x.answer.key, instruction=x.answer.prompt, response=response, justification="", score=right
        )
        yield right_and_wrong(f"{x.answer.prompt_id}/{name}", example, wrong, cfg)


def right_and_wrong(key: str, example: EFTExample, wrong: int, cfg: JudgeConfig) -> PreferencePair:
    """The pair `key`: the example's verdict is chosen, and the same with the score `wrong` is rejected."""
    (prompt, chosen), (_, rejected) = (
        reader(cfg).lesson(replace(example, score=score), cfg) for score in (example.score, wrong)
    )
    return PreferencePair(
        prompt_id=key,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        chosen_score=0.0,  # by how many points a verdict is wrong, below zero
        rejected_score=-float(abs(wrong - example.score)),
    )


def seed_pairs(seed: Sequence[EFTExample], cfg: Config, iteration: int) -> list[PreferencePair]:
    """The pairs of this iteration's `verdict_pairs.num_seed` examples. After the last example comes the first again.

    Those of one instruction follow each other, so that an iteration can compare the answers to it.
    """
    by_instruction: dict[str, list[EFTExample]] = defaultdict(list)
    for x in seed:
        by_instruction[x.instruction].append(x)
    groups = list(by_instruction.values())
    random.Random(f"{cfg.seed}:seed_pairs").shuffle(groups)
    order = [x for group in groups for x in group]
    number, rng = cfg.verdict_pairs.num_seed, random.Random(f"{cfg.seed}:{iteration}:seed_pairs")
    taken = [order[i % len(order)] for i in range((iteration - 1) * number, iteration * number)] if order else []
    found = []
    for x in dict.fromkeys(taken):
        wrong = rng.choice([score for score in range(cfg.judge.max_score + 1) if score != x.score])
        found.append(right_and_wrong(f"{x.key}/seed", x, wrong, cfg.judge))
    return found


def run(ctx: Context) -> Made[PreferencePair]:
    cfg = ctx.cfg
    rng = random.Random(f"{cfg.seed}:{ctx.iteration}:verdict_pairs")
    scores = mean_scores(ctx.read("judgements", Judgement))
    candidates = ctx.read("candidates", Candidate)
    number, most = cfg.verdict_pairs.num_prompts, cfg.judge.max_score
    found, counts = damaged_answers(candidates, scores, number, rng, max_score=most)
    seed = seed_pairs(ctx.read("eft", EFTExample), cfg, ctx.iteration) if ctx.has("eft") else []
    pairs = [*(p for x in found for p in verdicts(x, cfg.judge)), *seed]
    if not found:
        num_answers = len(best_answers(candidates, scores))
        raise DataError(
            f"verdict_pairs.num_prompts={cfg.verdict_pairs.num_prompts}: none of {num_answers} answers that ended "
            "before candidates.max_tokens has a point and could be damaged. For a run without such pairs, set "
            "verdict_pairs.num_prompts=0. The finished stages are kept."
        )
    figures = {f"num_{kind}": counts[kind] for kind in LOST_POINTS}
    return Made(pairs, {"num_pairs": len(pairs), "num_seed": len(seed), **figures})


STAGE = table_stage(
    "verdict_pairs",
    PreferencePair,
    run,
    needs={"candidates": Candidate, "judgements": Judgement, "eft": Need(EFTExample, optional=True)},
    settings=("verdict_pairs", "judge.rubric", "judge.mode", "judge.max_score", "seed"),
    summary=lambda metrics: [("verdict pairs", f"{metrics['num_pairs']:.0f}")],
    version=3,  # 2: three more kinds of damage; 3: EFT examples come by instruction
)
