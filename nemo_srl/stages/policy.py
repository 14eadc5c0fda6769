"""M_{t+1}: DPO on the iteration's pairs, from M_t, which is also the reference (paper section 2.3)."""

from __future__ import annotations

from nemo_srl.chat import ChatTemplate
from nemo_srl.protocols import DPORow, TrainingTask
from nemo_srl.records import PreferencePair
from nemo_srl.stages import Context
from nemo_srl.stages.training import training_stage


def task(ctx: Context) -> TrainingTask:
    model_dir = ctx.inputs["policy"].model_dir
    chat = ChatTemplate(model_dir, chat_template=ctx.cfg.model.chat_template)
    pairs: list[PreferencePair] = ctx.inputs["pairs"].read()
    rows = [
        DPORow(
            prompt=chat.render(p.prompt),
            chosen=chat.response_text(p.chosen),
            rejected=chat.response_text(p.rejected),
            chosen_reward=p.chosen_score,
            rejected_reward=p.rejected_score,
        )
        for p in pairs
    ]
    return TrainingTask(algorithm="dpo", model_dir=model_dir, rows=rows, optim=ctx.cfg.dpo, seed=ctx.cfg.seed)


STAGE = training_stage("policy", task, ("dpo", "model.chat_template", "trainer.name", "trainer.precision", "seed"))
