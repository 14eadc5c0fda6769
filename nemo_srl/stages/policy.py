"""M_{t+1}: DPO on the iteration's pairs, from M_t, which is also the reference (paper section 2.3).

If there are pairs of verdicts as well (`verdict_pairs.source`), or pairs of earlier iterations (`pairs.accumulate`),
DPO trains on all of them together.
"""

from __future__ import annotations

from nemo_srl.config import Config
from nemo_srl.protocols import DPORow, TrainingTask
from nemo_srl.records import PreferencePair
from nemo_srl.stages.base import CHAT, MODEL, Context, Need
from nemo_srl.stages.training import training_stage
from nemo_srl.workload import Assumptions, Trained


def task(ctx: Context) -> TrainingTask:
    rows = [
        DPORow(
            prompt=ctx.chat.render_for_training(p.prompt),
            chosen=ctx.chat.response_text(p.chosen),
            rejected=ctx.chat.response_text(p.rejected),
            chosen_reward=p.chosen_score,
            rejected_reward=p.rejected_score,
            chosen_finish_reason=p.chosen_finish_reason,
            rejected_finish_reason=p.rejected_finish_reason,
            confidence=p.confidence,
            sft_weight=weight,
            compared=compared,
        )
        for weight, compared, pairs in (
            (1.0, True, [*ctx.read_all("earlier", PreferencePair), *ctx.read("pairs", PreferencePair)]),
            (ctx.cfg.dpo.verdict_weight, ctx.cfg.dpo.compare_verdicts, _verdict_pairs(ctx)),
        )
        for p in pairs
    ]
    return TrainingTask(
        algorithm="dpo", model_dir=ctx.model_dir, rows=rows, optim=ctx.cfg.dpo, seed=ctx.cfg.seed,
        keep_checkpoints=bool(ctx.cfg.early_stopping.prompts_path),
    )  # fmt: skip


def _verdict_pairs(ctx: Context) -> list[PreferencePair]:
    return ctx.read("verdict_pairs", PreferencePair) if ctx.has("verdict_pairs") else []


def work(cfg: Config, a: Assumptions) -> Trained:
    answer = min(a.mean_response_tokens, cfg.candidates.max_tokens)
    pairs_per_answer = 1 if cfg.verdict_pairs.source == "meta_judge" else 2
    num_verdict_pairs = pairs_per_answer * min(cfg.verdict_pairs.num_prompts, cfg.prompts.num_prompts)
    num_verdict_pairs += cfg.verdict_pairs.num_seed
    num_pairs = cfg.prompts.num_prompts * a.pairs_per_prompt
    # A pair of verdicts has the prompt of the judge, which shows an instruction and an answer.
    judged = a.mean_prompt_tokens + answer + a.mean_rubric_tokens
    verdict = min(a.mean_verdict_tokens, cfg.judge.max_tokens)
    prompts = num_pairs * a.mean_prompt_tokens + num_verdict_pairs * judged
    num_rows = num_pairs + num_verdict_pairs
    row_tokens = 2 * (prompts + num_pairs * answer + num_verdict_pairs * verdict) / num_rows
    of_answers = 2 * num_pairs * (a.mean_prompt_tokens + answer) / (num_rows * row_tokens)
    return Trained(
        optim=cfg.dpo,
        num_rows=num_rows,
        row_tokens=row_tokens,
        num_sequences=2,
        shared_tokens=prompts / num_rows,
        num_reference_passes=(1 if cfg.dpo.compare_verdicts else of_answers) / cfg.dpo.max_epochs,
    )


STAGE = training_stage(
    "policy",
    task,
    needs={
        "policy": MODEL,
        "pairs": PreferencePair,
        "verdict_pairs": Need(PreferencePair, optional=True),
        "earlier": Need(PreferencePair, many="earlier"),
    },
    settings=("dpo", *CHAT, "seed"),
    work=work,
)
