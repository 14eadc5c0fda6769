"""What the surface of an answer says of its score: the baseline that a judge must beat.

A ridge regression from thirteen features of an answer (`features`) to its score is fitted on the examples that the
judge is trained on. It never sees the instruction. So its pairwise accuracy on held-out examples is what a judge
reaches that has only learned how good answers look. Read a judge's accuracy beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from nemo_srl.judging.agreement import ScoreGroup, reward_model_metrics
from nemo_srl.judging.intervals import Estimate
from nemo_srl.records import EFTExample
from nemo_srl.words import words

_Floats = npt.NDArray[np.float64]

_RIDGE = 3.0  # the penalty on the weights of standardised features


def features(answer: str) -> list[float]:
    """Thirteen numbers: words, characters, the logarithm of the words; the shares of distinct words and of digits;
    colons, line breaks, hyphens, commas, full stops; mean length of words; whether it ends with a mark of a sentence,
    and whether it begins with a capital letter."""
    found = words(answer)
    number = max(1, len(found))
    return [
        len(found), len(answer), math.log(number), len(set(found)) / number,
        sum(map(str.isdigit, answer)) / max(1, len(answer)), *(answer.count(c) for c in ":\n-,."),
        sum(map(len, found)) / number, answer[-1:] in tuple(".!?\"')"), answer[:1].isupper(),
    ]  # fmt: skip


class SurfaceBaseline:
    """The regression, fitted on `examples` (at least one)."""

    def __init__(self, examples: Sequence[EFTExample]) -> None:
        raw = _matrix(examples)
        self._mean, self._deviation = raw.mean(axis=0), raw.std(axis=0) + 1e-9
        x, y = self._standardised(raw), np.array([example.score for example in examples], dtype=np.float64)
        self._offset = y.mean()
        self._weights = np.linalg.solve(x.T @ x + _RIDGE * np.eye(x.shape[1]), x.T @ (y - self._offset))

    def scores(self, examples: Sequence[EFTExample]) -> list[float]:
        """The predicted score of each example."""
        return [float(s) for s in self._standardised(_matrix(examples)) @ self._weights + self._offset]

    def _standardised(self, raw: _Floats) -> _Floats:
        standardised: _Floats = (raw - self._mean) / self._deviation
        return standardised


def surface_accuracy(train: Sequence[EFTExample], held_out: Sequence[EFTExample], *, max_score: float) -> Estimate:
    """The baseline's pairwise accuracy on `held_out` after fitting on `train`, a tie counting one half."""
    return _accuracy(held_out, SurfaceBaseline(train).scores(held_out), max_score)


def cross_validated_accuracy(examples: Sequence[EFTExample], *, max_score: float, num_folds: int = 9) -> Estimate:
    """The same for examples that are left out in turn, those of an instruction together. So it is the most that their
    own surface tells. The examples must be of two instructions or more."""
    instructions = sorted({x.instruction for x in examples})
    num_folds = min(num_folds, len(instructions))
    fold = {text: i % num_folds for i, text in enumerate(instructions)}
    order: list[EFTExample] = []
    predicted: list[float] = []
    for k in range(num_folds):
        left_out = [x for x in examples if fold[x.instruction] == k]
        order += left_out
        predicted += SurfaceBaseline([x for x in examples if fold[x.instruction] != k]).scores(left_out)
    return _accuracy(order, predicted, max_score)


def _accuracy(examples: Sequence[EFTExample], predicted: Sequence[float], max_score: float) -> Estimate:
    by_instruction: dict[str, list[tuple[float, float]]] = {}
    for x, score in zip(examples, predicted, strict=True):
        by_instruction.setdefault(x.instruction, []).append((x.score, score))
    groups = [ScoreGroup(human=[s for s, _ in g], model=[p for _, p in g]) for g in by_instruction.values()]
    return reward_model_metrics(groups, max_score=max_score)["pairwise_accuracy_ties_half"]


def _matrix(examples: Sequence[EFTExample]) -> _Floats:
    return np.array([features(x.response) for x in examples], dtype=np.float64)
