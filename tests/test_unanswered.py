"""One bad item ends no stage: it has no answer and a reason, it is counted, and no later start asks for it again."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_srl.artifacts import JOURNAL, BaseModel, Table, to_line
from nemo_srl.config import (
    AnchorConfig,
    CandidatesConfig,
    Config,
    JudgeConfig,
    PromptsConfig,
    RefreshConfig,
)
from nemo_srl.data.questions import alpaca_eval_rows
from nemo_srl.engines.embedded.settings import EmbeddedSettings
from nemo_srl.engines.openai.refusals import concerns_request
from nemo_srl.engines.openai.transport import Transport
from nemo_srl.errors import ConfigError, EngineError, JobFailedError
from nemo_srl.experiment import Experiment
from nemo_srl.records import (
    Candidate,
    Completion,
    EFTExample,
    IFTExample,
    Judgement,
    Metric,
    PreferencePair,
    Prompt,
    Question,
    RankedAnswers,
    from_row,
    to_row,
)
from nemo_srl.report.page import render
from nemo_srl.report.text import table
from nemo_srl.runs import open_run
from nemo_srl.stages import (
    anchor,
    answers,
    calls,
    candidates,
    eft,
    evaluation,
    head_to_head,
    judgements,
    pairs,
    prompts,
)
from tests import tiny
from tests.loopback import Loopback, ids_of
from tests.support import made, server
from tests.tables import answers_to, published

RUBRIC = "Grade {response} to {instruction}. Score: <points>"
PAIRWISE = "{instruction} [A: {response_a}] [B: {response_b}] Winner:"
BAD = "BAD"
"""A request that shows this word gets no good answer."""

PAIR = PreferencePair(prompt_id="p1", prompt="Q1", chosen="a", rejected="b", chosen_score=2, rejected_score=1)
Answer = tuple[int, object]


def refused(code: str, message: str = "no", status: int = 400) -> Answer:
    return status, {"error": {"message": message, "code": code, "type": "invalid_request_error"}}


def choice(reason: str | None, **message: Any) -> Answer:
    """One choice. It is asked for again until its index is that of the last sample."""
    found = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", **message}}
    return 200, {"choices": [found, {**found, "index": 1}]}


CERTAIN: Mapping[str, tuple[Answer, str]] = {
    "filter": (refused("content_filter"), "refused"),
    "policy": (refused("x", "The prompt triggered our content management policy."), "refused"),
    "filter in 200": ((200, refused("content_filter")[1]), "refused"),
    "filtered": (choice("content_filter", content=None), "refused"),
    "filtered halfway": (choice("content_filter", content="It is. Score: 5"), "refused"),
    "refusal": (choice("stop", content=None, refusal="I will not grade this."), "refused"),
    "refusal as a part": (choice("stop", content=[{"type": "refusal", "refusal": "I will not."}]), "refused"),
    "code of length": (refused("context_length_exceeded"), "too_long"),
    "vllm": (
        (400, {"object": "error", "message": "This model's maximum context length is 4096 tokens. However, you "
               "requested 5000 tokens.", "type": "BadRequestError", "code": 400}), "too_long",
    ),
    "vllm 1": (
        refused("", "The decoder prompt (length 5000) is longer than the maximum model length of 4096."), "too_long",
    ),
    "trtllm": (
        refused("", "The sum of prompt length (72417.0), query length (0) should not exceed max_num_tokens (69632)"),
        "too_long",
    ),
    "llama.cpp": (
        refused("exceed_context_size_error", "the request exceeds the available context size", status=500), "too_long",
    ),
    "too large": (refused("", "Payload Too Large", status=413), "too_long"),
}  # fmt: skip
DOUBTFUL: Mapping[str, tuple[Answer, str]] = {
    "unknown": (refused("", "we cannot do this"), "refused"),
    "null": (choice("stop", content=None), "malformed"),
    "no reason": (choice(None, content="Score: 4"), "malformed"),
    "tool calls": (choice("tool_calls", content=None, tool_calls=[{"id": "x"}]), "malformed"),
    "abort": (choice("abort", content="Sco"), "malformed"),
    "half an emoji": (choice("stop", content="Good \ud83d. Score: 4"), "malformed"),
    "no choices": ((200, {"choices": []}), "malformed"),
    "nonsense": ((200, "[[["), "malformed"),
}


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Transport, "_delay", lambda *given: 0.0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    texts = ["Score: 4", "Winner: A", "Name a color. " * 9]
    return BaseModel(tiny.make_model(tmp_path_factory.mktemp("model"), texts, vocab_size=300), "digest")


def good(body: dict[str, Any], index: int) -> tuple[list[int], str]:
    """Grades, compares, continues a list of tasks, or answers, as it is asked."""
    text = body["messages"][-1]["content"]
    if "numbered list" in text:
        return ids_of(f"{text.count(chr(10)) + 1}. Name {len(text)} kinds of plant {hash(text) % 10**6}."), "stop"
    return ids_of("Fine. Winner: A" if "Winner:" in text else f"Fine. Score: {3 + index % 2}"), "stop"


def shows_bad(answer: Answer) -> Any:
    return lambda body: answer if BAD in json.dumps(body["messages"]) else None


def forty(directory: Path, bad: int = 1) -> Table[Candidate]:
    """Answers to 40 prompts, of which the first `bad` ones make the judge's server fail."""
    rows = [(f"p{i:02d}", f"Q{i}", f"{BAD} {i}" if i < bad else f"good {i}") for i in range(40)]
    return answers_to(directory, *rows)


def hosted_judge(url: str, **settings: Any) -> Config:
    judge = JudgeConfig(rubric=RUBRIC, num_judgements=2, engine=server(url))
    return Config(run_dir="run", judge=judge, **settings)


@pytest.mark.parametrize("way", [*CERTAIN, *DOUBTFUL])
def test_one_of_forty_answers_cannot_be_judged(tmp_path: Path, model: BaseModel, way: str) -> None:
    answer, finish = {**CERTAIN, **DOUBTFUL}[way]
    loopback = Loopback(good, bad=shows_bad(answer))
    given = {"judge": model, "candidates": forty(tmp_path)}
    with loopback.running() as url:
        output, metrics = made(judgements.STAGE, hosted_judge(url), tmp_path / "out", **given)
        num_calls = loopback.num_calls
        again, same = made(judgements.STAGE, hosted_judge(url), tmp_path / "out", **given)
    found = output.read()
    missing = [j for j in found if j.candidate_key == "p00/00"]
    assert len(found) == 80
    assert [(j.verdict, j.score, bool(j.reason)) for j in missing] == [("", None, True)] * 2
    assert all(j.score and not j.reason for j in found if j not in missing)
    assert metrics[f"calls_{finish}"] == 2
    assert metrics["valid_rate"] == pytest.approx(78 / 80)
    assert loopback.num_calls == num_calls, "nothing is asked again"
    assert (again.read(), same) == (found, metrics)


@pytest.mark.parametrize(
    "answer",
    [
        choice("eos_token", content="Score: 4"),
        choice("stop", content=[{"type": "text", "text": "Score: "}, {"type": "text", "text": "4"}]),
        choice("stop", content=[{"type": "thinking", "thinking": []}, {"type": "text", "text": "Score: 4"}]),
    ],
    ids=["eos_token", "parts", "thinking"],
)
def test_other_shapes_of_an_answer_are_read(tmp_path: Path, model: BaseModel, answer: Answer) -> None:
    with Loopback(good, bad=shows_bad(answer)).running() as url:
        given = {"judge": model, "candidates": forty(tmp_path)}
        output, metrics = made(judgements.STAGE, hosted_judge(url), tmp_path / "out", **given)
    assert [j.score for j in output.read() if j.candidate_key == "p00/00"] == [4, 4]
    assert not [name for name in metrics if name.startswith("calls_")]


def test_only_the_sample_that_is_bad_is_missing(tmp_path: Path, model: BaseModel) -> None:
    fine = {"index": 1, "finish_reason": "stop", "message": {"role": "assistant", "content": "Score: 2"}}
    filtered = {"index": 0, "finish_reason": "content_filter", "message": {"role": "assistant", "content": ""}}
    with Loopback(good, bad=shows_bad((200, {"choices": [filtered, fine]}))).running() as url:
        given = {"judge": model, "candidates": forty(tmp_path)}
        output, metrics = made(judgements.STAGE, hosted_judge(url), tmp_path / "out", **given)
    assert [j.score for j in output.read() if j.candidate_key == "p00/00"] == [None, 2]
    assert metrics["calls_refused"] == 1


@pytest.mark.parametrize("way", ["filter", "vllm", "unknown", "null"])
def test_too_many_stop_the_stage_and_both_remedies_work(
    tmp_path: Path, model: BaseModel, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer, finish = {**CERTAIN, **DOUBTFUL}[way]
    loopback = Loopback(good, bad=shows_bad(answer))
    given = {"judge": model, "candidates": forty(tmp_path, bad=12)}
    with loopback.running() as url:
        cfg = hosted_judge(url)
        with pytest.raises(EngineError, match=r"18 of 80 calls got no answer.*0\.2 allows 16") as stop:
            made(judgements.STAGE, cfg, tmp_path / "out", **given)
        assert str(stop.value).count(f"{finish}: ") == 5, "the first reasons are shown"
        with monkeypatch.context() as patched:
            patched.setattr(calls, "open_engine", lambda *given: pytest.fail("the same stop needs no call"))
            with pytest.raises(EngineError, match="18 of 80 calls"):
                made(judgements.STAGE, cfg, tmp_path / "out", **given)
        _, metrics = made(judgements.STAGE, replace(cfg, max_unanswered_share=0.3), tmp_path / "out", **given)
        assert metrics[f"calls_{finish}"] == 24
        loopback.bad = lambda body: None
        command = re.search(r"sed -i .*", str(stop.value))
        assert command
        subprocess.run(command[0], shell=True, check=True)
        before = loopback.num_calls
        output, metrics = made(judgements.STAGE, cfg, tmp_path / "out", **given)
    assert loopback.num_calls == before + 12
    assert all(j.score for j in output.read())
    assert "calls_refused" not in metrics


def test_a_share_of_zero_allows_none_and_one_request_is_always_allowed_above_it(
    tmp_path: Path, model: BaseModel
) -> None:
    given = {"judge": model, "candidates": answers_to(tmp_path, ("p", "Q", BAD), ("q", "Q", "good"))}
    with Loopback(good, bad=shows_bad(refused("content_filter"))).running() as url:
        with pytest.raises(EngineError, match="2 of 4 calls"):
            made(judgements.STAGE, hosted_judge(url, max_unanswered_share=0.0), tmp_path / "zero", **given)
        _, metrics = made(judgements.STAGE, hosted_judge(url), tmp_path / "out", **given)
    assert metrics["calls_refused"] == 2
    with pytest.raises(ConfigError, match=r"max_unanswered_share=1\.1"):
        Config(max_unanswered_share=1.1)


@pytest.mark.parametrize("share", [0.2, 1.0])
@pytest.mark.parametrize("way", ["filter", "unknown", "nonsense"])
def test_a_server_that_answers_nothing_ends_the_stage_with_its_words(
    tmp_path: Path, model: BaseModel, way: str, share: float
) -> None:
    answer = {**CERTAIN, **DOUBTFUL}[way][0]
    loopback = Loopback(good, bad=lambda body: answer)
    words = {"filter": "400 Bad Request: no", "unknown": "400 Bad Request: we cannot do this", "nonsense": "[[["}[way]
    with loopback.running() as url:
        cfg = hosted_judge(url, max_unanswered_share=share)
        for _ in range(2):
            with pytest.raises(EngineError, match=re.escape(words)):
                made(judgements.STAGE, cfg, tmp_path / "out", judge=model, candidates=forty(tmp_path))
    if way != "filter":
        kept = (tmp_path / "out" / JOURNAL).read_text()
        assert kept == "", "these may be the server's fault, and are asked again"


def test_a_request_at_which_the_server_always_fails_is_left_out(tmp_path: Path, model: BaseModel) -> None:
    """The server answers others meanwhile. Another status, or a server that fails at all, ends the stage."""
    loopback = Loopback(good, bad=shows_bad(refused("", "out of memory", status=500)))
    given = {"judge": model, "candidates": forty(tmp_path)}
    with loopback.running() as url:
        cfg = hosted_judge(url)
        cfg.judge.engine = server(url, max_concurrency=4, max_retries=8)
        output, metrics = made(judgements.STAGE, cfg, tmp_path / "out", **given)
        assert metrics["calls_refused"] == 2
        assert {j.reason for j in output.read()} == {"", "500 Internal Server Error: out of memory"}
        loopback.bad = shows_bad(refused("", "busy", status=503))
        with pytest.raises(EngineError, match=r"given up after 9 attempts.*busy"):
            made(judgements.STAGE, cfg, tmp_path / "busy", **given)
        loopback.bad = lambda body: refused("", "out of memory", status=500)
        with pytest.raises(EngineError, match=r"given up after 9 attempts.*out of memory"):
            made(judgements.STAGE, cfg, tmp_path / "all", **given)


@pytest.mark.parametrize(("status", "words"), [(401, "bad key"), (403, "bad key"), (404, "no such model")])
def test_what_is_wrong_for_all_ends_the_stage_even_after_answers(
    tmp_path: Path, model: BaseModel, status: int, words: str
) -> None:
    loopback = Loopback(good, bad=shows_bad(refused("x", words, status=status)))
    with loopback.running() as url, pytest.raises(EngineError, match=f"{status}.*{words}"):
        made(judgements.STAGE, hosted_judge(url), tmp_path / "out", judge=model, candidates=forty(tmp_path))


@pytest.mark.parametrize(
    ("status", "body", "concerns"),
    [
        (400, {"error": {"message": "Unrecognized request argument: content_filter"}}, None),
        (422, {"detail": [{"type": "extra_forbidden", "input": "maximum context length"}]}, None),
        (400, {"error": {"message": "max_tokens is too large: 99999. This model supports at most 16384."}}, None),
        (429, {"error": {"message": "Request too large: tokens per minute"}}, None),
        (403, {"error": {"message": "Your chosen model requires moderation and your input was flagged"}}, "refused"),
        (400, {"error": {"message": "no", "innererror": {"code": "ResponsibleAIPolicyViolation"}}}, "refused"),
        (400, "prompt is too long: 208310 tokens > 200000 maximum", "too_long"),
        (401, {"error": {"message": "content filter"}}, None),
        (400, ["content_filter"], None),
        (400, None, None),
    ],
)
def test_whether_an_error_is_about_one_request(status: int, body: Any, concerns: str | None) -> None:
    assert concerns_request(status, body) == concerns


# The other stages.


def eft_rows(directory: Path) -> Table[EFTExample]:
    rows = [
        EFTExample(example_id=f"{i}-{s}", instruction=f"{BAD if i == 3 else 'Do'} {i}", response=f"r{s}",
                   justification="j", score=s)
        for i in range(10) for s in (1, 5)
    ]  # fmt: skip
    return published(directory, "eft_eval", EFTExample, rows)


def test_evaluation_counts_missing_questions_and_verdicts_and_measures_the_rest(
    tmp_path: Path, model: BaseModel
) -> None:
    cfg = Config(run_dir="run", judge=JudgeConfig(rubric=RUBRIC, num_judgements=2))
    with Loopback(good, bad=shows_bad(refused("content_filter"))).running() as url:
        cfg.engine = server(url)
        output, figures = made(evaluation.STAGE, cfg, tmp_path / "out", policy=model, eft_eval=eft_rows(tmp_path))
    found = {m.name: m for m in output.read()}
    assert figures == {"calls_refused": 4 + 2 * 2}
    assert (found["unanswered_rate"].value, found["unanswered_rate"].n) == (0.1, 40)
    assert (found["response_tokens"].n, found["pairs_per_100_prompts"].n) == (36, 9)
    assert found["self_score"].value == 3.5, "a missing answer is no zero"
    assert (found["valid_verdict_rate"].value, found["valid_verdict_rate"].n) == (1, 2 * 36 + 2 * 18)
    assert found["unanswered_verdict_rate"].n == 2 * 36 + 2 * 20
    assert found["pairwise_accuracy_ties_half"].n == 9, "people order nine instructions that the judge scored"
    assert "questions without an answer" in table({"M1": output.read()})
    assert "questions without an answer" not in table({"M1": [Metric(name="self_score", value=1, n=1)]})


def test_head_to_head_compares_what_both_answered(tmp_path: Path, model: BaseModel) -> None:
    def side(name: str, missing: int) -> Table[Candidate]:
        rows = [
            Candidate(prompt_id=f"q{i}", sample_index=0, prompt=f"{BAD if i == 9 else 'Q'}{i}", num_tokens=0,
                      response="" if i == missing else "text", reason="filtered" if i == missing else "",
                      finish_reason="refused" if i == missing else "stop")
            for i in range(10)
        ]  # fmt: skip
        return published(tmp_path, name, Candidate, rows)

    loopback = Loopback(good, bad=shows_bad(refused("content_filter")))
    with loopback.running() as url:
        cfg = hosted_judge(url)
        cfg.judge.pairwise_rubric = PAIRWISE
        given = {"judge": model, "a": side("a", 0), "b": side("b", 1)}
        output, figures = made(head_to_head.STAGE, cfg, tmp_path / "out", **given)
    found = {m.name: m for m in output.read()}
    assert (found["unanswered_rate"].value, found["unanswered_rate"].n) == (0.2, 10)
    assert (found["unjudged_rate"].value, found["unjudged_rate"].n) == (1 / 8, 8)
    assert (found["tie_rate"].value, found["win_rate"].n) == (1, 7)
    assert figures["calls_refused"] == 4
    assert len(loopback.requests) == 2 * 7


def test_answers_stop_at_a_turn_without_an_answer_and_the_exports_leave_it_out(
    tmp_path: Path, model: BaseModel
) -> None:
    asked = [Question(question_id=f"{i}", turns=["Q", f"{BAD} two" if i == 2 else "two", "three"]) for i in range(5)]
    asked.append(Question(question_id="x", turns=[BAD]))
    questions = published(tmp_path, "questions", Question, asked)
    with Loopback(good, bad=shows_bad(refused("content_filter"))).running() as url:
        cfg = Config(run_dir="run", engine=server(url))
        output, figures = made(answers.STAGE, cfg, tmp_path / "out", policy=model, questions=questions)
    found = {c.key: c for c in output.read()}
    missing = [key for key, c in found.items() if not c.is_answered]
    assert missing == ["2/01", "2/02", "x/00"]
    assert found["2/02"].reason == "turn 2 has no answer: 400 Bad Request: no"
    assert figures["calls_refused"] == 2
    assert figures["num_answers"] == 16
    assert len(alpaca_eval_rows(asked, output.read(), "m")) == 5


def test_questions_of_eft_and_the_anchor_go_on(tmp_path: Path, model: BaseModel) -> None:
    ranked = [
        RankedAnswers(
            example_id=f"{i}", instruction=f"{BAD if i == 0 else 'Q'} {i}", responses=["a", "b"], ranks=[0, 0]
        )
        for i in range(6)
    ]
    rankings = published(tmp_path, "rankings", RankedAnswers, ranked)
    with Loopback(good, bad=shows_bad(refused("content_filter"))).running() as url:
        cfg = hosted_judge(url, refresh=RefreshConfig(num_judgements=8), anchor=AnchorConfig(num_prompts=40))
        output, figures = made(eft.STAGE, cfg, tmp_path / "eft", judge=model, rankings=rankings)
        assert figures["calls_refused"] == 16
        assert BAD not in str(output.read())
        own = [Judgement(candidate_key=f"p{i:02d}/00", judgement_index=0, verdict="", score=4) for i in range(40)]
        given = {
            "judge": model, "candidates": forty(tmp_path), "judgements": published(tmp_path, "j", Judgement, own),
            "pairs": published(tmp_path, "d", PreferencePair, [PAIR]),
        }  # fmt: skip
        measured, figures = made(anchor.STAGE, cfg, tmp_path / "anchor", **given)
    assert figures["calls_refused"] == 2
    assert {m.name: m.n for m in measured.read()}["anchor_score"] == 39


def test_new_instructions_go_on_without_the_calls_that_fail(tmp_path: Path, model: BaseModel) -> None:
    seed = [IFTExample(example_id=f"{i}", instruction=f"Say {i} words to a friend.", response="r") for i in range(7)]
    seed.append(IFTExample(example_id="bad", instruction=f"{BAD} words to a friend.", response="r"))
    given = {
        "policy": model, "ift": published(tmp_path, "ift", IFTExample, seed), "earlier": [],
        "eft_eval": eft_rows(tmp_path),
    }  # fmt: skip
    with Loopback(good, bad=shows_bad(refused("context_length_exceeded"))).running() as url:
        cfg = Config(run_dir="run", engine=server(url), max_unanswered_share=0.9)
        cfg.prompts = PromptsConfig(num_prompts=12, num_seed_shots=3, max_rouge_l=1.0, num_generated_shots=0)
        output, figures = made(prompts.STAGE, cfg, tmp_path / "out", **given)
    assert len(output.read()) == 12
    assert 0 < figures["calls_too_long"] < figures["num_calls"]
    assert BAD not in str(output.read())


def test_pairwise_judging_leaves_out_what_was_not_compared(tmp_path: Path, model: BaseModel) -> None:
    rows = [
        Candidate(prompt_id=f"p{i}", sample_index=s, prompt="Q", response=BAD if (i, s) == (0, 0) else f"r{s}",
                  num_tokens=1, finish_reason="stop")
        for i in range(8) for s in range(2)
    ]  # fmt: skip
    given = {"judge": model, "candidates": published(tmp_path, "candidates", Candidate, rows)}
    with Loopback(good, bad=shows_bad(choice("stop", content=None, refusal="no"))).running() as url:
        cfg = hosted_judge(url)
        cfg.judge = replace(cfg.judge, mode="pairwise", pairwise_rubric=PAIRWISE)
        output, figures = made(judgements.STAGE, cfg, tmp_path / "out", **given)
    missing = [j for j in output.read() if j.reason]
    assert {j.candidate_key for j in missing} == {"p0/00", "p0/01"}
    assert all((j.score, j.verdict, j.reason) == (None, "", "refused: no") for j in missing)
    assert figures["calls_refused"] == 4


def test_candidates_without_an_answer_are_not_judged_and_in_no_pair(tmp_path: Path, model: BaseModel) -> None:
    """The embedded engine: one prompt of the file is too long, and one answer is too long for the judge's prompt."""
    asked = [Prompt(prompt_id=f"p{i}", text="Name a color. " * (400 if i == 0 else 1)) for i in range(6)]
    cfg = Config(run_dir="run", engine=EmbeddedSettings(dtype="float32"), candidates=CandidatesConfig(max_tokens=4))
    cfg.judge = JudgeConfig(rubric=RUBRIC, num_judgements=2, max_tokens=4)
    y, figures = made(
        candidates.STAGE, cfg, tmp_path / "candidates", policy=model, prompts=published(tmp_path, "x", Prompt, asked)
    )
    assert figures["calls_too_long"] == 4
    assert figures["num_candidates"] == 24
    assert figures["mean_tokens"] > 0.9
    rows = y.read()
    assert [c.key for c in rows if not c.is_answered] == [f"p0/{i:02d}" for i in range(4)]
    assert re.search(r"a prompt of \d+ tokens and max_tokens=4 exceed the limit of 1024", rows[0].reason)

    rows = [replace(c, response="word " * 1100) if c.key == "p1/00" else c for c in rows]
    r, figures = made(
        judgements.STAGE, cfg, tmp_path / "r", judge=model, candidates=published(tmp_path, "y", Candidate, rows)
    )
    assert figures["calls_too_long"] == 2
    verdicts = r.read()
    assert len(verdicts) == 20 * 2
    assert {j.candidate_key for j in verdicts if j.reason} == {"p1/00"}

    scored = [replace(j, score=float(j.candidate_key.endswith("01")) if not j.reason else None) for j in verdicts]
    rows = [replace(c, finish_reason="stop", response=c.key) if c.is_answered else c for c in rows]
    given = {
        "candidates": published(tmp_path, "y2", Candidate, rows),
        "judgements": published(tmp_path, "r2", Judgement, scored),
    }
    d, figures = made(pairs.STAGE, cfg, tmp_path / "d", **given)
    assert (figures["num_pairs"], figures["num_unanswered"]) == (5, 1)
    assert "p1/00" not in {x for p in d.read() for x in (p.chosen, p.rejected)}


def test_max_tokens_that_leave_no_room_are_no_matter_of_one_prompt(tmp_path: Path, model: BaseModel) -> None:
    cfg = Config(run_dir="run", engine=EmbeddedSettings(dtype="float32"), candidates=CandidatesConfig(max_tokens=1024))
    x = published(tmp_path, "x", Prompt, [Prompt(prompt_id="p", text="Q")])
    with pytest.raises(ValueError, match="max_tokens=1024: no prompt has room"):
        made(candidates.STAGE, cfg, tmp_path / "y", policy=model, prompts=x)


def test_the_share_may_be_raised_on_the_same_run_directory_and_the_report_shows_the_calls(
    tmp_path: Path, model: BaseModel
) -> None:
    loopback = Loopback(good, bad=shows_bad(refused("content_filter", "<b>filtered</b>")))
    given = {"judge": model, "candidates": forty(tmp_path, bad=12)}
    with loopback.running() as url:
        cfg = replace(hosted_judge(url), run_dir=str(tmp_path / "run"))
        with Experiment(cfg) as exp, pytest.raises(JobFailedError, match=r"(?s)of 80 calls.*p0\d/00/00: refused: 400"):
            exp.run(judgements.STAGE, 1, **given)
        with Experiment(replace(cfg, max_unanswered_share=0.3)) as exp:
            exp.run(judgements.STAGE, 1, **given)
        asked = loopback.num_calls
        with Experiment(cfg) as exp:
            kept = exp.run(judgements.STAGE, 1, **given)
    assert asked == loopback.num_calls
    manifest = kept.manifest()
    assert manifest is not None
    assert manifest.metrics["calls_refused"] == 24
    page = render(open_run(tmp_path / "run"))
    assert "Model calls without an answer" in page
    assert re.search(r"<th>judgements, iteration 1</th><td>24</td><td>0</td><td>0</td>", page)


def test_rows_without_a_reason_are_those_of_older_versions() -> None:
    answered = Completion(request_key="k", index=0, text="t", num_tokens=1, finish_reason="stop")
    assert "reason" not in to_row(answered)
    assert from_row(Completion, to_row(answered), where="x") == answered
    missing = replace(answered, text="", finish_reason="too_long", reason="long")
    assert from_row(Completion, json.loads(to_line(missing)), where="x") == missing
