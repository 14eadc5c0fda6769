"""A stage: the judge is asked again about every answer, and each answer gets both mean scores.

A judge whose two scores differ much is not sure of what it says.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean

from nemo_srl.judging import mean_scores
from nemo_srl.records import Candidate, Judgement
from nemo_srl.stages import MODEL, Context, Made, settings_of, table_stage
from nemo_srl.stages.calls import open_caller


@dataclass(frozen=True, kw_only=True)
class SecondOpinion:
    """The mean scores of one answer; None where no verdict had a score."""

    candidate_key: str
    first: float | None
    second: float | None

    @property
    def key(self) -> str:
        return self.candidate_key


def run(ctx: Context) -> Made[SecondOpinion]:
    candidates = ctx.read("candidates", Candidate)
    material = {c.key: (c.prompt, c.response) for c in candidates}
    with open_caller(ctx) as caller:
        again = caller.judge.ask(material, title="second opinions", seed=ctx.cfg.seed + 1)
    first, second = mean_scores(ctx.read("judgements", Judgement)), mean_scores(again)
    opinions = [SecondOpinion(candidate_key=key, first=first.get(key), second=second.get(key)) for key in material]
    differences = [abs(x.first - x.second) for x in opinions if x.first is not None and x.second is not None]
    return Made(opinions, {"mean_difference": fmean(differences)} if differences else {})


STAGE = table_stage(
    "second_opinion",
    SecondOpinion,
    run,
    needs={"judge": MODEL, "candidates": Candidate, "judgements": Judgement},
    settings=(*settings_of("judge"), "model.chat_template", "seed"),
    engines=("judge",),
    model="judge",
)
