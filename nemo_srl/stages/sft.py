"""M1: supervised fine-tuning of M0 on IFT (answering) and EFT (judging) seed data (paper section 2.1)."""

from __future__ import annotations

from collections.abc import Iterable

from nemo_srl.config import Config, RefreshConfig, SFTConfig
from nemo_srl.judging import reader
from nemo_srl.protocols import SFTRow, TrainingTask
from nemo_srl.records import EFTExample, IFTExample
from nemo_srl.stages.base import CHAT, MODEL, Context, Need
from nemo_srl.stages.training import training_stage
from nemo_srl.workload import Assumptions, Trained


def sft_task(
    ctx: Context, optim: SFTConfig | RefreshConfig, answers: Iterable[tuple[str, str]], verdicts: Iterable[EFTExample]
) -> TrainingTask:
    """SFT on (instruction, answer) pairs, and on judge prompts with the verdicts on them in the judge's format."""
    cfg, chat = ctx.cfg, ctx.chat
    lessons = (reader(cfg.judge).lesson(x, cfg.judge) for x in verdicts)
    rows = [
        SFTRow(prompt=chat.render_for_training(x), response=chat.response_text(y), weight=weight)
        for weight, texts in ((1.0, answers), (optim.verdict_weight, lessons))
        for x, y in texts
    ]
    return TrainingTask(algorithm="sft", model_dir=ctx.model_dir, rows=rows, optim=optim, seed=cfg.seed)


def task(ctx: Context) -> TrainingTask:
    answers = [(x.instruction, x.response) for x in ctx.read("ift", IFTExample)]
    return sft_task(ctx, ctx.cfg.sft, answers, ctx.read("eft", EFTExample) if ctx.has("eft") else ())


def work(cfg: Config, a: Assumptions) -> Trained:
    return Trained(
        optim=cfg.sft,
        num_rows=a.num_sft_rows,
        row_tokens=a.mean_prompt_tokens + a.mean_response_tokens,
        num_sequences=1,
    )


STAGE = training_stage(
    "sft",
    task,
    needs={"policy": MODEL, "ift": IFTExample, "eft": Need(EFTExample, optional=True)},
    # The reader that `judge.mode` names decides what EFT teaches.
    settings=("sft", "judge.rubric", "judge.mode", "judge.justification", *CHAT, "seed"),
    added=("judge.mode",),
    per="run",
    work=work,
)
