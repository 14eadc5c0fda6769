"""The refreshed M_{t+1}: SFT after DPO, on verdicts that agree with people and on its own answers.

DPO trains the policy to answer, and nothing trains its judging, which drifts. The inputs whose names begin
with `eft` hold verdicts: the seed, and what `stages/eft.py` kept in this iteration and the earlier ones.
`own_answers` are candidates of the policy that is refreshed; those cut off at `max_tokens` are left out.
"""

from __future__ import annotations

from dataclasses import fields

from nemo_srl.chat import ChatTemplate
from nemo_srl.config import OptimConfig
from nemo_srl.protocols import SFTRow, TrainingTask
from nemo_srl.records import Candidate
from nemo_srl.stages import Context
from nemo_srl.stages.sft import verdict_rows
from nemo_srl.stages.training import training_stage


def task(ctx: Context) -> TrainingTask:
    model_dir = ctx.inputs["policy"].model_dir
    chat = ChatTemplate(model_dir, chat_template=ctx.cfg.model.chat_template)
    answers: list[Candidate] = ctx.inputs["own_answers"].read()
    rows = [
        SFTRow(prompt=chat.render(c.prompt), response=chat.response_text(c.response))
        for c in answers
        if c.finish_reason == "stop"
    ]
    for name in sorted(ctx.inputs):
        if name.startswith("eft"):
            rows += verdict_rows(ctx.inputs[name].read(), chat, rubric=ctx.cfg.judge.rubric)
    return TrainingTask(algorithm="sft", model_dir=model_dir, rows=rows, optim=ctx.cfg.refresh, seed=ctx.cfg.seed)


STAGE = training_stage(
    "refresh",
    task,
    (
        *(f"refresh.{f.name}" for f in fields(OptimConfig)),
        "judge.rubric", "model.chat_template", "trainer.name", "trainer.precision", "seed",
    ),
)  # fmt: skip
