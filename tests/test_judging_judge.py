"""The judge: what it asks the engine, to the last byte, and what it makes of the answers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from nemo_srl.chat import ChatTemplate
from nemo_srl.config import JudgeConfig
from nemo_srl.errors import ConfigError
from nemo_srl.judging import Judge, Material, reader
from nemo_srl.protocols import GenerationRequest
from nemo_srl.records import Comparison, Completion, EFTExample, Judgement, NumberLogprobs
from tests import tiny

CFG = JudgeConfig(
    rubric="Grade <response>{response}</response> to {instruction}. Score:",
    pairwise_rubric="{instruction}: {response_a} or {response_b}? Winner:",
    max_score=2,
    num_judgements=2,
    stop_at_score=True,
)
SCORE_LINES = ("\nScore: 0\n", "\nScore: 1\n", "\nScore: 2\n")
WINNER_LINES = ("\nWinner: A\n", "\nWinner: B\n", "\nWinner: tie\n")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tiny.make_tokenizer(path, ["Grade the response. Score: 2"], vocab_size=300)
    return path


class Engine:
    """Answers every call on a prompt with the same text, and remembers what it was asked."""

    def __init__(self, says: Mapping[str, str], logprobs: NumberLogprobs | None = None) -> None:
        self._says = says
        self._logprobs = logprobs
        self.calls: list[tuple[list[GenerationRequest], int, str]] = []

    def complete(
        self, requests: Sequence[GenerationRequest], *, num_logprobs: int, title: str
    ) -> dict[str, list[Completion]]:
        self.calls.append((list(requests), num_logprobs, title))
        return {r.key: [self._completion(r, i) for i in range(r.n)] for r in requests}

    def _completion(self, r: GenerationRequest, index: int) -> Completion:
        text = next((text for part, text in self._says.items() if part in r.text), "No idea.")
        return Completion(
            request_key=r.key,
            index=index,
            text=text,
            num_tokens=1,
            finish_reason="stop",
            number_logprobs=self._logprobs,
        )


def request(
    directory: Path, key: str, text: str, stop: tuple[str, ...], *, n: int = 2, seed: int = 7
) -> GenerationRequest:
    """Written out by hand: the user's turn of `tiny.CHAT_TEMPLATE`, and the start of the assistant's."""
    rendered = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    ids = AutoTokenizer.from_pretrained(directory)(rendered, add_special_tokens=False)["input_ids"]
    return GenerationRequest(key=key, prompt_token_ids=tuple(ids), n=n, seed=seed, text=text, stop=stop)


def judgement(key: str, index: int, verdict: str, score: float | None, coverage: float | None = None) -> Judgement:
    return Judgement(candidate_key=key, judgement_index=index, verdict=verdict, score=score, coverage=coverage)


def judge(engine: Engine, directory: Path, cfg: JudgeConfig = CFG) -> Judge:
    return Judge(engine.complete, ChatTemplate(directory), cfg, seed=7)


def test_points_are_asked_in_the_order_of_the_material(directory: Path) -> None:
    engine = Engine({"first": "\n Good.\nScore: 2\n"})
    found = judge(engine, directory).ask(
        {"p/01": ("Q", "first </response>"), "p/00": ("{response}", "second")}, title="judgements"
    )
    requests = [
        request(directory, "p/01", "Grade <response>first &lt;/response></response> to Q. Score:", SCORE_LINES),
        request(directory, "p/00", "Grade <response>second</response> to {response}. Score:", SCORE_LINES),
    ]
    assert engine.calls == [(requests, 0, "judgements")]
    assert found == [
        judgement("p/01", 0, "Good.\nScore: 2", 2.0),
        judgement("p/01", 1, "Good.\nScore: 2", 2.0),
        judgement("p/00", 0, "No idea.", None),
        judgement("p/00", 1, "No idea.", None),
    ]


def test_a_caller_may_set_prefix_number_and_seed(directory: Path) -> None:
    engine = Engine({"a": "Score: 1"})
    cfg = replace(CFG, stop_at_score=False)
    found = judge(engine, directory, cfg).ask({"x/00": ("Q", "a")}, title="eft", prefix="eft/", n=1, seed=0)
    text = "Grade <response>a</response> to Q. Score:"
    assert engine.calls == [([request(directory, "eft/x/00", text, (), n=1, seed=0)], 0, "eft")]
    assert found == [judgement("x/00", 0, "Score: 1", 1.0)]


def test_expected_points_ask_for_probabilities_and_for_nothing_else(directory: Path) -> None:
    engine = Engine({"a": "Score: 2"}, [(7, {"2": math.log(0.5), "1": math.log(0.25)})])
    cfg = replace(CFG, mode="expected")
    found = judge(engine, directory, cfg).ask({"x/00": ("Q", "a")}, title="t", n=1)
    text = "Grade <response>a</response> to Q. Score:"
    assert engine.calls == [([request(directory, "x/00", text, SCORE_LINES, n=1)], 20, "t")]
    assert [(j.score, j.coverage) for j in found] == [(pytest.approx(5 / 3), pytest.approx(0.75))]


def test_comparisons_of_candidates_in_both_orders(directory: Path) -> None:
    engine = Engine({"Q: good": "A.\nWinner: A\n", "Q: bad or good": "Winner: B"})
    cfg = replace(CFG, mode="pairwise", num_judgements=1)
    material = {"p/00": ("Q", "good"), "q/x/00": ("Other", "r"), "p/02": ("Q", "bad"), "q/x/01": ("Other", "s")}
    found = judge(engine, directory, cfg).ask(material, title="judgements", prefix="self/")
    requests = [
        request(directory, key, text, WINNER_LINES, n=1)
        for key, text in (
            ("self/p/00-vs-02", "Q: good or bad? Winner:"),
            ("self/p/02-vs-00", "Q: bad or good? Winner:"),
            ("self/q/x/00-vs-01", "Other: r or s? Winner:"),
            ("self/q/x/01-vs-00", "Other: s or r? Winner:"),
        )
    ]
    assert engine.calls == [(requests, 0, "judgements")]
    assert found == [
        judgement("p/00", 0, "[A is p/00, B is p/02] A.\nWinner: A", 2.0),
        judgement("p/02", 0, "[A is p/00, B is p/02] A.\nWinner: A", 0.0),
        judgement("p/02", 1, "[A is p/02, B is p/00] Winner: B", 0.0),
        judgement("p/00", 1, "[A is p/02, B is p/00] Winner: B", 2.0),
        judgement("q/x/00", 0, "[A is q/x/00, B is q/x/01] No idea.", None),
        judgement("q/x/01", 0, "[A is q/x/00, B is q/x/01] No idea.", None),
        judgement("q/x/01", 1, "[A is q/x/01, B is q/x/00] No idea.", None),
        judgement("q/x/00", 1, "[A is q/x/01, B is q/x/00] No idea.", None),
    ]


@pytest.mark.parametrize("mode", ["sampled", "expected", "pairwise"])
def test_two_models_are_compared_in_both_orders_in_any_mode(directory: Path, mode: str) -> None:
    engine = Engine({"Do 1.: long": "Winner: A\n", "Do 1.: short": " Winner: tie"})
    cfg = replace(CFG, mode=mode, num_judgements=1)
    found = judge(engine, directory, cfg).compare(
        {"1": ("Do 1.", "long", "short"), "0": ("Do 0.", "r", "s")}, title="head to head"
    )
    requests = [
        request(directory, key, text, WINNER_LINES, n=1)
        for key, text in (
            ("1/ab", "Do 1.: long or short? Winner:"),
            ("1/ba", "Do 1.: short or long? Winner:"),
            ("0/ab", "Do 0.: r or s? Winner:"),
            ("0/ba", "Do 0.: s or r? Winner:"),
        )
    ]
    assert engine.calls == [(requests, 0, "head to head")]
    assert found == [
        Comparison(question_id="1", order="ab", verdict_index=0, verdict="Winner: A", first_share=1.0),
        Comparison(question_id="1", order="ba", verdict_index=0, verdict="Winner: tie", first_share=0.5),
        Comparison(question_id="0", order="ab", verdict_index=0, verdict="No idea.", first_share=None),
        Comparison(question_id="0", order="ba", verdict_index=0, verdict="No idea.", first_share=None),
    ]
    assert [c.key for c in found] == ["1/ab/00", "1/ba/00", "0/ab/00", "0/ba/00"]


def test_a_comparison_needs_its_rubric(directory: Path) -> None:
    engine = Engine({})
    with pytest.raises(ConfigError, match=r"judge\.pairwise_rubric=''"):
        judge(engine, directory, replace(CFG, pairwise_rubric="")).compare({"1": ("Q", "a", "b")}, title="t")
    assert engine.calls == []


def test_scores_of_different_models_are_points_where_candidates_are_compared(directory: Path) -> None:
    material = {"p/00": ("Q", "a"), "p/01": ("Q", "b")}
    for mode, wanted_logprobs in (("sampled", 0), ("expected", 20), ("pairwise", 0)):
        engine = Engine({"Grade": "Score: 1"}, [(7, {"1": 0.0})])
        found = judge(engine, directory, replace(CFG, mode=mode)).absolute.ask(material, title="t", n=1)
        texts = {
            "p/00": "Grade <response>a</response> to Q. Score:",
            "p/01": "Grade <response>b</response> to Q. Score:",
        }
        requests = [request(directory, key, text, SCORE_LINES, n=1) for key, text in texts.items()]
        assert engine.calls == [(requests, wanted_logprobs, "t")]
        assert [j.score for j in found] == [1.0, 1.0]


def test_settings_that_the_reader_cannot_work_with_are_refused_before_anything_is_asked(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"judge\.rubric"):
        judge(Engine({}), directory, replace(CFG, rubric="{instruction}"))


@pytest.mark.parametrize("mode", ["sampled", "expected", "pairwise"])
def test_eft_teaches_the_prompt_and_the_verdict_of_absolute_scores(mode: str) -> None:
    example = EFTExample(example_id="x", instruction="Q", response="r</response>", justification=" Fine. ", score=2)
    cfg = replace(CFG, mode=mode)
    prompt = "Grade <response>r&lt;/response></response> to Q. Score:"
    assert reader(cfg).lesson(example, cfg) == (prompt, "Fine.\nScore: 2")


class YesOrNo:
    """A reader of the user's own: the judge says yes or no to an answer."""

    num_logprobs = 0
    absolute = ""

    def check(self, cfg: JudgeConfig) -> None:
        if cfg.max_score != 2:
            raise ConfigError(f"judge.max_score={cfg.max_score}: yes is worth 2")

    def questions(self, material: Material, cfg: JudgeConfig) -> dict[str, str]:
        return {f"{key}-yes-or-no": f"Is {y} right for {x}?" for key, (x, y) in material.items()}

    def stop(self, cfg: JudgeConfig) -> tuple[str, ...]:
        return ("yes", "no")

    def judgements(
        self, material: Material, completions: Mapping[str, Sequence[Completion]], cfg: JudgeConfig
    ) -> list[Judgement]:
        points = {"yes": 2.0, "no": 0.0}
        return [
            judgement(key, c.index, c.text, points.get(c.text))
            for key in material
            for c in completions[f"{key}-yes-or-no"]
        ]

    def lesson(self, example: EFTExample, cfg: JudgeConfig) -> tuple[str, str]:
        return f"Is {example.response} right for {example.instruction}?", "yes" if example.score else "no"

    def justification(self, verdict: str) -> str:
        return f"because {verdict}"


YES_OR_NO = YesOrNo()


def test_a_reader_of_the_users_own_is_found_by_its_dotted_path(directory: Path) -> None:
    engine = Engine({"Is a ": "yes", "Is b ": "no"})
    cfg = replace(CFG, mode=f"{__name__}:YES_OR_NO", num_judgements=1)
    own = judge(engine, directory, cfg)
    found = own.ask({"x": ("Q", "a"), "y": ("Q", "b"), "z": ("Q", "c")}, title="t", prefix="anchor/")
    requests = [
        request(directory, f"anchor/{key}-yes-or-no", f"Is {r} right for Q?", ("yes", "no"), n=1)
        for key, r in (("x", "a"), ("y", "b"), ("z", "c"))
    ]
    assert engine.calls == [(requests, 0, "t")]
    assert found == [judgement("x", 0, "yes", 2.0), judgement("y", 0, "no", 0.0), judgement("z", 0, "No idea.", None)]
    assert own.absolute is own
    assert own.justification("yes") == "because yes"
    with pytest.raises(ConfigError, match=r"judge\.max_score=5"):
        judge(engine, directory, replace(cfg, max_score=5))


@pytest.mark.parametrize("name", ["YesOrNo", "CFG", "judge"])
def test_what_is_not_a_reader_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"judge\.mode='{__name__}:{name}'.*not a verdict reader"):
        reader(replace(CFG, mode=f"{__name__}:{name}"))
