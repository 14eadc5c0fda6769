"""Thinking models: what they think is kept, and is neither judged, trained on nor measured."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_srl.artifacts import JOURNAL, BaseModel, SourceFile, to_line
from nemo_srl.chat import ChatTemplate
from nemo_srl.config import CandidatesConfig, Config, JudgeConfig, ModelConfig
from nemo_srl.errors import ConfigError, DataError, ModelError
from nemo_srl.protocols import DPORow, GenerationRequest, SamplingParams, SFTRow
from nemo_srl.records import Candidate, Completion, FinishReason, PreferencePair, Prompt
from nemo_srl.stages import candidates, head_to_head, judgements, policy, refresh
from nemo_srl.stages.base import Context
from nemo_srl.stages.calls import Caller
from nemo_srl.stages.candidates import candidate
from nemo_srl.thinking import answer_of, tags_of
from tests import tiny
from tests.loopback import Loopback, ids_of
from tests.support import made, server

RunCandidates = Callable[..., tuple[list[Candidate], dict[str, float], list[Completion]]]
THINK = ("<think>", "</think>")
# The template of a model such as Qwen3: it writes an empty thinking before an answer.
EMPTY = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'].split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# The template of a model such as DeepSeek-R1: it opens the thinking.
OPENING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'].split('</think>')[-1] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
RUBRIC = "Grade: {instruction} / {response} Score:"
PAIRWISE_RUBRIC = "{instruction} {response_a} {response_b} Winner:"
SAYS = "It is red."


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("It is red.", "It is red."),
        ("<think>Is it blue?</think>It is red.", "It is red."),
        ("<think>\n\n</think>\n\nIt is red.", "\n\nIt is red."),
        ("Is it blue? No.\n</think>\nIt is red.", "\nIt is red."),
        ("<think>Is it", ""),
        ("<think>a</think>b<think>c</think>It is red.", "It is red."),
        ("<think>a</think>It is red.<think>Or is", ""),
        ("<think>a</think>", ""),
        ("It is <THINK> red.", "It is <THINK> red."),
        ("", ""),
    ],
)
def test_the_answer_is_what_follows_the_thinking(text: str, answer: str) -> None:
    assert answer_of(text, THINK) == answer
    assert answer_of(text, ()) == text
    assert answer_of(text.replace("<think>", "[A]").replace("</think>", "[B]"), ("[A]", "[B]")) == answer


def test_the_tags_are_those_of_the_template_or_of_the_added_tokens() -> None:
    assert tags_of(tiny.CHAT_TEMPLATE, tiny.SPECIAL_TOKENS) == ()
    assert tags_of(EMPTY, ()) == THINK
    assert tags_of("", ["[THINK]", "[/THINK]"]) == ("[THINK]", "[/THINK]")
    assert tags_of("", ["[THINK]"]) == ()
    assert tags_of("... <|END_THINKING|>", ()) == ("<|START_THINKING|>", "<|END_THINKING|>")


@pytest.mark.parametrize("tags", [["<think>"], ["<t>", "<t>"], ["<t>", " "], ["a", "b", "c"]])
def test_tags_that_cannot_be_told_apart_are_refused(tags: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"model\.thinking_tags="):
        ModelConfig(thinking_tags=tags)
    assert ModelConfig(thinking_tags=[]).thinking_tags == []


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("thinking") / "model", [SAYS], vocab_size=300)


# The template of Qwen3, whose thinking can be turned off.
SWITCHED = EMPTY.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
)


def template(model: Path, text: str, tags: Sequence[str] | None = None) -> ChatTemplate:
    return ChatTemplate(model, chat_template=text, thinking_tags=tags)


def test_a_training_prompt_ends_after_an_empty_thinking_where_the_template_thinks(model: Path) -> None:
    asked = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    plain, empty, opening = (template(model, text) for text in (tiny.CHAT_TEMPLATE, EMPTY, OPENING))
    assert [c.opens_thinking for c in (plain, empty, opening)] == [False, False, True]
    assert [c.render("What?") for c in (plain, empty, opening)] == [asked, asked, asked + "<think>\n"]
    assert plain.render_for_training("What?") == asked
    assert empty.render_for_training("What?") == asked + "<think>\n\n</think>\n\n"
    assert opening.render_for_training("What?") == asked + "<think>\n\n</think>\n\n"
    assert {c.response_text(SAYS) for c in (plain, empty, opening)} == {SAYS}
    assert template(model, EMPTY, []).render_for_training("What?") == asked
    assert template(model, EMPTY, []).thinking_tags == ()
    assert template(model, tiny.CHAT_TEMPLATE, THINK).render_for_training("What?") == asked


def test_thinking_is_turned_on_and_off_by_a_variable_of_the_template(model: Path) -> None:
    asked = "<|im_start|>user\nWhat?<|im_end|>\n<|im_start|>assistant\n"
    on, off = (ChatTemplate(model, chat_template=SWITCHED, variables=v) for v in ({}, {"enable_thinking": False}))
    assert on.thinking_tags == off.thinking_tags == THINK
    assert not on.opens_thinking
    assert not off.opens_thinking
    assert (on.render("What?"), off.render("What?")) == (asked, asked + "<think>\n\n</think>\n\n")
    assert on.render_for_training("What?") == off.render_for_training("What?") == off.render("What?")
    assert on.response_text(SAYS) == off.response_text(SAYS) == SAYS
    explicit = ChatTemplate(model, chat_template=SWITCHED, variables={"enable_thinking": True})
    assert explicit.render("What?") == asked


def test_tags_that_engines_leave_out_of_texts_are_refused(model: Path) -> None:
    with pytest.raises(ModelError, match=r"\['<\|im_start\|>'\], are special tokens"):
        template(model, tiny.CHAT_TEMPLATE, ["<|im_start|>", "</think>"])


class Scripted:
    """A `GenerationEngine` that says what it was given: texts and their finish reasons."""

    def __init__(self, replies: list[tuple[str, FinishReason]]) -> None:
        self.replies = replies

    def generate(
        self, requests: Sequence[GenerationRequest], params: SamplingParams, *, completed: Collection[str] = ()
    ) -> Iterator[tuple[Completion, ...]]:
        for r in requests:
            for i in range(r.n):
                text, reason = self.replies.pop(0)
                numbers = [(text.index("7"), {"7": -0.1})] if "7" in text else None
                yield (
                    Completion(
                        request_key=r.key,
                        index=i,
                        text=text,
                        num_tokens=9,
                        finish_reason=reason,
                        number_logprobs=numbers,
                    ),
                )

    def close(self) -> None: ...


@pytest.fixture
def run_candidates(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> RunCandidates:
    """Makes the candidates of two prompts, two each, from a list of replies."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(to_line(Prompt(prompt_id=f"p{i}", text=f"Color {i}?")) for i in range(2)))

    def run(
        replies: list[tuple[str, FinishReason]], *, chat_template: str = EMPTY, **settings: Any
    ) -> tuple[list[Candidate], dict[str, float], list[Completion]]:
        monkeypatch.setattr(Caller, "_engine", lambda caller, role: Scripted(replies[:]))
        few = {"candidates": CandidatesConfig(num_samples=2), **settings}
        cfg = Config(run_dir=str(tmp_path), model=ModelConfig(chat_template=chat_template), **few)
        inputs = {"policy": BaseModel(model, "digest"), "prompts": SourceFile(prompts, Prompt)}
        output, metrics = made(candidates.STAGE, cfg, tmp_path / "candidates", **inputs)
        rows = [json.loads(line) for line in (tmp_path / "candidates" / JOURNAL).read_text().splitlines()]
        return output.read(), dict(metrics), [Completion(**row) for row in rows]

    return run


REPLIES: list[tuple[str, FinishReason]] = [
    ("<think>Is it blue? <b></think>\n\nIt is red.", "stop"), ("<think>Let me see", "length"),
    ("It is blue.", "stop"), ("<think>Hm</think>It is gr", "length"),
]  # fmt: skip


def test_thoughts_are_kept_apart_from_the_response_and_a_response_that_never_came_is_counted(
    run_candidates: RunCandidates,
) -> None:
    found, metrics, journal = run_candidates(REPLIES)
    assert [c.response for c in found] == ["It is red.", "", "It is blue.", "It is gr"]
    assert [c.is_answered for c in found] == [True, False, True, True]
    assert found[0].thinking == "<think>Is it blue? <b></think>"
    assert found[1].thinking == "<think>Let me see"
    assert [c.text for c in journal] == [text for text, _ in REPLIES]
    assert metrics["num_still_thinking"] == 1
    assert ("no answer: still thinking at the end", "1") in candidates.summary(metrics)


def test_a_template_that_opens_the_thinking_leaves_the_end_tag_alone(run_candidates: RunCandidates) -> None:
    replies: list[tuple[str, FinishReason]] = [
        ("Is it blue?</think>It is red.", "stop"), ("Let me see", "length"), ("See", "stop"), ("</think>X", "stop"),
    ]  # fmt: skip
    found, metrics, _ = run_candidates(replies, chat_template=OPENING)
    assert [c.response for c in found] == ["It is red.", "", "", "X"]
    assert metrics["num_still_thinking"] == 2


def test_a_server_may_have_taken_the_thoughts_away_itself(run_candidates: RunCandidates) -> None:
    replies: list[tuple[str, FinishReason]] = [
        ("It is red.", "stop"), ("Let me see", "length"), ("See</think>X", "stop"), ("<think>Hm", "stop"),
    ]  # fmt: skip
    found, _, _ = run_candidates(replies, chat_template=OPENING, engine=server("http://nowhere"))
    assert [c.response for c in found] == ["It is red.", "", "X", ""]


def test_places_of_numbers_are_those_in_the_answer(
    run_candidates: RunCandidates, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Completion] = []
    monkeypatch.setattr(candidates, "candidate", lambda *args: (seen.append(args[3]), candidate(*args))[1])
    run_candidates([("<think>a</think>It is 7", "stop"), ("<think>7</think>No", "stop"), *REPLIES[2:]])
    assert [c.number_logprobs for c in seen[:2]] == [[(6, {"7": -0.1})], []]


def test_a_model_without_thinking_has_the_same_table_as_ever(run_candidates: RunCandidates, tmp_path: Path) -> None:
    found, metrics, _ = run_candidates(REPLIES, chat_template=tiny.CHAT_TEMPLATE)
    assert [c.response for c in found] == [text for text, _ in REPLIES]
    assert "num_still_thinking" not in metrics
    assert "thinking" not in json.loads((tmp_path / "candidates" / "data.jsonl").read_text().splitlines()[0])


def test_a_model_that_never_stops_thinking_is_an_error_with_a_remedy(run_candidates: RunCandidates) -> None:
    with pytest.raises(DataError, match=r"candidates\.max_tokens=9: the model was still thinking there in all 4"):
        run_candidates([("<think>a", "length")] * 4, candidates=CandidatesConfig(num_samples=2, max_tokens=9))


def test_only_answers_are_judged_and_compared(
    run_candidates: RunCandidates, tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _, _ = run_candidates(REPLIES)
    monkeypatch.undo()
    table, asked = tmp_path / "candidates.jsonl", []
    table.write_text("".join(map(to_line, found)))
    given = {"candidates": SourceFile(table, Candidate)}
    judge = BaseModel(model, "digest")

    def reply(body: dict[str, Any], index: int) -> tuple[list[int], str]:
        asked.append(str(body["messages"][0]["content"]))
        text = "<think>Score: 0\nWinner: B</think>Fine.\nScore: 4\nWinner: A"
        return ids_of(text), "stop"

    with Loopback(reply).running() as url:
        cfg = Config(
            run_dir=str(tmp_path), model=ModelConfig(chat_template=EMPTY),
            engine=server(url, max_concurrency=1, api="chat", model="m"),
            judge=JudgeConfig(rubric=RUBRIC, num_judgements=1, temperature=0, pairwise_rubric=PAIRWISE_RUBRIC),
        )  # fmt: skip
        verdicts, _ = made(judgements.STAGE, cfg, tmp_path / "judgements", judge=judge, **given)
        compared, _ = made(
            head_to_head.STAGE, cfg, tmp_path / "match", judge=judge, a=given["candidates"], b=given["candidates"]
        )
    assert len(verdicts.read()) == 3
    assert all(j.score == 4 and j.verdict == "Fine.\nScore: 4\nWinner: A" for j in verdicts.read())
    assert not any("think" in text for text in asked)
    assert {m.name: m.value for m in compared.read()}["first_position_rate"] == 1


def test_training_rows_hold_answers_only(tmp_path: Path, model: Path) -> None:
    pair = PreferencePair(
        prompt_id="p", prompt="What?", chosen=SAYS, rejected="No.", chosen_score=5, rejected_score=1
    )  # fmt: skip
    thought = Candidate(
        prompt_id="p", sample_index=0, prompt="What?", response=SAYS, num_tokens=9, finish_reason="stop", thinking="Hm"
    )  # fmt: skip
    silent = replace(thought, sample_index=1, response="", thinking="<think>Hm")
    for name, rows in (("pairs", [pair]), ("own_answers", [thought, silent])):
        (tmp_path / f"{name}.jsonl").write_text("".join(map(to_line, rows)))
    cfg = Config(run_dir=str(tmp_path), model=ModelConfig(chat_template=OPENING), judge=JudgeConfig(rubric=RUBRIC))
    inputs: dict[str, Any] = {
        "policy": BaseModel(model, "digest"),
        "pairs": SourceFile(tmp_path / "pairs.jsonl", PreferencePair),
        "own_answers": SourceFile(tmp_path / "own_answers.jsonl", Candidate),
    }
    end = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    (row,) = policy.task(Context(cfg, 1, inputs, None)).rows
    assert isinstance(row, DPORow)
    assert row.prompt.endswith(end)
    assert (row.chosen, row.rejected) == (SAYS, "No.")
    (own,) = refresh.task(Context(cfg, 1, inputs, None)).rows
    assert isinstance(own, SFTRow)
    assert own.prompt.endswith(end)
    assert own.response == SAYS
