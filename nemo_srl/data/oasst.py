"""Open Assistant's published conversation trees (OASST1, OASST2) as seed data, as in section 3.1.1 of the paper.

A file has one tree a line (`*_oasst_ready.trees.jsonl.gz`), in the schema of the project's
`oasst-data/oasst_data/schemas.py`:

    {"message_tree_id": ..., "tree_state": "ready_for_export", "prompt": {"message_id": ..., "parent_id": null,
     "text": ..., "role": "prompter", "lang": "en", "review_result": true, "deleted": false, "rank": null,
     "synthetic": false, "labels": {"quality": {"value": 0.75, "count": 3}, ...}, "replies": [{... "role": "assistant",
     "rank": 0, "replies": [...]}, ...]}}

Only first turns are used: the prompt, and the assistant's answers to it. A file is read tree by tree. A damaged file
and a file of another kind (messages, threads) are refused with `DataError`. A tree that does not fit the schema, and
every tree or answer that a filter drops, is left out and counted.

Not covered: later turns, and the flat message tables of the Hugging Face Hub.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_srl.errors import DataError
from nemo_srl.records import EFTExample, IFTExample, RankedAnswers
from nemo_srl.rows import read_rows
from nemo_srl.words import normalised

PAPER_COUNTS = {"ift": 3200, "eft_train": 1630, "eft_eval": 541}
"""Numbers of examples in the paper. Its EFT examples are counted after the filter (here `stages/eft.py`)."""

_MAX_SCORE = 5


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An assistant's answer to the first prompt. `rank` 0 is the answer that people like best; None: not ranked."""

    text: str
    rank: int | None
    quality: float
    """Mean of people's labels of quality, 0 to 1; 0 where nobody gave one."""


@dataclass(frozen=True, kw_only=True)
class Tree:
    """The first turn of a conversation tree, with its usable answers."""

    tree_id: str
    prompt: str
    answers: Sequence[Answer]

    @property
    def ranked(self) -> list[Answer]:
        """The answers that people ranked, best first."""
        return sorted((a for a in self.answers if a.rank is not None), key=lambda a: a.rank or 0)


@dataclass(frozen=True, kw_only=True)
class SeedData:
    """The records of the three files to write, which share no prompt. `counts` has the numbers of every step."""

    ift: list[IFTExample]
    rankings: list[RankedAnswers]
    eft_eval: list[EFTExample]
    counts: dict[str, int]


def read_trees(path: Path, counts: Counter[str], *, language: str = "en", max_characters: int = 8000) -> Iterator[Tree]:
    """The usable first turns of a file. `counts` gets a reason for each tree and each answer that is left out."""
    for where, row in read_rows(path, what="Open Assistant's trees, e.g. *_oasst_ready.trees.jsonl.gz"):
        counts["trees in the file"] += 1
        if "message_tree_id" not in row:
            raise DataError(
                f"{where}: not a conversation tree (no message_tree_id). Give a file of trees, whose name ends in "
                ".trees.jsonl.gz; a file of messages does not say which answers belong together."
            )
        answers: list[Answer] = []
        try:
            reason = _prompt_fault(row, language=language, max_characters=max_characters)
            for reply in [] if reason else row["prompt"].get("replies") or []:
                if fault := _message_fault(reply, "assistant", language=language, max_characters=max_characters):
                    counts[f"answers left out: {fault}"] += 1
                else:
                    answers.append(_answer(reply))
        except (KeyError, TypeError, AttributeError, ValueError):
            reason = "malformed"
        if reason or not answers:
            counts[f"trees left out: {reason or 'no usable answer'}"] += 1
        else:
            yield Tree(tree_id=row["message_tree_id"], prompt=row["prompt"]["text"].strip(), answers=answers)


def _prompt_fault(row: dict[str, Any], *, language: str, max_characters: int) -> str | None:
    """The reason to leave out a whole tree; None when its prompt is usable."""
    if row["prompt"]["role"] != "prompter" or row["prompt"]["message_id"] != row["message_tree_id"]:
        return "malformed"
    if row.get("tree_state", "ready_for_export") != "ready_for_export":
        return "not ready for export"
    return _message_fault(row["prompt"], "prompter", language=language, max_characters=max_characters)


def _message_fault(message: dict[str, Any], role: str, *, language: str, max_characters: int) -> str | None:
    """The first reason to leave out a message; None when it is usable."""
    text = message["text"]
    if not isinstance(text, str) or not isinstance(message["role"], str):
        return "malformed"
    reasons = {
        "deleted": message.get("deleted"),
        "rejected in review": message.get("review_result") is False,  # as spam is; null: nobody reviewed it
        "written by a model": message.get("synthetic"),
        "another language": message.get("lang") != language,
        "empty": not text.strip(),
        "too long": len(text) > max_characters,
        "malformed": message["role"] != role,
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def _answer(reply: dict[str, Any]) -> Answer:
    rank, label = reply.get("rank"), (reply.get("labels") or {}).get("quality") or {}
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 0):
        raise ValueError(f"rank {rank!r}")
    return Answer(text=reply["text"].strip(), rank=rank, quality=float(label.get("value") or 0.0))


def build(
    trees: Iterable[Tree], counts: Counter[str], *, num_ift: int, num_eft: int, num_eft_eval: int, seed: int
) -> SeedData:
    """Split the trees by prompt.

    `num_eft` + `num_eft_eval` prompts are drawn at random from those with several ranked answers. IFT examples are the
    `num_ift` of all other prompts whose favourite answer has the best quality. A file with too few trees gives fewer;
    `counts` has the numbers.
    """
    distinct = list(_distinct(trees, counts))
    several = [t for t in distinct if len({a.rank for a in t.ranked}) > 1]
    counts["prompts with several ranked answers"] = len(several)
    drawn = random.Random(f"oasst/{seed}").sample(several, min(num_eft + num_eft_eval, len(several)))
    # When the file has too few, the two sets share them in the proportion of their sizes.
    num_held_out = round(len(drawn) * num_eft_eval / max(1, num_eft + num_eft_eval))
    taken = {t.tree_id for t in drawn}
    favourites = [(t, t.ranked[0]) for t in distinct if t.tree_id not in taken and t.ranked and t.ranked[0].rank == 0]
    counts["prompts with a favourite answer, not taken for EFT"] = len(favourites)
    favourites.sort(key=lambda x: (-x[1].quality, x[0].tree_id))
    ift = [
        IFTExample(example_id=t.tree_id, instruction=t.prompt, response=best.text, category="oasst")
        for t, best in favourites[:num_ift]
    ]
    held_out, train = drawn[:num_held_out], drawn[num_held_out:]
    eft_eval = [x for t in held_out for x in _ranked_examples(t)]
    rankings = [_rankings(t) for t in train]
    counts["ift examples"] = len(ift)
    counts["rankings for the EFT filter"] = len(rankings)
    counts["answers in them"] = sum(len(r.responses) for r in rankings)
    counts["eft_eval prompts"] = len(held_out)
    counts["eft_eval examples"] = len(eft_eval)
    return SeedData(ift=ift, rankings=rankings, eft_eval=eft_eval, counts=dict(counts))


def _distinct(trees: Iterable[Tree], counts: Counter[str]) -> Iterator[Tree]:
    """The first tree of each prompt, with the best-ranked answer of each text."""
    seen: set[str] = set()
    for t in trees:
        key = normalised(t.prompt)
        if key in seen:
            counts["trees left out: prompt seen before"] += 1
            continue
        seen.add(key)
        answers = {a.text: a for a in sorted(t.answers, key=lambda a: (a.rank is None, a.rank or 0), reverse=True)}
        yield Tree(tree_id=t.tree_id, prompt=t.prompt, answers=list(answers.values()))


def _rankings(t: Tree) -> RankedAnswers:
    texts, ranks = [a.text for a in t.ranked], [a.rank or 0 for a in t.ranked]
    return RankedAnswers(example_id=t.tree_id, instruction=t.prompt, responses=texts, ranks=ranks)


def _ranked_examples(t: Tree) -> list[EFTExample]:
    """Held-out examples whose scores give people's order, from 5 points downwards. Only the order has a meaning."""
    levels = sorted({a.rank or 0 for a in t.ranked})
    return [
        EFTExample(
            example_id=f"{t.tree_id}-{i}",
            instruction=t.prompt,
            response=a.text,
            justification="",
            score=max(0, _MAX_SCORE - levels.index(a.rank or 0)),
            category="oasst",
        )
        for i, a in enumerate(t.ranked)
    ]
