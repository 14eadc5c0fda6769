"""Early stopping (paper section 3.1.1): a judge compares the checkpoints of a DPO training on validation prompts.

The paper generates with a checkpoint every 200 steps, lets a strong judge compare with the checkpoint before, and stops
when it is no longer better. Here the training runs to its end and publishes the model of every checkpoint
(`dpo.save_interval`). Then the checkpoints are compared in their order. The last one that won against the one before it
becomes M_{t+1}. So the model is the one that the paper's rule would stop at. The steps after it are made in vain, and
the learning rate falls as planned for all steps.
"""

from __future__ import annotations

import logging
from typing import Any

from nemo_srl.artifacts import BaseModel, Model, SourceFile
from nemo_srl.experiment import Experiment
from nemo_srl.iteration import Iteration
from nemo_srl.models import hf
from nemo_srl.protocols import step_of
from nemo_srl.records import Question
from nemo_srl.stages import answers, chosen, head_to_head, policy

log = logging.getLogger(__name__)


def train(iteration: Iteration, questions: SourceFile[Question], **inputs: Any) -> Model:
    """M_{t+1} of an iteration. `inputs` are those of the stage `policy`."""
    exp, t = iteration.exp, iteration.number
    trained = exp.run(policy.STAGE, t, directory="trained", **inputs)
    checkpoints = [BaseModel(path, hf.digest(path)) for path in trained.checkpoints]
    best, before = checkpoints[0], _answers(exp, t, checkpoints[0], questions)
    for checkpoint in checkpoints[1:]:
        step = step_of(checkpoint.model_dir)
        now = _answers(exp, t, checkpoint, questions)
        judge = iteration.model("early_stopping.model")
        match = exp.run(head_to_head.STAGE, t, judge=judge, a=now, b=before, directory=f"match_{step:06d}")
        found = {m.name: m.value or 0.0 for m in match.read()}
        if found["win_rate"] <= found["loss_rate"]:
            log.info("early stopping: step %d is not better than step %d", step, step_of(best.model_dir))
            break
        best, before = checkpoint, now
    return exp.run(chosen.STAGE, t, trained=trained, checkpoint=best, directory="policy")


def _answers(exp: Experiment, t: int, checkpoint: BaseModel, questions: SourceFile[Question]) -> Any:
    """The checkpoint's answers to the validation prompts."""
    directory = f"answers_{step_of(checkpoint.model_dir):06d}"
    return exp.run(answers.STAGE, t, policy=checkpoint, questions=questions, directory=directory)
