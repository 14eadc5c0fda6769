"""The judge that all stages ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from nemo_srl.chat import ChatTemplate
from nemo_srl.config import JudgeConfig
from nemo_srl.judging.beginning import NOTHING, Beginning, beginning
from nemo_srl.judging.pairwise import WINNER_LINES, check_rubric, comparison, first_share
from nemo_srl.judging.points import Material
from nemo_srl.judging.readers import reader
from nemo_srl.protocols import GenerationRequest
from nemo_srl.records import Comparison, Completion, Judgement, Order


class Complete(Protocol):
    """Makes the model calls: returns the `n` completions of each request, by its key and in the order of `index`.

    `title` tells a person what is going on. `num_logprobs` is that of `SamplingParams`.
    """

    def __call__(
        self, requests: Sequence[GenerationRequest], *, num_logprobs: int, title: str
    ) -> Mapping[str, Sequence[Completion]]: ...


class Judge:
    """A model that judges answers, as the settings of `judge` say.

    `complete` makes the model calls, and `chat` is the chat template of the judging model. `seed` decides the samples.
    Raises `ConfigError` for settings that the verdict reader cannot work with.
    """

    def __init__(self, complete: Complete, chat: ChatTemplate, cfg: JudgeConfig, *, seed: int) -> None:
        self._complete = complete
        self._chat = chat
        self._cfg = cfg
        self._seed = seed
        self._reader = reader(cfg)
        self._reader.check(cfg)
        self._begun = beginning(self._reader, cfg, chat)

    @property
    def absolute(self) -> Judge:
        """The same judge, asked for scores that can be compared between models."""
        mode = self._reader.absolute
        return Judge(self._complete, self._chat, replace(self._cfg, mode=mode), seed=self._seed) if mode else self

    def justification(self, verdict: str) -> str:
        """What the judge wrote in `verdict` before it gave the score."""
        return self._reader.justification(verdict)

    def ask(
        self, material: Material, *, title: str, prefix: str = "", n: int | None = None, seed: int | None = None
    ) -> list[Judgement]:
        """All verdicts on all answers, in the order of `material`.

        `prefix` keeps the requests apart from others in the same journal; judgements do not show it. `n` and `seed`
        replace `judge.num_judgements` and the judge's own seed.
        """
        questions, stop = self._reader.questions(material, self._cfg), self._reader.stop(self._cfg)
        requests = [
            self._request(prefix + key, prompt, stop, begun=self._begun, n=n, seed=seed)
            for key, prompt in questions.items()
        ]
        found = self._complete(requests, num_logprobs=self._reader.num_logprobs, title=title)
        verdicts = {key: [self._begun.before(c) for c in found[prefix + key]] for key in questions}
        return self._reader.judgements(material, verdicts, self._cfg)

    def compare(self, material: Mapping[str, tuple[str, str, str]], *, title: str) -> list[Comparison]:
        """All verdicts on two models' answers to the same questions, each question in both orders.

        `material` is by the question's id: its instruction, and the responses of model a and model b. Any `judge.mode`
        will do. Raises `ConfigError` without a `judge.pairwise_rubric`.
        """
        check_rubric(self._cfg)
        prompts: dict[tuple[str, Order], str] = {}
        for key, (instruction, a, b) in material.items():
            prompts[key, "ab"] = comparison(self._cfg, instruction=instruction, a=a, b=b)
            prompts[key, "ba"] = comparison(self._cfg, instruction=instruction, a=b, b=a)
        requests = [self._request(f"{key}/{order}", prompt, WINNER_LINES) for (key, order), prompt in prompts.items()]
        found = self._complete(requests, num_logprobs=0, title=title)
        return [
            Comparison(
                question_id=key,
                order=order,
                verdict_index=c.index,
                verdict=c.text.strip(),
                first_share=first_share(c),
                reason=c.reason,
            )
            for key, order in prompts
            for c in found[f"{key}/{order}"]
        ]

    def _request(
        self,
        key: str,
        prompt: str | tuple[str, str],
        stop: tuple[str, ...],
        *,
        begun: Beginning = NOTHING,
        n: int | None = None,
        seed: int | None = None,
    ) -> GenerationRequest:
        """One request for all verdicts on what `prompt` shows the judge, or on an instruction and the answer to it."""
        text, turns = (prompt, ()) if isinstance(prompt, str) else ("", (prompt,))
        return GenerationRequest(
            key=key,
            prompt_token_ids=self._chat.encode(self._chat.render(text or prompt[0])) + begun.token_ids,
            text=text,
            earlier_turns=turns,
            n=self._cfg.num_judgements if n is None else n,
            seed=self._seed if seed is None else seed,
            stop=begun.ends or (stop if self._cfg.stop_at_score else ()),
        )
