"""Checks before the first stage runs: all models and texts must be usable, and all trainings must be able to start.

These checks take seconds. Without them, the same errors would end a run after hours of generation.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import get_args

from nemo_srl import combinations, judging, pairing
from nemo_srl.chat import ChatTemplate
from nemo_srl.config import Config, OptimConfig, Role
from nemo_srl.config.load import key_of
from nemo_srl.engines import engine_backend
from nemo_srl.errors import ConfigError, DataError, ModelError
from nemo_srl.models import hf
from nemo_srl.models.hf import ModelSpec
from nemo_srl.records import EFTExample, IFTExample, Prompt
from nemo_srl.trainers import trainer_backend

log = logging.getLogger(__name__)


def check(
    cfg: Config,
    model_dir: Path,
    held_out: Sequence[EFTExample],
    eft: Sequence[EFTExample] = (),
    *,
    ift: Sequence[IFTExample] = (),
    other_models: Mapping[str, Path] = {},
) -> None:
    """Raise `ConfigError`, `ModelError` or `DataError` for what would stop the run later, or teach a wrong lesson.

    `other_models` are directories by their settings, such as `prompts.model` and `judge.model`. Training rows that are
    too long are left out by the trainer. They are counted here, and refused if the others do not fill a batch.
    """
    spec = hf.read_spec(model_dir)
    check_shape(cfg, spec)
    for role in get_args(Role):
        check_engine(cfg, role, model_dir)
    reader = judging.reader(cfg.judge)
    reader.check(cfg.judge)
    with _naming("model.path", model_dir):
        chat = check_model(cfg, model_dir)
        hf.check_end(model_dir, spec, chat.eos_token_id, "in the tokenizer")
    begun = judging.beginning(reader, cfg.judge, chat)
    check_models(cfg, other_models)
    combinations.check(cfg, eft)
    for key, examples in (("eft_path", eft), ("eft_eval_path", held_out)):
        for example in examples:
            check_score(example, cfg.judge.max_score, f"data.{key}")
    _check_held_out(cfg, chat, spec, held_out, num_begun=len(begun.token_ids))
    if ift:
        _check_seed(cfg, chat, spec, ift, eft)


_ROLES: Mapping[str, Role] = {"prompts.model": "prompts", "pairs.anchor": "candidates"}
"""What the models of some settings do. Those of the others judge."""


def check_models(cfg: Config, directories: Mapping[str, Path]) -> None:
    """`check_model` for models that are only asked, by the settings that name them."""
    for key, directory in directories.items():
        with _naming(key, directory):
            role = _ROLES.get(key, "judge")
            check_engine(cfg, role, directory)
            chat = check_model(cfg, directory)
            if role == "judge":
                judging.beginning(judging.reader(cfg.judge), cfg.judge, chat)


def check_engine(cfg: Config, role: Role, model_dir: Path) -> None:
    """What the engine of a role says of this model. Raises `ConfigError` with the name of the engine's section."""
    engine = cfg.engine_for(role)
    with key_of("engine" if engine is cfg.engine else f"{role}.engine"):
        engine_backend(engine).check(engine, model_dir)


def check_model(cfg: Config, model_dir: Path) -> ChatTemplate:
    """The model's chat template, after its weights, tokens and ends were checked.

    Raises `ModelError` or `ConfigError`.
    """
    from nemo_srl.models.convert import check_weights

    spec = hf.read_spec(model_dir)
    check_weights(model_dir, spec)
    chat = ChatTemplate(
        model_dir, chat_template=cfg.model.chat_template, thinking_tags=cfg.model.thinking_tags,
        variables=cfg.model.chat_template_kwargs,
    )  # fmt: skip
    if chat.max_token_id >= spec.vocab_size:
        raise ModelError(
            f"{model_dir}: the tokenizer has ids up to {chat.max_token_id}, and config.json has vocab_size="
            f"{spec.vocab_size}. A text with such a token would end the run. If tokens were added to the tokenizer: "
            "model.resize_token_embeddings(len(tokenizer)), and save the model again."
        )
    if closing := chat.closing_token:
        hf.check_end(model_dir, spec, closing[1], f"({closing[0]!r} after a response) in the chat template")
    return chat


def check_prompts(cfg: Config, prompts: Mapping[str, Sequence[Prompt]], *, num_eft: int = 0) -> None:
    """Refuse prompts that cannot make enough pairs for one step of DPO.

    `prompts` are those of each file of `prompts.path`, and `num_eft` is the number of EFT examples. Raises
    `ConfigError` or `DataError`.
    """
    if not cfg.num_iterations or not trainer_backend(cfg.trainer).whole_batches:
        return
    key, size = "dpo.global_batch_size", cfg.dpo.global_batch_size
    most = combinations.most_pairs(cfg)
    number = "one pair" if most == 1 else f"{most} pairs"
    why = f"and one step of DPO needs {key}={size} pairs. A prompt gives {number} at most"

    def are_too_few(number: int) -> bool:
        # Verdicts make two pairs more for a prompt at most, and one for an EFT example.
        verdicts = 2 * min(number, cfg.verdict_pairs.num_prompts) + min(cfg.verdict_pairs.num_seed, num_eft)
        return most * number + verdicts < size

    for path, found in prompts.items():
        if are_too_few(len(found)):
            raise DataError(f"prompts.path={path!r}: it has {len(found)} prompts, {why}. Add some, or lower {key}.")
    if not cfg.prompts.path and are_too_few(cfg.prompts.num_prompts):
        raise ConfigError(
            f"prompts.num_prompts={cfg.prompts.num_prompts}: so many prompts are made, {why}. Raise it, or lower {key}."
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


@contextmanager
def _naming(key: str, directory: Path) -> Iterator[None]:
    """Errors begin with the setting that names the model."""
    try:
        yield
    except (ConfigError, ModelError) as e:
        is_template = str(e).startswith("model.chat_template=")
        if is_template and key == "model.path":
            raise
        more = " All models of a run have this template." if is_template else ""
        raise type(e)(f"{key}={str(directory)!r}: {e}{more}") from e


def _check_held_out(
    cfg: Config, chat: ChatTemplate, spec: ModelSpec, held_out: Sequence[EFTExample], *, num_begun: int
) -> None:
    """`num_begun` tokens follow a prompt of the judge, because its verdict is begun for it."""
    reader = judging.reader(cfg.judge)
    for x in held_out:
        question = reader.lesson(x, cfg.judge)[0]
        prompts = [("candidates", cfg.candidates, x.instruction, 0), ("judge", cfg.judge, question, num_begun)]
        for section, sampling, text, more in prompts:
            num_tokens, max_tokens = chat.num_tokens(chat.render(text)) + more, sampling.max_tokens
            if num_tokens + max_tokens > spec.max_position_embeddings:
                raise DataError(
                    f"data.eft_eval_path: {x.key!r} has {num_tokens} tokens as a prompt, and {section}.max_tokens="
                    f"{max_tokens} more may follow, but the model's context is {spec.max_position_embeddings} tokens. "
                    f"Shorten or remove the example, or lower {section}.max_tokens."
                )


def _check_seed(
    cfg: Config, chat: ChatTemplate, spec: ModelSpec, ift: Sequence[IFTExample], eft: Sequence[EFTExample]
) -> None:
    """Count the rows that SFT will leave out, and refuse a seed that does not fill one batch without them."""
    lesson = judging.reader(cfg.judge).lesson
    rows = {"data.ift_path": [(x.instruction, x.response) for x in ift]}
    rows |= {"data.eft_path": [lesson(x, cfg.judge) for x in eft]}
    limit, num_fitting, too_long = cfg.sft.max_seq_length, 0, list[int]()
    for key, texts in rows.items():
        longer = [n for n in (chat.num_trained_tokens(*text, at_most=limit) for text in texts) if n > limit]
        num_fitting += len(texts) - len(longer)
        too_long += longer
        if longer:
            log.warning(
                "%s: %d of %d rows are longer than sft.max_seq_length=%d tokens. They are left out.",
                key, len(longer), len(texts), limit,
            )  # fmt: skip
    if trainer_backend(cfg.trainer).whole_batches and num_fitting < cfg.sft.global_batch_size:
        raise _too_few_rows(cfg, spec, num_fitting, too_long)


def _too_few_rows(cfg: Config, spec: ModelSpec, num_fitting: int, too_long: Sequence[int]) -> ConfigError:
    sft, context = cfg.sft, spec.max_position_embeddings
    wanted = sorted(too_long)[: sft.global_batch_size - num_fitting]
    remedies = ["give more or shorter rows"]
    if num_fitting + len(wanted) == sft.global_batch_size and wanted[-1] <= context:
        remedies.insert(0, f"set sft.max_seq_length to {wanted[-1]} or more")
    sizes = [n for n in range(1, num_fitting + 1) if _is_accepted(cfg, replace(sft, global_batch_size=n), spec)]
    if sizes:
        remedies.append(f"set sft.global_batch_size to {sizes[-1]}")
    return ConfigError(
        f"sft.global_batch_size={sft.global_batch_size}: one step needs so many rows. Of data.ift_path and "
        f"data.eft_path, {num_fitting} rows have at most sft.max_seq_length={sft.max_seq_length} tokens, and "
        f"{len(too_long)} are longer. Do one of these: {', or '.join(remedies)}."
    )


def _is_accepted(cfg: Config, training: OptimConfig, spec: ModelSpec) -> bool:
    """Whether the trainer takes the settings of this training."""
    try:
        trainer_backend(cfg.trainer).check(cfg.trainer, [training], spec)
    except ConfigError:
        return False
    return True
