"""Breaks up the strings of control tokens in untrusted texts: `<|im_end|>` becomes `< |im_end|>`.

A tokenizer turns such a string into the token itself, whoever wrote it, so a text could end its own turn and open
another one. With a space after the first character, it reads the same and encodes as ordinary text. All other text,
such as braces, is not changed.

Control tokens are the tokenizer's special tokens, and two kinds of added tokens that are not flagged as special, as
some models have them: those that the chat template writes or looks for, and those that look like `<|this|>`. A server
with a tokenizer of its own gets `COMMON` broken up as well. That are the markers of widespread templates.

Not covered: markers of one character, which no space can break up; words such as `user`, which texts need; and markers
that a template writes as ordinary text. They are not tokens. Only training can teach a model to tell the template's
markers from those in a user's text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_BARS = r"<\|[^\s<>|]{1,40}\|>|<\uff5c[^\s<>\uff5c]{1,40}\uff5c>"
_LOOKS_LIKE_CONTROL = re.compile(_BARS)
_MARKER = re.compile(r"[^\w\s].*[^\w\s]", re.DOTALL)
"""It begins and ends with a punctuation mark. A template has many words, and a tokenizer may have them as tokens."""

COMMON = (
    "<s>", "</s>", "<bos>", "<eos>", "<pad>", "<unk>", "[BOS]", "[EOS]",
    "[INST]", "[/INST]", "<<SYS>>", "<</SYS>>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]",
    "<start_of_turn>", "<end_of_turn>", "<start_of_image>",
    "[gMASK]", "<sop>", "<eop>", "<BOS_TOKEN>", "<EOS_TOKEN>",
)  # fmt: skip
"""Turn markers of widespread chat templates, besides all that look like `<|this|>`."""


class Markers:
    """The control strings of a tokenizer and its chat template."""

    def __init__(self, strings: Iterable[str], *, more: str = "") -> None:
        """`more` is a regular expression for further ones."""
        self.strings = frozenset(text for text in strings if len(text) > 1)
        # The longest first. An empty pattern would match everywhere; `(?!)` matches nowhere.
        known = map(re.escape, sorted(self.strings, key=lambda text: (-len(text), text)))
        self._pattern = re.compile("|".join([*known, *([more] if more else [])]) or "(?!)")

    def broken_up(self, text: str) -> str:
        """The text without control strings."""
        # Repeat until nothing matches, because a space may uncover another control string: `<|a|>` holds `|a|`.
        while self._pattern.search(text):
            text = self._pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        return text


def of(tokenizer: Any) -> Markers:
    """The markers of a Hugging Face tokenizer and its chat template."""
    return Markers(_strings(tokenizer))


def for_servers(strings: Iterable[str]) -> Markers:
    """The given strings and `COMMON`, for a server whose tokenizer is not known."""
    return Markers([*strings, *COMMON], more=_BARS)


def _strings(tokenizer: Any) -> set[str]:
    template = str(tokenizer.chat_template or "")
    found = set(tokenizer.all_special_tokens)
    for token in tokenizer.added_tokens_decoder.values():
        text = token.content
        in_template = bool(_MARKER.fullmatch(text)) and text in template
        if token.special or in_template or _LOOKS_LIKE_CONTROL.fullmatch(text):
            found.add(text)
    return found
