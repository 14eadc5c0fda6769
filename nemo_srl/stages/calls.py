"""The model calls of a stage. A journal keeps every completed call, so that a stage can continue after a stop.

A call that gets no answer is a completed call, too. `unanswered.py` counts such calls.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial

from tqdm import tqdm

from nemo_srl.artifacts import Journal
from nemo_srl.config import Role
from nemo_srl.engines import engine_backend, open_engine
from nemo_srl.errors import EngineError
from nemo_srl.judging import Judge
from nemo_srl.protocols import GenerationEngine, GenerationRequest, SamplingParams
from nemo_srl.records import Completion
from nemo_srl.stages.base import Context
from nemo_srl.stages.unanswered import UnansweredCalls
from nemo_srl.thinking import answer_of


class Caller:
    """Asks models, and keeps every answer in the stage's journal.

    Each role has its sampling settings and its engine in the configuration. An engine is opened at its first use. Roles
    with the same engine share it.
    """

    def __init__(self, ctx: Context, journal: Journal) -> None:
        self._ctx = ctx
        self._journal = journal
        self._engines: list[tuple[object, GenerationEngine]] = []
        self._unanswered: dict[Role, UnansweredCalls] = {}

    @property
    def judge(self) -> Judge:
        """The judge that the configuration describes, with the stage's model."""
        cfg = self._ctx.cfg
        return Judge(partial(self.complete, role="judge"), self._ctx.chat, cfg.judge, seed=cfg.seed)

    def complete(
        self, requests: Sequence[GenerationRequest], role: Role, *, title: str, num_logprobs: int = 0
    ) -> dict[str, list[Completion]]:
        """All completions of each request, by request key in the order of `requests`. Samples are ordered by index.
        Their texts are without the model's thoughts, which stay in the journal.

        Calls in the journal of an interrupted run are not made again. Raises `EngineError` if too many calls get no
        answer. So at least one completion of the role has an answer, if there are requests.
        """
        wanted = {f"{r.key}/{i:02d}" for r in requests for i in range(r.n)}
        done = wanted & self._journal.completions.keys()
        unanswered = self._unanswered_of(role)
        unanswered.expect(len(wanted), num_per_request=max((r.n for r in requests), default=0))
        unanswered.count(self._journal.completions[key] for key in sorted(done))
        unanswered.check(title=title, at_end=False)
        with tqdm(total=len(wanted), initial=len(done), desc=title, unit="call", file=sys.stderr) as bar:
            if wanted - done:
                sampling = getattr(self._ctx.cfg, role)
                params = SamplingParams(
                    temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.max_tokens,
                    num_logprobs=num_logprobs,
                )  # fmt: skip
                for completions in self._engine(role).generate(requests, params, completed=done):
                    self._journal.append(completions)
                    bar.update(len(completions))
                    unanswered.count(completions)
                    if unanswered.are_too_many:
                        break  # this also ends the requests under way
        unanswered.check(title=title, at_end=False)
        if missing := sorted(wanted - self._journal.completions.keys()):
            raise EngineError(
                f"{title}: the engine ended without answering {len(missing)} of {len(wanted)} calls. The first of them "
                f"is {missing[0]!r}. The other answers are kept. Run again to continue."
            )
        unanswered.check(title=title, at_end=True)
        found = self._journal.completions
        return {r.key: [self._answer(found[f"{r.key}/{i:02d}"], role) for i in range(r.n)] for r in requests}

    def _answer(self, c: Completion, role: Role) -> Completion:
        """The completion without what the model thought first."""
        chat, engine = self._ctx.chat, self._ctx.cfg.engine_for(role)
        opened = chat.opens_thinking and role != "prompts"
        if opened and engine_backend(engine).has_own_template(engine):
            # The server may have taken the thoughts away itself. A text that was cut off may be nothing but thoughts.
            opened = c.finish_reason == "length"
        answer = answer_of(chat.thinking_tags[0] + c.text if opened else c.text, chat.thinking_tags)
        begin = len(c.text) - len(answer)
        return replace(c.without_first(begin), thinking=c.text[:begin]) if begin else c

    def figures(self) -> Counter[str]:
        """The number of calls without an answer so far, by reason, for a manifest."""
        return sum((calls.figures() for calls in self._unanswered.values()), Counter())

    def close(self) -> None:
        for _, engine in self._engines:
            engine.close()

    def _unanswered_of(self, role: Role) -> UnansweredCalls:
        cfg = self._ctx.cfg
        if role not in self._unanswered:
            engine = "engine" if cfg.engine_for(role) is cfg.engine else f"{role}.engine"
            calls = UnansweredCalls(max_share=cfg.max_unanswered_share, engine=engine, journal=self._journal.path)
            self._unanswered[role] = calls
        return self._unanswered[role]

    def _engine(self, role: Role) -> GenerationEngine:
        wanted = self._ctx.cfg.engine_for(role)
        if all(settings != wanted for settings, _ in self._engines):
            self._engines.append((wanted, open_engine(wanted, self._ctx.model_dir)))
        return next(engine for settings, engine in self._engines if settings == wanted)


@contextmanager
def open_caller(ctx: Context) -> Iterator[Caller]:
    """A `Caller` with the stage's model and journal."""
    with closing(Journal(ctx.output.path)) as journal, closing(Caller(ctx, journal)) as caller:
        yield caller
