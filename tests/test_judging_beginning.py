"""The judge's prompt goes on with what every verdict begins with (`judge.begin_verdict`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from nemo_srl import combinations, judging
from nemo_srl.chat import ChatTemplate
from nemo_srl.config import Config, JudgeConfig
from nemo_srl.errors import ConfigError
from nemo_srl.judging import Judge, reader
from nemo_srl.judging.points import verdict_text
from nemo_srl.protocols import GenerationRequest
from nemo_srl.records import Completion, FinishReason, Judgement, NumberLogprobs
from tests import tiny
from tests.support import composed

CFG = JudgeConfig(
    rubric="Grade {response} to {instruction}. Score:", mode="expected", justification=False, begin_verdict=True,
    num_judgements=1,
)  # fmt: skip
APART, TOGETHER = "Grade it. Score:", "Grade it. Score: 0 1 2 3 4 5"
"""Texts of a tokenizer. With the second one, a digit has one token with the space before it, as in GPT-2."""


def chat_of(directory: Path, text: str = APART, **more: object) -> ChatTemplate:
    tiny.make_tokenizer(directory, [text] * 3, vocab_size=330)
    return ChatTemplate(directory, **more)  # type: ignore[arg-type]


class Engine:
    """Continues every prompt in the same way, and remembers what it was asked."""

    def __init__(self, text: str, numbers: NumberLogprobs | None = None, reason: FinishReason = "stop") -> None:
        self._text, self._numbers, self._reason = text, numbers, reason
        self.asked: list[GenerationRequest] = []

    def complete(
        self, requests: Sequence[GenerationRequest], *, num_logprobs: int, title: str
    ) -> dict[str, list[Completion]]:
        self.asked += requests
        return {r.key: [self._completion(r.key)] for r in requests}

    def _completion(self, key: str) -> Completion:
        why = "" if self._reason in ("stop", "length") else "The server said no."
        return Completion(
            request_key=key, index=0, text=self._text, num_tokens=len(self._text), finish_reason=self._reason,
            number_logprobs=self._numbers, reason=why,
        )  # fmt: skip


def ask(engine: Engine, chat: ChatTemplate, cfg: JudgeConfig = CFG) -> Judgement:
    (found,) = Judge(engine.complete, chat, cfg, seed=7).ask({"x/00": ("Q", "a")}, title="judgements")
    return found


@pytest.mark.parametrize(("text", "begun"), [(APART, "Score: "), (TOGETHER, "Score:")])
def test_the_prompt_ends_with_the_tokens_that_all_verdicts_share(tmp_path: Path, text: str, begun: str) -> None:
    chat = chat_of(tmp_path, text)
    found = judging.beginning(reader(CFG), CFG, chat)
    assert (found.text, [end.strip() for end in found.ends]) == (begun, list("012345"))
    for k, end in enumerate(found.ends):
        # What is left is one token, and the whole is what EFT teaches.
        assert found.text + end == verdict_text("", k)
        assert (*found.token_ids, *chat.encode(end)) == chat.encode(verdict_text("", k))
        assert len(chat.encode(end)) == 1
    engine = Engine("4")
    ask(engine, chat)
    (request,) = engine.asked
    assert request.prompt_token_ids == chat.encode(chat.render("Grade a to Q. Score:") + begun)
    assert request.stop == found.ends


@pytest.mark.parametrize(("text", "says"), [(APART, "4"), (TOGETHER, " 4")])
def test_the_verdict_is_whole_and_its_probabilities_are_at_their_place(tmp_path: Path, text: str, says: str) -> None:
    engine = Engine(says, [(len(says) - 1, {"4": math.log(0.6), "2": math.log(0.2)})])
    found = ask(engine, chat_of(tmp_path, text))
    assert found.verdict == "Score: 4"
    assert (found.score, found.coverage) == (pytest.approx((4 * 0.6 + 2 * 0.2) / 0.8), pytest.approx(0.8))


@pytest.mark.parametrize(
    ("engine", "verdict"),
    [
        (Engine("many points", [], "length"), "Score: many points"),
        (Engine("4.5 of 9", [(0, {"4": 0.0})], "length"), "Score: 4.5 of 9"),
        (Engine("", None, "refused"), ""),
    ],
)
def test_what_is_no_score_is_none(tmp_path: Path, engine: Engine, verdict: str) -> None:
    found = ask(engine, chat_of(tmp_path))
    assert (found.verdict, found.score) == (verdict, None)
    assert bool(found.reason) is (verdict == "")


def test_without_the_setting_the_judge_begins_itself(tmp_path: Path) -> None:
    chat, engine = chat_of(tmp_path), Engine("Score: 4", [(7, {"4": 0.0})])
    found = ask(engine, chat, replace(CFG, begin_verdict=False))
    assert engine.asked[0].prompt_token_ids == chat.encode(chat.render("Grade a to Q. Score:"))
    assert (engine.asked[0].stop, found.verdict, found.score) == ((), "Score: 4", 4.0)


def test_a_tokenizer_with_tokens_for_whole_verdicts_leaves_no_beginning(tmp_path: Path) -> None:
    class Whole(ChatTemplate):
        def encode(self, text: str) -> tuple[int, ...]:
            return (hash(text),) if text.startswith("Score") else super().encode(text)

    tiny.make_tokenizer(tmp_path, [APART], vocab_size=300)
    assert judging.beginning(reader(CFG), CFG, Whole(tmp_path)).token_ids == ()


@pytest.mark.parametrize("changed", [{"mode": "sampled"}, {"justification": True}, {"mode": "pairwise"}])
def test_verdicts_that_begin_in_any_way_are_refused(tmp_path: Path, changed: dict[str, object]) -> None:
    cfg = replace(CFG, **changed, pairwise_rubric="{instruction} {response_a} {response_b} Winner:")  # type: ignore[arg-type]
    chat = chat_of(tmp_path)
    with pytest.raises(ConfigError, match=r"judge\.begin_verdict=True: .*Set judge\.begin_verdict=false, or"):
        Judge(Engine("4").complete, chat, cfg, seed=7)
    Judge(Engine("4").complete, chat, replace(cfg, begin_verdict=False), seed=7)


EMPTY_THINKING = tiny.CHAT_TEMPLATE.replace("assistant\n{%", "assistant\n<think>\n\n</think>\n\n{%")


def test_a_model_that_may_think_first_is_refused(tmp_path: Path) -> None:
    thinks = chat_of(tmp_path, thinking_tags=("<think>", "</think>"))
    assert thinks.may_think
    with pytest.raises(ConfigError, match=r"judge\.begin_verdict=True: .*thoughts in <think> .*enable_thinking: false"):
        judging.beginning(reader(CFG), CFG, thinks)
    off = ChatTemplate(tmp_path, thinking_tags=("<think>", "</think>"), chat_template=EMPTY_THINKING)
    assert not off.may_think
    assert judging.beginning(reader(CFG), CFG, off).text == "Score: "


@pytest.mark.parametrize("key", ["engine", "judge.engine"])
def test_a_server_with_a_template_of_its_own_is_refused_at_set_up(key: str) -> None:
    server = ["engine=openai"] if key == "engine" else ["+engine@judge.engine=openai"]
    address = [f"{key}.base_url=http://localhost:1", f"{key}.model=m"]
    cfg: Config = composed("judge=checked_5pt", *server, *address, f"{key}.api=chat")
    with pytest.raises(ConfigError, match=r"judge\.begin_verdict=True: .*\(openai\) .*Set judge\.begin_verdict=false"):
        combinations.check_judges(cfg)
    cfg.judge.begin_verdict = False
    combinations.check_judges(cfg)
