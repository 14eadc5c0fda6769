"""M1: supervised fine-tuning of M0 on IFT (answering) and EFT (judging) seed data (paper section 2.1)."""

from __future__ import annotations

from collections.abc import Iterable

from nemo_srl.chat import ChatTemplate
from nemo_srl.config import Config, JudgeConfig
from nemo_srl.judging import reader
from nemo_srl.protocols import SFTRow, TrainingTask
from nemo_srl.records import EFTExample, IFTExample
from nemo_srl.stages.base import MODEL, Context, Need
from nemo_srl.stages.training import training_stage
from nemo_srl.workload import Assumptions, Trained


def answer_rows(examples: Iterable[IFTExample], chat: ChatTemplate) -> list[SFTRow]:
    """Instructions and their answers."""
    return [SFTRow(prompt=chat.render(x.instruction), response=chat.response_text(x.response)) for x in examples]


def verdict_rows(examples: Iterable[EFTExample], chat: ChatTemplate, cfg: JudgeConfig) -> list[SFTRow]:
    """Judge prompts and the verdicts on them, in the judge's format."""
    lessons = (reader(cfg).lesson(x, cfg) for x in examples)
    return [SFTRow(prompt=chat.render(prompt), response=chat.response_text(verdict)) for prompt, verdict in lessons]


def task(ctx: Context) -> TrainingTask:
    rows = answer_rows(ctx.read("ift", IFTExample), ctx.chat)
    if ctx.has("eft"):
        rows += verdict_rows(ctx.read("eft", EFTExample), ctx.chat, ctx.cfg.judge)
    return TrainingTask(algorithm="sft", model_dir=ctx.model_dir, rows=rows, optim=ctx.cfg.sft, seed=ctx.cfg.seed)


def work(cfg: Config, a: Assumptions) -> Trained:
    return Trained(
        optim=cfg.sft,
        num_rows=a.num_sft_rows,
        row_tokens=a.mean_prompt_tokens + a.mean_response_tokens,
        num_sequences=1,
        num_forward_passes=3,
    )


STAGE = training_stage(
    "sft",
    task,
    needs={"policy": MODEL, "ift": IFTExample, "eft": Need(EFTExample, optional=True)},
    # The reader that `judge.mode` names decides what EFT teaches.
    settings=("sft", "judge.rubric", "judge.mode", "model.chat_template", "seed"),
    added=("judge.mode",),
    per="run",
    work=work,
)
