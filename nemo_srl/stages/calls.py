"""Model calls of a stage: made through an engine, journalled as they complete, resumed where they were."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from tqdm import tqdm

from nemo_srl.artifacts import Journal
from nemo_srl.config import SamplingConfig
from nemo_srl.engines import open_engine
from nemo_srl.errors import EngineError
from nemo_srl.protocols import GenerationEngine, GenerationRequest, SamplingParams
from nemo_srl.records import Completion
from nemo_srl.stages import Context


class Caller:
    """Asks one model, and remembers every answer in the stage's journal."""

    def __init__(self, engine: GenerationEngine, journal: Journal) -> None:
        self._engine = engine
        self._journal = journal

    def complete(
        self, requests: Sequence[GenerationRequest], sampling: SamplingConfig, *, title: str
    ) -> dict[str, list[Completion]]:
        """All completions, by request key in the order of `requests`, samples by index.

        What an interrupted run already journalled is not asked again.
        """
        wanted = {f"{r.key}/{i:02d}" for r in requests for i in range(r.n)}
        done = wanted & self._journal.completions.keys()
        params = SamplingParams(temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_tokens)
        with tqdm(total=len(wanted), initial=len(done), desc=title, unit="call", file=sys.stderr) as bar:
            for completions in self._engine.generate(requests, params, completed=done):
                self._journal.append(completions)
                bar.update(len(completions))
        if missing := sorted(wanted - self._journal.completions.keys()):
            raise EngineError(
                f"{title}: the engine ended without answering {len(missing)} of {len(wanted)} calls, the first "
                f"is {missing[0]!r}; what it did answer is kept, run again to go on"
            )
        found = self._journal.completions
        return {r.key: [found[f"{r.key}/{i:02d}"] for i in range(r.n)] for r in requests}


@contextmanager
def open_caller(ctx: Context) -> Iterator[Caller]:
    """A `Caller` on the stage's `policy`, with the stage's journal."""
    journal = Journal(ctx.output.path)
    try:
        engine = open_engine(ctx.cfg.engine, ctx.inputs["policy"].model_dir)
        try:
            yield Caller(engine, journal)
        finally:
            engine.close()
    finally:
        journal.close()
