"""What code knows about a model on the checked data (`data/checked/`): the true score of its answers, and its judging.

This is the place where true scores meet a run. It reads what the stage `evaluation` published. No other stage reads
what it makes, and nothing that trains may import it: `make check` tests that.

    true_score                 mean true score of the answers to the held-out instructions, 0 to 5
    true_<point>               share of these answers that have the point (`nemo_srl/data/checked/truth.py`)
    pairwise_accuracy_models   the judge's pairwise accuracy on held-out answers that models wrote, a tie counting half
    surface_accuracy           pairwise accuracy of the surface of the answers (`nemo_srl/judging/surface.py`), fitted
                               on the EFT examples; read the judge's accuracy beside it

The 95% intervals are over instructions (`nemo_srl/judging/intervals.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from operator import attrgetter

from nemo_srl.artifacts import Table
from nemo_srl.data.checked.truth import MAX_SCORE, CheckedInstruction, TrueScore, true_score
from nemo_srl.errors import DataError
from nemo_srl.judging.intervals import SHARE, Sums, ratio, rows_of, sums_of
from nemo_srl.judging.surface import surface_accuracy
from nemo_srl.records import Candidate, EFTExample, Judgement, Metric
from nemo_srl.stages.base import Context, Made, Need, figures, table_stage
from nemo_srl.stages.candidates import answered
from nemo_srl.stages.evaluation import judging_sums

BY_MODELS = "model"
"""The category of held-out answers that models wrote, and that nobody damaged."""


def check(asked: Iterable[str], instructions: Sequence[CheckedInstruction]) -> None:
    """Raises `DataError` if code cannot score answers to one of the questions."""
    if unknown := sorted(set(asked) - {x.instruction for x in instructions}):
        raise DataError(
            f"data.checked_path: it has no instruction {unknown[0]!r}, which is in data.eft_eval_path. Code can score "
            "answers to its own instructions only: give the two files that one call of recipes/build_checked_seed.py "
            "wrote, or set data.checked_path='' for a run without true scores."
        )


def true_scores(
    answers: Sequence[Candidate], instructions: Sequence[CheckedInstruction]
) -> dict[str, list[TrueScore]]:  # fmt: skip
    """The points of all answers, by the text of the instruction. Questions without an answer are left out.

    Raises `DataError` for an unknown instruction.
    """
    known = {x.instruction: x for x in instructions}
    check([a.prompt for a in answers], instructions)
    found: dict[str, list[TrueScore]] = defaultdict(list)
    for a in answered(answers):
        found[a.prompt].append(true_score(known[a.prompt], a.response, finish_reason=a.finish_reason))
    return found


def answering(scores: Mapping[str, Sequence[TrueScore]]) -> dict[str, Sums]:
    """What the answers to each instruction add to the metrics of answers."""

    def sums(value: Callable[[TrueScore], float]) -> Sums:
        return sums_of({text: [float(value(s)) for s in group] for text, group in scores.items()})

    points = {f"true_{field.name}": sums(attrgetter(field.name)) for field in fields(TrueScore)}
    return {"true_score": sums(attrgetter("score")), **points}


def judging(examples: Sequence[EFTExample], judgements: Sequence[Judgement]) -> Sums:
    """What each instruction adds to `pairwise_accuracy_models`."""
    own = [x for x in examples if x.category == BY_MODELS]
    return judging_sums(own, judgements, max_score=MAX_SCORE)["pairwise_accuracy_ties_half"]


def run(ctx: Context) -> Made[Metric]:
    evaluation: Table[Metric] = ctx.inputs["evaluation"]
    examples = ctx.read("eft_eval", EFTExample)
    scores = true_scores(evaluation.part("answers", Candidate), ctx.read("instructions", CheckedInstruction))
    asked = [x for x in examples if x.instruction in scores]
    judged = judging(asked, evaluation.part("judgements", Judgement))
    sums = {**answering(scores), "pairwise_accuracy_models": judged}
    limits = {"true_score": (0.0, float(MAX_SCORE))}
    metrics = [ratio(found, limits.get(name, SHARE)).named(name) for name, found in sums.items()]
    if ctx.has("eft"):
        surface = surface_accuracy(ctx.read("eft", EFTExample), asked, max_score=MAX_SCORE)
        metrics.append(surface.named("surface_accuracy"))
    return Made(metrics, figures(metrics), {"groups": rows_of(sums)})


STAGE = table_stage(
    "checked",
    Metric,
    run,
    version=2,  # intervals (nemo_srl/judging/intervals.py)
    needs={
        "evaluation": Metric,
        "instructions": CheckedInstruction,
        "eft_eval": EFTExample,
        "eft": Need(EFTExample, optional=True),
    },
    settings=(),
    per="model",
)
