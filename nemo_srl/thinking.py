"""What a model thinks before it answers, and what of its text is the answer.

Thinking models write their thoughts between two tags, such as `<think>` and `</think>`, and answer after them. Some
chat templates open the thinking themselves, so that the generated text has the end tag alone. The thoughts are kept in
the journal and beside the answer. They are not judged, not trained on and not measured.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

NAMES = ("think", "thinking", "thought", "reasoning", "scratchpad")
"""Names of tags that models use, as in `<think>`."""
KNOWN: tuple[tuple[str, str], ...] = (
    *((f"<{name}>", f"</{name}>") for name in NAMES),
    ("[THINK]", "[/THINK]"),  # Magistral
    ("<seed:think>", "</seed:think>"),  # Seed-OSS
    ("<|START_THINKING|>", "<|END_THINKING|>"),  # Command A Reasoning
    ("\u25c1think\u25b7", "\u25c1/think\u25b7"),  # Kimi-VL
)


def answer_of(text: str, tags: Sequence[str]) -> str:
    """What follows the last end of thinking in `text`. Empty if thinking begins again after it, or never ends.

    `tags` are the two tags, or nothing. If the prompt has opened the thinking, put the first tag before the text.
    """
    if not tags:
        return text
    begin, end = tags
    answer = text.rpartition(end)[2]
    return "" if begin in answer else answer


def tags_of(template: str, added_tokens: Collection[str]) -> tuple[str, ...]:
    """The two tags of the model with this chat template and these added tokens. Empty if it has none."""
    for begin, end in KNOWN:
        if end in template or {begin, end} <= set(added_tokens):
            return begin, end
    return ()


def find_tags(tokenizer: Any, setting: Sequence[str] | None) -> tuple[str, ...]:
    """The tags that `model.thinking_tags` names, or those of the tokenizer and its chat template for None."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    return tags_of(str(tokenizer.chat_template), added) if setting is None else tuple(setting)


def dropped_by_engines(tokenizer: Any, tags: Sequence[str]) -> list[str]:
    """The tags that are special tokens. Engines leave special tokens out of texts, so thoughts would have no end."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return [tag for tag in tags if tag in special]
