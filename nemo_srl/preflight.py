"""Checks before the first stage runs: every text must fit the model, and all trainings must be able to start.

These checks take seconds. Without them, the same errors would end a run after hours of generation.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from nemo_srl import judging, pairing
from nemo_srl.chat import ChatTemplate
from nemo_srl.config import Config, Role
from nemo_srl.engines import engine_backend
from nemo_srl.errors import ConfigError, DataError, ModelError
from nemo_srl.models import hf
from nemo_srl.models.hf import ModelSpec
from nemo_srl.records import EFTExample
from nemo_srl.trainers import trainer_backend


def check(
    cfg: Config, model_dir: Path, held_out: Sequence[EFTExample], eft: Sequence[EFTExample] = (),
) -> None:  # fmt: skip
    """Raise `ConfigError`, `ModelError` or `DataError` for what would stop the run later, or teach a wrong lesson.

    Training rows are not checked: SFT is the first stage, and it drops and counts rows that are too long.
    """
    spec = hf.read_spec(model_dir)
    check_shape(cfg, spec)
    for role in get_args(Role):
        engine = cfg.engine_for(role)
        engine_backend(engine).check(engine, model_dir)
    reader = judging.reader(cfg.judge)
    reader.check(cfg.judge)
    chat = ChatTemplate(model_dir, chat_template=cfg.model.chat_template, thinking_tags=cfg.model.thinking_tags)
    if chat.max_token_id >= spec.vocab_size:
        raise ModelError(
            f"{model_dir}: the tokenizer has ids up to {chat.max_token_id}, and config.json has vocab_size="
            f"{spec.vocab_size}. A text with such a token would end the run. If tokens were added to the tokenizer: "
            "model.resize_token_embeddings(len(tokenizer)), and save the model again."
        )
    check_verdict_pairs(cfg, eft)
    for key, examples in (("eft_path", eft), ("eft_eval_path", held_out)):
        for example in examples:
            check_score(example, cfg.judge.max_score, f"data.{key}")
    for x in held_out:
        prompts = [("candidates", cfg.candidates, x.instruction), ("judge", cfg.judge, reader.lesson(x, cfg.judge)[0])]
        for section, sampling, text in prompts:
            num_tokens, max_tokens = chat.num_tokens(chat.render(text)), sampling.max_tokens
            if num_tokens + max_tokens > spec.max_position_embeddings:
                raise DataError(
                    f"data.eft_eval_path: {x.key!r} has {num_tokens} tokens as a prompt, and {section}.max_tokens="
                    f"{max_tokens} more may follow, but the model's context is {spec.max_position_embeddings} tokens. "
                    f"Shorten or remove the example, or lower {section}.max_tokens."
                )


def check_verdict_pairs(cfg: Config, eft: Sequence[EFTExample]) -> None:
    """Raises `ConfigError` if verdict pairs would teach another kind of verdict than the EFT examples."""
    number = cfg.verdict_pairs.num_prompts
    remedy = "Set verdict_pairs.num_prompts=0."
    if number and judging.reader(cfg.judge).absolute:
        raise ConfigError(
            f"verdict_pairs.num_prompts={number}: a verdict of such a pair is a score, and judge.mode="
            f"{cfg.judge.mode!r} gives none. {remedy}"
        )
    if number and (reasons := [x.key for x in eft if x.justification.strip()]):
        raise ConfigError(
            f"verdict_pairs.num_prompts={number}: a verdict of such a pair is the score alone, and data.eft_path "
            f"teaches verdicts with reasons ({len(reasons)} of {len(eft)} examples, the first is {reasons[0]!r}). "
            f"{remedy} Or give EFT examples with an empty `justification`."
        )


def check_score(example: EFTExample, max_score: int, key: str) -> None:
    """Raises `DataError` for a score that no verdict can have."""
    if example.score > max_score:
        raise DataError(
            f"{key}: {example.key!r} has score={example.score}, and judge.max_score={max_score}. A verdict with more "
            "points is not read. Correct the example or remove it, or set judge.max_score and a judge.rubric that "
            "gives as many points."
        )


def check_shape(cfg: Config, spec: ModelSpec) -> None:
    """The checks that need only the shape of the model, not its weights. Raises `ConfigError`."""
    pairing.rule(cfg.pairs)
    trainings = [cfg.sft, cfg.dpo, *([cfg.refresh] if cfg.data.rankings_path else [])]
    trainer_backend(cfg.trainer).check(cfg.trainer, trainings, spec)
