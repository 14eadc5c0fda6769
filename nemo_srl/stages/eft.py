"""EFT data from people's rankings: the judge's verdicts that agree with them (paper section 3.1.1).

The judge judges each ranked answer to an instruction several times. One verdict for each answer is kept if their scores
order the answers exactly as people did, ties included. Then some examples with common scores are dropped, so that the
judge does not learn to give always the same score. People write neither scores nor reasons.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from nemo_srl import lineage
from nemo_srl.artifacts import JOURNAL
from nemo_srl.errors import DataError
from nemo_srl.records import EFTExample, Judgement, RankedAnswers
from nemo_srl.stages.base import CHAT, Context, Made, Need, settings_of, table_stage
from nemo_srl.stages.calls import open_caller


def agreeing_verdicts(
    ranked: RankedAnswers, judgements: Sequence[Sequence[Judgement]], rng: random.Random
) -> list[Judgement] | None:
    """One verdict for each answer, so that their scores order the answers as people did. None if nothing was found.

    `judgements[i]` are all verdicts on `ranked.responses[i]`. The number of random tries is the number of verdicts on
    an answer. Trying all combinations would find agreement by luck.
    """
    wanted = [_sign(b - a) for a in ranked.ranks for b in ranked.ranks]  # the lower rank is the better one
    for _ in range(len(judgements[0])):
        chosen = [rng.choice(options) for options in judgements]
        scores = [j.score for j in chosen if j.score is not None]
        if len(scores) == len(chosen) and [_sign(a - b) for a in scores for b in scores] == wanted:
            return chosen
    return None


def balanced(examples: Sequence[EFTExample], rng: random.Random) -> list[EFTExample]:
    """At most n examples of each score, where n is the median of the numbers of examples per score."""
    shuffled = list(examples)
    rng.shuffle(shuffled)
    by_score: dict[int, list[EFTExample]] = {x.score: [] for x in examples}
    for x in shuffled:
        by_score[x.score].append(x)
    limit = max(1, int(median(map(len, by_score.values())))) if by_score else 0
    return [x for same in by_score.values() for x in same[:limit]]


def examples_of(
    ranked: RankedAnswers, agreeing: Sequence[Judgement], *, prefix: str, justification: Callable[[str], str]
) -> list[EFTExample]:
    """Agreeing verdicts as EFT examples. A verdict with a fractional score is left out.

    `justification` finds in a verdict what stands before the score.
    """
    return [
        EFTExample(
            example_id=f"{prefix}-{ranked.example_id}-{i}",
            instruction=ranked.instruction,
            response=response,
            justification=justification(j.verdict),
            score=int(j.score),
        )
        for i, (response, j) in enumerate(zip(ranked.responses, agreeing, strict=True))
        if j.score is not None and j.score == int(j.score)
    ]


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)


def check(ranked: Sequence[RankedAnswers]) -> None:
    """Raises `DataError` for rankings that cannot be judged."""
    for x in ranked:
        if len(x.responses) < 2 or len(x.responses) != len(x.ranks):
            raise DataError(
                f"data.rankings_path: {x.example_id!r} has {len(x.responses)} responses and {len(x.ranks)} ranks. Give "
                "at least two responses, with one rank each."
            )


def run(ctx: Context) -> Made[EFTExample]:
    cfg = ctx.cfg
    rankings = ctx.read("rankings", RankedAnswers)
    check(rankings)
    material = {_key(x, i): (x.instruction, response) for x in rankings for i, response in enumerate(x.responses)}
    with open_caller(ctx) as caller:
        judge = caller.judge.absolute
        n, seed = cfg.refresh.num_judgements, cfg.seed + ctx.iteration
        judgements = judge.ask(material, title="ranked answers", n=n, seed=seed)
    verdicts: dict[str, list[Judgement]] = defaultdict(list)
    for j in judgements:
        verdicts[j.candidate_key].append(j)
    rng = random.Random(f"{cfg.seed}:{ctx.iteration}:eft")
    examples: list[EFTExample] = []
    num_agreeing = 0
    for x in rankings:
        if chosen := agreeing_verdicts(x, [verdicts[_key(x, i)] for i in range(len(x.responses))], rng):
            num_agreeing += 1
            examples += examples_of(x, chosen, prefix=f"iter{ctx.iteration}", justification=judge.justification)
    kept = balanced(examples, rng)
    num_valid = sum(j.score is not None for j in judgements)
    if not kept:
        raise DataError(
            f"data.rankings_path: the {len(rankings)} rankings gave no example. {num_valid} of {len(judgements)} "
            f"verdicts have a score, and {num_agreeing} rankings agree with them. All verdicts are kept in "
            f"{ctx.output.path / JOURNAL}. If few verdicts have a score, the model cannot judge: use another judge "
            "(judge.engine), with a new run_dir, because all verdicts change. Otherwise give more rankings, or raise "
            f"refresh.num_judgements. {_first_delete(ctx.output.path)}"
        )
    rates = {"valid_rate": num_valid / len(judgements), "agreement_rate": num_agreeing / len(rankings)}
    return Made(kept, {"num_rankings": len(rankings), **rates, "num_examples": len(kept), **caller.figures()})


def _first_delete(stage_dir: Path) -> str:
    old = lineage.with_settings(stage_dir.parent.parent, ["refresh.num_judgements"]) or [stage_dir]
    return f"Before that, delete what was made with the old ones: {lineage.removal(old)}. All other stages stay."


def _key(x: RankedAnswers, i: int) -> str:
    return f"{x.example_id}/{i:02d}"


STAGE = table_stage(
    "eft",
    EFTExample,
    run,
    version=2,  # what counts as the score of a verdict (nemo_srl/judging/form.py)
    needs={"judge": Need(None, formerly="policy"), "rankings": RankedAnswers},
    settings=("refresh.num_judgements", *settings_of("judge"), *CHAT, "seed"),
    engines=("judge",),
    model="judge",
)
