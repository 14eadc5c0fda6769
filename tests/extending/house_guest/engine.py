"""An engine that answers by a rule, without a model: it says some of its words, in an order that the seed decides."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_srl.config.check import check
from nemo_srl.engines import EngineBackend
from nemo_srl.engines.checks import length_check, plan_samples
from nemo_srl.models import hf
from nemo_srl.protocols import GenerationEngine, GenerationRequest, SamplingParams
from nemo_srl.records import Completion


@dataclass(kw_only=True)
class PhrasebookSettings:
    name: str = "house_guest.engine"
    words: str
    """What it can say, separated by blanks. It must be given."""
    batch_size: int = 8
    """Requests that are answered together. Placement: it does not change the answers."""

    def __post_init__(self) -> None:
        check(len(self.words.split()) >= 3, "engine.words", self.words, "must hold at least 3 words")
        check(self.batch_size >= 1, "engine.batch_size", self.batch_size, "must be at least 1")


class PhrasebookEngine:
    def __init__(self, settings: PhrasebookSettings, model_dir: Path) -> None:
        self._words = settings.words.split()
        self._batch_size = settings.batch_size
        self._check = length_check(hf.read_spec(model_dir).max_position_embeddings)

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, *, completed: Collection[str] = ()
    ) -> Iterator[tuple[Completion, ...]]:
        plan = plan_samples(requests, params, completed, check=self._check)
        yield from plan.unanswered
        asked = [r for r in plan.requests if r.key in plan.missing]
        for i in range(0, len(asked), self._batch_size):
            batch = asked[i : i + self._batch_size]
            yield tuple(self._answer(r, index) for r in batch for index in plan.missing[r.key])

    def close(self) -> None:
        pass  # it holds nothing

    def _answer(self, request: GenerationRequest, index: int) -> Completion:
        """The same sample always gives the same text: the seed, the key and the index decide it, and nothing else."""
        seed = hashlib.sha256(f"{request.seed}/{request.key}/{index}".encode()).digest()
        rng = random.Random(seed)
        said = rng.sample(self._words, 3)
        # Only a judge's rubric asks for a grade.
        text = " ".join(said) + (f"\nGrade: {rng.choice('FEDCBA')}\n" if "Grade:" in request.text else "")
        return Completion(
            request_key=request.key, index=index, text=text, num_tokens=len(text.split()), finish_reason="stop"
        )


def _open(settings: PhrasebookSettings, model_dir: Path) -> GenerationEngine:
    return PhrasebookEngine(settings, model_dir)


BACKEND = EngineBackend(settings=PhrasebookSettings, decisive=("words",), open=_open)
