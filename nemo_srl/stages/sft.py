"""M1: supervised fine-tuning of M0 on IFT (answering) and EFT (judging) seed data (paper section 2.1)."""

from __future__ import annotations

from nemo_srl import judge
from nemo_srl.chat import ChatTemplate
from nemo_srl.protocols import SFTRow, TrainingTask
from nemo_srl.records import EFTExample, IFTExample
from nemo_srl.stages import Context
from nemo_srl.stages.training import training_stage


def task(ctx: Context) -> TrainingTask:
    model_dir = ctx.inputs["policy"].model_dir
    chat = ChatTemplate(model_dir, chat_template=ctx.cfg.model.chat_template)
    ift: list[IFTExample] = ctx.inputs["ift"].read()
    eft: list[EFTExample] = ctx.inputs["eft"].read() if "eft" in ctx.inputs else []
    rows = [SFTRow(prompt=chat.render(x.instruction), response=chat.response_text(x.response)) for x in ift]
    rows += [
        SFTRow(
            prompt=chat.render(judge.render(ctx.cfg.judge.rubric, instruction=x.instruction, response=x.response)),
            response=chat.response_text(judge.verdict_text(x.justification, x.score)),
        )
        for x in eft
    ]
    return TrainingTask(algorithm="sft", model_dir=model_dir, train_rows=rows, validation_rows=())


STAGE = training_stage(
    "sft", task, ("sft", "judge.rubric", "model.chat_template", "trainer.name", "trainer.precision", "seed")
)
