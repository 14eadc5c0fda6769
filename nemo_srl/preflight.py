"""What can be known before the first stage runs: that every text fits the model, and that both trainings can.

An hour of generation that ends in "prompt too long" or "not a divisor" is an hour lost; this takes seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from nemo_srl import engines
from nemo_srl.chat import ChatTemplate
from nemo_srl.config import Config, Role
from nemo_srl.errors import DataError
from nemo_srl.judging import verdicts
from nemo_srl.models import hf
from nemo_srl.records import EFTExample
from nemo_srl.trainers import trainer_backend


def check(cfg: Config, model_dir: Path, held_out: Sequence[EFTExample]) -> None:
    """Raises `ConfigError` or `DataError` for what would only fail later.

    Training rows are not looked at here: SFT comes first and drops and counts those that are too long.
    """
    trainer_backend(cfg.trainer).check(cfg.trainer, [cfg.sft, cfg.dpo], hf.read_spec(model_dir))
    for role in get_args(Role):
        engines.check(cfg.engine_for(role), model_dir)
    chat = ChatTemplate(model_dir, chat_template=cfg.model.chat_template)
    context = hf.read_spec(model_dir).max_position_embeddings
    for x in held_out:
        _check_fits(chat, x.key, "candidates", x.instruction, cfg.candidates.max_tokens, context)
        prompt = verdicts.render(cfg.judge.rubric, instruction=x.instruction, response=x.response)
        _check_fits(chat, x.key, "judge", prompt, cfg.judge.max_tokens, context)


def _check_fits(chat: ChatTemplate, key: str, section: str, text: str, max_tokens: int, context: int) -> None:
    num_tokens = chat.num_tokens(chat.render(text))
    if num_tokens + max_tokens > context:
        raise DataError(
            f"data.eft_eval_path: {key!r} has {num_tokens} tokens as a prompt, and {section}.max_tokens={max_tokens} "
            f"more may follow, but the model's context is {context} tokens. Shorten or remove the example, or lower "
            f"{section}.max_tokens."
        )
