"""Model calls of a stage: made through engines, journalled as they complete, resumed where they were."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from nemo_srl.artifacts import Journal
from nemo_srl.chat import ChatTemplate
from nemo_srl.config import Config, EngineConfig, Role
from nemo_srl.engines import open_engine
from nemo_srl.errors import EngineError
from nemo_srl.protocols import GenerationEngine, GenerationRequest, SamplingParams
from nemo_srl.records import Completion
from nemo_srl.stages import Context

NUM_LOGPROBS = 20
"""Alternatives reported at a number: as many as servers commonly give."""


def verdict_request(
    key: str, prompt: str, *, stop: tuple[str, ...], chat: ChatTemplate, cfg: Config
) -> GenerationRequest:
    """One request for all K verdicts on what `prompt` shows the judge; `stop` holds the lines that end a verdict."""
    return GenerationRequest(
        key=key,
        prompt_token_ids=chat.encode(chat.render(prompt)),
        text=prompt,
        n=cfg.judge.num_judgements,
        seed=cfg.seed,
        stop=stop if cfg.judge.stop_at_score else (),
    )


class Caller:
    """Asks models, and remembers every answer in the stage's journal.

    Each role has its sampling settings and its engine in the configuration; an engine is opened when it is first
    needed, and once for all roles that share it.
    """

    def __init__(self, cfg: Config, model_dir: Path, journal: Journal) -> None:
        self._cfg = cfg
        self._model_dir = model_dir
        self._journal = journal
        self._engines: list[tuple[EngineConfig, GenerationEngine]] = []

    def complete(self, requests: Sequence[GenerationRequest], role: Role, *, title: str) -> dict[str, list[Completion]]:
        """All completions, by request key in the order of `requests`, samples by index.

        What an interrupted run already journalled is not asked again.
        """
        wanted = {f"{r.key}/{i:02d}" for r in requests for i in range(r.n)}
        done = wanted & self._journal.completions.keys()
        with tqdm(total=len(wanted), initial=len(done), desc=title, unit="call", file=sys.stderr) as bar:
            if wanted - done:
                params = self._params(role)
                for completions in self._engine(role).generate(requests, params, completed=done):
                    self._journal.append(completions)
                    bar.update(len(completions))
        if missing := sorted(wanted - self._journal.completions.keys()):
            raise EngineError(
                f"{title}: the engine ended without answering {len(missing)} of {len(wanted)} calls, the first "
                f"is {missing[0]!r}; what it did answer is kept, run again to go on"
            )
        found = self._journal.completions
        return {r.key: [found[f"{r.key}/{i:02d}"] for i in range(r.n)] for r in requests}

    def close(self) -> None:
        for _, engine in self._engines:
            engine.close()

    def _params(self, role: Role) -> SamplingParams:
        sampling = getattr(self._cfg, role)
        expected = role == "judge" and self._cfg.judge.mode == "expected"
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_tokens,
            num_logprobs=NUM_LOGPROBS if expected else 0,
        )

    def _engine(self, role: Role) -> GenerationEngine:
        wanted = self._cfg.engine_for(role)
        for cfg, engine in self._engines:
            if cfg == wanted:
                return engine
        engine = open_engine(wanted, self._model_dir)
        self._engines.append((wanted, engine))
        return engine


@contextmanager
def open_caller(ctx: Context) -> Iterator[Caller]:
    """A `Caller` on the stage's `policy`, with the stage's journal."""
    journal = Journal(ctx.output.path)
    try:
        caller = Caller(ctx.cfg, ctx.inputs["policy"].model_dir, journal)
        try:
            yield caller
        finally:
            caller.close()
    finally:
        journal.close()
