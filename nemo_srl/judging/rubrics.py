"""Rubrics are the judge's prompts, with slots for what is judged. `conf/judge/` and `conf/judge_mode/` hold them."""

from __future__ import annotations

import re

from nemo_srl.config.check import check

_SLOT = re.compile(r"\{(\w+)\}")

# The tags with which the rubrics fence the material that is judged.
_FENCE = re.compile(r"<(?=[ \t]{0,4}/?[ \t]{0,4}(?ai:instruction|response)\b)")


def render(rubric: str, **texts: str) -> str:
    """The judge's prompt: each `{slot}` of the rubric that is named in `texts` is filled in.

    The texts are material, not templates: braces in them stay as they are. The rubric's tags are made harmless in
    them (`</response>` becomes `&lt;/response>`), so that a response cannot leave its block.
    """
    safe = {slot: _FENCE.sub("&lt;", text) for slot, text in texts.items()}
    return _SLOT.sub(lambda slot: safe.get(slot[1], slot[0]), rubric)


def check_holds_once(rubric: str, *parts: str, key: str) -> None:
    """Raises `ConfigError`, with the setting's name `key`, unless each part stands in the rubric exactly once."""
    for part in parts:
        check(
            rubric.count(part) == 1,
            key,
            excerpt(rubric),
            f"must hold {part} once. Put it there, or choose a rubric of conf/judge/.",
        )


def excerpt(rubric: str) -> str:
    """The beginning of a rubric, as messages show it."""
    return rubric[:60] + "..."
