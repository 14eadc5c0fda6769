"""An engine of a user's own: it answers with the text of the prompt and a suffix."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from nemo_srl.engines import EngineBackend
from nemo_srl.protocols import GenerationRequest, SamplingParams
from nemo_srl.records import Completion


@dataclass
class EchoSettings:
    name: str = "tests.user_engine"
    suffix: str = "!"


class EchoEngine:
    def __init__(self, settings: EchoSettings, model_dir: Path) -> None:
        self._suffix = settings.suffix

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, *, completed: Collection[str] = ()
    ) -> Iterator[tuple[Completion, ...]]:
        for r in requests:
            samples = [
                Completion(
                    request_key=r.key, index=i, text=f"{r.text}{self._suffix}{i}", num_tokens=1, finish_reason="stop"
                )
                for i in range(r.n)
            ]
            yield tuple(c for c in samples if c.key not in completed)

    def close(self) -> None:
        pass


BACKEND = EngineBackend(settings=EchoSettings, decisive=("suffix",), open=EchoEngine)
