"""Rows for training and for measuring: which samples become examples.

The held-out examples are chosen so that surface says little about their scores. A judge that looks at the surface only
(length, marks at the end, repeated words) can see that an answer was cut off or looped. If such answers had lower
scores than others, this would be enough to judge fairly well. So samples are chosen by form: clean, cut and looped
answers have similar mean scores (`SHARES`). A clean answer with a low score is on another topic or breaks constraints,
and only who reads the instruction can know. Answers that lose points by a constraint are mostly good answers to the
same task under other constraints. Some good answers have an opening or a closing that nobody asked for, so these words
say nothing either.

The training examples are chosen so that a small model learns from them in minutes (`LESSONS`). Each instruction has a
perfect answer and others that are much worse. With the shares of the held-out set, which has mild faults only, a model
of 135M parameters had learned nothing after 560 examples.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence

from nemo_srl.data.checked import damage
from nemo_srl.data.checked.damage import LOST, Sample, sample
from nemo_srl.data.checked.instructions import CLOSINGS, OPENINGS, QUESTIONS
from nemo_srl.data.checked.truth import MAX_SCORE, CheckedInstruction, true_score
from nemo_srl.data.damage import cut, in_reverse, looped, stuck
from nemo_srl.records import EFTExample

_NONE: frozenset[str] = frozenset()

SHARES: Mapping[tuple[str, int], float] = {
    ("clean", 5): 0.20, ("clean", 4): 0.10, ("clean", 3): 0.12, ("clean", 2): 0.20,
    ("cut", 4): 0.11, ("cut", 3): 0.05, ("cut", 2): 0.01, ("cut", 1): 0.02,
    ("looped", 4): 0.11, ("looped", 3): 0.04, ("looped", 2): 0.01, ("looped", 1): 0.02, ("looped", 0): 0.01,
}  # fmt: skip
"""The share of held-out examples by form and score."""

LESSONS: Mapping[str, float] = {
    "swapped": 3.0, "swapped+worse": 1.0, "asked": 1.2, "reversed": 1.2, "stuck": 1.0, "cut_early": 0.4, "cut": 4.0,
    "looped": 2.0, "mismatched": 3.0,
}  # fmt: skip
"""How often a kind of damage is trained, beside the others."""
_SHARE_OF_MODELS = 0.8
"""The share of training instructions with a model's own answer, where there is one."""
_EARLY = (0.15, 0.5)

_NUM_OTHERS = 12
_TRIES = 12
_WEIGHTS = {"model": 3}


def samples(
    x: CheckedInstruction, same_task: Sequence[str], others: Sequence[str], own: Sequence[Sample], rng: random.Random
) -> Iterator[Sample]:
    """Samples of an instruction: its good answer and those of models (`own`), as they are and damaged. `same_task` are
    answers to the task under other constraints, and `others` are answers to other tasks."""
    yield from (s for s in own if not s.true.complete)
    for kind, text, lost in [
        *_whole(x, same_task, others, rng),
        *((s.kind, s.text, _NONE) for s in own if s.true.complete),
    ]:
        if not (found := sample(x, kind, text, lost)):
            continue
        yield found
        for name, change in (("cut", cut), ("looped", looped)):
            if (changed := change(text, rng)) and (found := sample(x, _joined(kind, name), changed, lost | LOST[name])):
                yield found


def _whole(
    x: CheckedInstruction, same_task: Sequence[str], others: Sequence[str], rng: random.Random
) -> Iterator[tuple[str, str, frozenset[str]]]:
    """Whole texts: kind, text, and the points that it lost."""
    yield "intact", x.response, _NONE
    for text in _padded(x, rng):
        yield "intact", text, _NONE
    for text in same_task:
        yield "mismatched", text, _NONE
    for constraint in dict.fromkeys(x.checks):
        if (bad := damage.broken(x, x.response, constraint, rng)) is not None:
            name = "dropped" if constraint.kind == "items" else "broken"
            yield name, bad, damage.lost_by_breaking(x, constraint)
    for text in rng.sample(list(others), min(_NUM_OTHERS, len(others))):
        yield "swapped", text, LOST["swapped"]


def lesson(
    x: CheckedInstruction, found: Sequence[Sample], others: Sequence[str], number: int, rng: random.Random
) -> list[Sample]:
    """`number` samples to train the judge on `x`: a perfect answer, mostly a model's own, and damaged ones of different
    kinds. `found` are the `samples` of the instruction, and `others` are instructions of other tasks."""
    perfect = [s for s in found if s.true.score == MAX_SCORE]
    chosen = [rng.choice(perfect)]
    own = [s for s in found if s.kind == "model" and s.text != chosen[0].text]
    if own and rng.random() < _SHARE_OF_MODELS:
        chosen.append(rng.choice(own))
    left = dict(LESSONS)
    while left and len(chosen) < number:
        name = rng.choices(list(left), list(left.values()))[0]
        del left[name]
        bad = _damaged(x, name, found, others, rng)
        if bad and all(bad.text != s.text for s in chosen):
            chosen.append(bad)
    return chosen


def _damaged(
    x: CheckedInstruction, name: str, found: Sequence[Sample], others: Sequence[str], rng: random.Random
) -> Sample | None:
    """A sample with this damage, one of the keys of `LESSONS`. None if it cannot be made."""
    if name in ("cut", "looped"):
        return _mild(x, name, rng)
    if name in ("swapped", "mismatched"):
        same = {"broken", "dropped", "mismatched"} if name == "mismatched" else {name}
        fitting = [s for s in found if s.kind in same]
        return rng.choice(fitting) if fitting else None
    if name == "swapped+worse":
        swapped = [s.text for s in found if s.kind == "swapped"]
        if not swapped:
            return None
        return _worse(x, rng.choice(swapped), rng, kind="swapped+", lost=LOST["swapped"])
    texts = {"asked": lambda: rng.choice(others), "reversed": lambda: in_reverse(x.response)}
    if name in texts:
        return sample(x, name, texts[name](), LOST[name])
    return _worse(x, x.response, rng, names=(name,))


def _mild(x: CheckedInstruction, name: str, rng: random.Random) -> Sample | None:
    """The good answer, cut or looped so that it loses nothing but its own point.

    Most cuts break a constraint as well, and have 2 or 3. If training had many of these, the judge would give 2 to
    every cut. `cut_early` and `stuck` show them.
    """
    change = {"cut": cut, "looped": looped}[name]
    tried = (change(x.response, rng) for _ in range(_TRIES))
    found = (sample(x, name, text, LOST[name]) for text in tried if text)
    return next((s for s in found if s and s.true.score == MAX_SCORE - 1), None)


def _worse(
    x: CheckedInstruction, text: str, rng: random.Random, *, kind: str = "", lost: frozenset[str] = _NONE,
    names: tuple[str, ...] = ("cut_early", "stuck"),
) -> Sample | None:  # fmt: skip
    """The text cut early or stuck."""
    name = rng.choice(names)
    changed = stuck(text, rng) if name == "stuck" else cut(text, rng, kept=_EARLY)
    return sample(x, kind + name, changed, lost | LOST[name.removesuffix("_early")]) if changed else None


def unseen_samples(x: CheckedInstruction, rng: random.Random) -> Iterator[Sample]:
    """Samples with the damages that are never trained."""
    for kind, text in (("shuffled", damage.shuffled(x.response, rng)), ("echoed", x.instruction)):
        if found := sample(x, kind, text, LOST[kind]):
            yield found


def examples(x: CheckedInstruction, chosen: Sequence[Sample]) -> list[EFTExample]:
    """The samples as examples without a reason; the category tells the kind."""
    return [
        EFTExample(
            example_id=f"{x.key}-{i}", instruction=x.instruction, response=s.text, justification="",
            score=s.true.score, category=s.kind,
        )
        for i, s in enumerate(chosen)
    ]  # fmt: skip


class Chooser:
    """Chooses samples so that their forms and scores come near `shares`."""

    def __init__(self, shares: Mapping[tuple[str, int], float], rng: random.Random) -> None:
        self._shares = shares
        self._rng = rng
        self._cells: Counter[tuple[str, int]] = Counter()
        self._kinds: Counter[tuple[tuple[str, int], str]] = Counter()

    def choose(self, found: Sequence[Sample], number: int, *, first: Sequence[Sample] = ()) -> list[Sample]:
        """`number` samples with different scores: those of `first`, and then from the cells that lack most. Fewer if
        there are not so many. Among the samples of a cell, one of the kinds that were chosen least for it; models'
        answers are chosen three times as often as others, so that the judge sees many of those that it will judge."""
        cells: dict[tuple[str, int], list[Sample]] = defaultdict(list)
        chosen = list(first)
        for s in first:
            self._cells[s.form, s.true.score] += 1
            self._kinds[(s.form, s.true.score), s.kind] += 1
        for s in found:
            if (s.form, s.true.score) in self._shares and s.true.score not in [f.true.score for f in first]:
                cells[s.form, s.true.score].append(s)
        while cells and len(chosen) < number:
            cell = min(sorted(cells), key=lambda c: (self._cells[c] + self._rng.random()) / self._shares[c])
            used = {s.kind: self._kinds[cell, s.kind] / _WEIGHTS.get(s.kind, 1) for s in cells[cell]}
            kind = min(sorted(used), key=used.__getitem__)
            chosen.append(self._rng.choice([s for s in cells[cell] if s.kind == kind]))
            self._cells[cell] += 1
            self._kinds[cell, kind] += 1
            for other in [c for c in cells if c[1] == cell[1]]:
                del cells[other]
        return chosen


def _padded(x: CheckedInstruction, rng: random.Random) -> Iterator[str]:
    """The good answer with an opening or a closing that breaks nothing."""
    gap = "\n" if "\n" in x.response else " "
    opening, closing = rng.choice(OPENINGS), rng.choice(CLOSINGS)
    padded = (f"{opening}{gap}{x.response}", f"{x.response}{gap}{closing}")
    has = (x.response.startswith(OPENINGS), x.response.endswith((*CLOSINGS, *QUESTIONS)))
    for text, already in zip(padded, has, strict=True):
        if not already and true_score(x, text).score == MAX_SCORE:
            yield text


def _joined(kind: str, name: str) -> str:
    return name if kind == "intact" else f"{kind}+{name}"
