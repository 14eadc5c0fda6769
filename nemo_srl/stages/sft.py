"""M1: supervised fine-tuning of M0 on IFT (answering) and EFT (judging) seed data (paper section 2.1)."""

from __future__ import annotations

from collections.abc import Iterable

from nemo_srl.chat import ChatTemplate
from nemo_srl.judging import verdicts
from nemo_srl.protocols import SFTRow, TrainingTask
from nemo_srl.records import EFTExample, IFTExample
from nemo_srl.stages import Context
from nemo_srl.stages.training import training_stage


def answer_rows(examples: Iterable[IFTExample], chat: ChatTemplate) -> list[SFTRow]:
    """Instructions and their answers."""
    return [SFTRow(prompt=chat.render(x.instruction), response=chat.response_text(x.response)) for x in examples]


def verdict_rows(examples: Iterable[EFTExample], chat: ChatTemplate, *, rubric: str) -> list[SFTRow]:
    """Judge prompts and the verdicts on them, in the judge's format."""
    return [
        SFTRow(
            prompt=chat.render(verdicts.render(rubric, instruction=x.instruction, response=x.response)),
            response=chat.response_text(verdicts.verdict_text(x.justification, x.score)),
        )
        for x in examples
    ]


def task(ctx: Context) -> TrainingTask:
    model_dir = ctx.inputs["policy"].model_dir
    chat = ChatTemplate(model_dir, chat_template=ctx.cfg.model.chat_template)
    rows = answer_rows(ctx.inputs["ift"].read(), chat)
    if "eft" in ctx.inputs:
        rows += verdict_rows(ctx.inputs["eft"].read(), chat, rubric=ctx.cfg.judge.rubric)
    return TrainingTask(algorithm="sft", model_dir=model_dir, rows=rows, optim=ctx.cfg.sft, seed=ctx.cfg.seed)


STAGE = training_stage(
    "sft", task, ("sft", "judge.rubric", "model.chat_template", "trainer.name", "trainer.precision", "seed")
)
