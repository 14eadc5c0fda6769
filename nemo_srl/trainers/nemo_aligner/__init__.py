"""The trainer `nemo_aligner`: NVIDIA's NeMo-Aligner 0.7.0 (NeMo 2.2.1, megatron-core 0.11.0) as a library.

settings.py, memory.py       what a user sets; how much memory a training needs   no torch
data.py                      text to token ids; which rows are dropped and why    no torch
training_plan.py, feasibility.py   settings + model + data -> NeMo-Aligner's config   no torch
trainer.py, checkpoints.py   prepare, train, export; checkpoints that are kept    torch only when called
run.py                       one rank: environment, platform                      torch, NeMo
session.py                   one rank: NeMo-Aligner's model, data and loop
batches.py, micro_batches.py, shared_beginnings.py, targets.py   what the model sees, and where logits are needed
context_parallel.py, overlap.py   what a rank has of a sequence; weights that arrive late
lora.py, frozen.py           adapters; training of the upper layers alone
reference.py, objectives.py, losses.py   what is minimised
metrics.py, progress.py, divergence.py, stopping.py   what is told of a step, and what ends a training
platforms/                   CPUs, GPUs with pip packages alone, and NVIDIA's containers
"""

from __future__ import annotations

from nemo_srl.trainers import TrainerBackend
from nemo_srl.trainers.nemo_aligner import losses
from nemo_srl.trainers.nemo_aligner.memory import checkpoint_bytes, step_passes, training_memory
from nemo_srl.trainers.nemo_aligner.settings import NemoAlignerSettings
from nemo_srl.trainers.nemo_aligner.trainer import VERSION, NemoAlignerTrainer
from nemo_srl.trainers.nemo_aligner.training_plan import check_plan, fixed_length


def _describe(settings: NemoAlignerSettings) -> str:
    from nemo_srl.trainers.nemo_aligner.run import choose_platform

    return choose_platform(settings)[1]


BACKEND = TrainerBackend(
    settings=NemoAlignerSettings,
    decisive=("precision", "lora_rank", "lora_alpha", "frozen_share"),
    formerly={"num_frozen_layers": "frozen_share"},
    version=VERSION,
    open=NemoAlignerTrainer,
    check=check_plan,
    memory=training_memory,
    checkpoint_bytes=checkpoint_bytes,
    step_passes=step_passes,
    fixed_length=fixed_length,
    whole_batches=True,
    keeps_checkpoints=True,
    uses_confidence=losses.uses_confidence,
    describe=_describe,
)
