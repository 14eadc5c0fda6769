"""The refreshed M_{t+1}: SFT after DPO, on verdicts that agree with people and on its own answers.

DPO trains the policy to answer. Nothing trains its judging, which drifts. The input `eft` is the EFT seed, and `kept`
are the verdicts that `stages/eft.py` kept in this iteration and in earlier ones. `own_answers` are candidates of the
policy before the refresh. Answers that were cut off at `max_tokens` are left out.
"""

from __future__ import annotations

from dataclasses import fields

from nemo_srl.config import OptimConfig
from nemo_srl.protocols import TrainingTask
from nemo_srl.records import Candidate, EFTExample
from nemo_srl.stages.base import CHAT, MODEL, Context, Need
from nemo_srl.stages.candidates import answered
from nemo_srl.stages.sft import sft_task
from nemo_srl.stages.training import training_stage


def task(ctx: Context) -> TrainingTask:
    own = answered(ctx.read("own_answers", Candidate))
    answers = [(c.prompt, c.response) for c in own if c.finish_reason == "stop"]
    verdicts = ctx.read("eft", EFTExample) if ctx.has("eft") else []
    return sft_task(ctx, ctx.cfg.refresh, answers, [*verdicts, *ctx.read_all("eft", EFTExample)])


# Without `num_judgements`, which decides what the stage `eft` makes.
_REFRESH = (*(f"refresh.{f.name}" for f in fields(OptimConfig)), "refresh.verdict_weight")

STAGE = training_stage(
    "refresh",
    task,
    needs={
        "policy": MODEL,
        "own_answers": Candidate,
        "eft": Need(EFTExample, optional=True),
        "kept": Need(EFTExample, many="eft"),
    },
    settings=(*_REFRESH, "judge.rubric", "judge.mode", "judge.justification", *CHAT, "seed"),
    added=("judge.mode",),
)
