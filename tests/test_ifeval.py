"""IFEval's prompts in, the harness's real checks on answers, and nothing checked at random."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_srl.artifacts import Table, read_jsonl
from nemo_srl.config import Config
from nemo_srl.data.checked import damage, ifeval
from nemo_srl.data.checked.truth import CheckedInstruction
from nemo_srl.data.verifiable import Followed, Verifier, read_prompts
from nemo_srl.errors import ConfigError, DataError
from nemo_srl.records import Candidate, VerifiablePrompt
from nemo_srl.stages import ifeval as stage
from tests.punkt import make_punkt_tab
from tests.support import ROOT, made

WORDS = "length_constraints:number_words"
QUOTED = "startend:quotation"
SENTENCES = "length_constraints:number_sentences"


@pytest.fixture(scope="module")
def verifier(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Verifier]:
    import nltk

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nltk.data, "path", [make_punkt_tab(tmp_path_factory.mktemp("nltk"))])
        yield Verifier()


def row(**changes: Any) -> dict[str, Any]:
    return {"key": 1, "prompt": "Write.", "instruction_id_list": [QUOTED], "kwargs": [{}], **changes}


def prompt(name: str, **arguments: Any) -> VerifiablePrompt:
    return VerifiablePrompt(prompt_id="p", text="Write.", instruction_ids=[name], arguments=[arguments])


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_both_published_forms_are_read_alike(tmp_path: Path, verifier: Verifier) -> None:
    arguments = {"num_words": 300, "relation": "at least"}
    plain = row(instruction_id_list=[WORDS], kwargs=[arguments])
    hub = row(key=2, instruction_id_list=[WORDS], kwargs=[{"keywords": None, "num_bullets": None, **arguments}])
    a, b = read_prompts(write(tmp_path / "p.jsonl", plain, hub), verifier)
    assert (a.prompt_id, b.prompt_id) == ("ifeval-1", "ifeval-2")
    assert a.instruction_ids == b.instruction_ids == [WORDS]
    assert a.arguments == b.arguments == [arguments]


def test_its_checks_agree_with_those_of_the_checked_data(verifier: Verifier) -> None:
    """On good answers to the held-out instructions, and on answers that break one constraint."""
    data, rng, num_broken = ROOT / "data/checked", random.Random(0), 0
    prompts = {p.text: p for p in read_prompts(data / "ifeval_held_out.jsonl", verifier)}
    for x in read_jsonl(data / "instructions_held_out.jsonl", CheckedInstruction):
        if (p := prompts.get(x.instruction)) is None:
            assert {c.kind for c in x.checks} <= {"items", "starts_with", "ends_with", "question", "capital_word"}
            continue
        assert all(verifier.followed(p, x.response).strict), (x.instruction, x.response)
        known = ifeval.AS_IFEVAL
        for constraint in dict.fromkeys(x.checks):
            bad = damage.broken(x, x.response, constraint, rng)
            if constraint.kind in known and bad is not None:
                num_broken += 1
                assert not all(verifier.followed(p, bad).strict), (x.instruction, bad)
    assert len(prompts) >= 50
    assert num_broken >= 50


@pytest.mark.parametrize(
    ("second", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", r"expected a JSON object \(IFEval's prompts\), found list"),
        (row(prompt=None), r"expected an object with `key`, `prompt` \(str\)"),
        (row(prompt=" "), "expected a text in `prompt`"),
        (row(kwargs=["x"]), "objects in `kwargs`"),
        (row(), "an earlier prompt has the same key, 'ifeval-1'"),
        (row(key=2, kwargs=[{}, {}]), r"1 instruction\(s\) .* and 2 in `kwargs`"),
        (row(key=2, kwargs=[], instruction_id_list=[]), "give one or more"),
        (
            row(key=2, instruction_id_list=["startend:quotations"]),
            "'startend:quotations'; known are startend:quotation",
        ),
        (row(key=2, instruction_id_list=[WORDS]), r"arguments \{\} of .*takes \['num_words', 'relation'\]"),
        (row(key=2, kwargs=[{"num_words": 3}]), "its check takes none"),
        (
            row(key=2, instruction_id_list=[WORDS], kwargs=[{"num_words": 0, "relation": "at least"}]),
            "none of them empty or 0",
        ),
        (
            row(key=2, instruction_id_list=[WORDS], kwargs=[{"num_words": 9, "relation": "around"}]),
            "cannot be checked with the arguments .*around",
        ),
        (
            row(key=2, instruction_id_list=[WORDS], kwargs=[{"num_words": "many", "relation": "at least"}]),
            "cannot be checked with the arguments .*many",
        ),
    ],
)
def test_a_row_that_would_be_checked_at_random_or_not_at_all_is_refused_with_its_line(
    tmp_path: Path, verifier: Verifier, second: Any, reason: str
) -> None:
    path = write(tmp_path / "p.jsonl", row())
    text = second if isinstance(second, str) else json.dumps(second)
    path.write_text(path.read_text() + "\n" + text)
    with pytest.raises(DataError, match=rf"p\.jsonl, line 3: .*{reason}"):
        read_prompts(path, verifier)


def test_no_file_and_an_empty_one_are_refused(tmp_path: Path, verifier: Verifier) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_prompts(tmp_path / "x", verifier)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="empty"):
        read_prompts(tmp_path / "empty.jsonl", verifier)


@pytest.mark.parametrize(
    ("asked", "response", "strict", "loose"),
    [
        (prompt(WORDS, num_words=3, relation="at least"), "One two three.", True, True),
        (prompt(WORDS, num_words=3, relation="at least"), "One two.", False, False),
        (prompt("punctuation:no_comma"), "One, two.", False, False),
        (prompt(QUOTED), '"Yes."', True, True),
        (prompt(QUOTED), 'Sure:\n"Yes."', False, True),
        (prompt(QUOTED), "", False, False),
        (prompt(SENTENCES, num_sentences=3, relation="less than"), "Many words. Other words.", True, True),
        (prompt(SENTENCES, num_sentences=2, relation="less than"), "Many words. Other words.", False, False),
        (prompt("detectable_format:json_format"), '```json\n{"a": 1}\n```', True, True),
    ],
)
def test_the_harness_checks_an_answer_strictly_and_loosely(
    verifier: Verifier, asked: VerifiablePrompt, response: str, strict: bool, loose: bool
) -> None:
    found = verifier.followed(asked, response)
    assert (found.strict, found.loose, found.num_errors) == ([strict], [loose], 0)


def test_a_check_that_breaks_on_an_answer_counts_as_not_followed_and_spares_the_others(verifier: Verifier) -> None:
    both = VerifiablePrompt(
        prompt_id="p",
        text="Write.",
        instruction_ids=["detectable_format:json_format", "punctuation:no_comma"],
        arguments=[{}, {}],
    )
    assert verifier.followed(both, "[" * 100_000) == Followed(strict=[False, True], loose=[False, True], num_errors=1)


def test_a_doubtful_language_is_detected_alike_every_time(verifier: Verifier) -> None:
    slovene = prompt("language:response_language", language="sl")
    assert len({verifier.followed(slovene, "ja no si").strict[0] for _ in range(40)}) == 1


def test_the_stage_gives_the_four_figures_over_prompts_and_over_instructions(
    tmp_path: Path, verifier: Verifier
) -> None:
    asked = [
        VerifiablePrompt(prompt_id="a", text="?", instruction_ids=[QUOTED, "punctuation:no_comma"], arguments=[{}, {}]),
        VerifiablePrompt(prompt_id="b", text="?", instruction_ids=["punctuation:no_comma"], arguments=[{}]),
    ]
    texts = {"a": 'Well,\n"Yes"', "b": "Yes"}
    prompts, answers = Table(tmp_path / "p", {}, VerifiablePrompt), Table(tmp_path / "a", {}, Candidate)
    prompts.write(asked)
    answers.write(
        [
            Candidate(prompt_id=k, sample_index=0, prompt="?", response=v, num_tokens=1, finish_reason="stop")
            for k, v in texts.items()
        ]
    )
    cfg = Config(run_dir="x")
    output, metrics = made(stage.STAGE, cfg, tmp_path / "out", prompts=prompts, answers=answers)
    found = {m.name: (m.value, m.n) for m in output.read()}
    # Of "a", nothing is followed strictly; without its first line, both are.
    assert found == {
        "ifeval_prompt_strict": (0.5, 2),
        "ifeval_instruction_strict": (pytest.approx(1 / 3), 3),
        "ifeval_prompt_loose": (1.0, 2),
        "ifeval_instruction_loose": (1.0, 3),
    }
    assert metrics["num_check_errors"] == 0
    lost = Candidate(
        prompt_id="a", sample_index=0, prompt="?", response="", num_tokens=0, finish_reason="refused", reason="filtered"
    )
    answers.write([lost, *(c for c in answers.read() if c.prompt_id == "b")])
    output, _ = made(stage.STAGE, cfg, tmp_path / "b", prompts=prompts, answers=answers)
    found = {m.name: (m.value, m.n) for m in output.read()}
    assert found["ifeval_prompt_strict"] == (1.0, 1), "a prompt without an answer is missing, and no failure"
    assert found["ifeval_unanswered_rate"] == (0.5, 2)
    prompts.write([*asked, prompt(QUOTED)])
    with pytest.raises(DataError, match="1 of 3 prompts have no answer, the first is 'p'"):
        made(stage.STAGE, cfg, tmp_path / "out", prompts=prompts, answers=answers)


def test_what_is_not_installed_is_said_before_anything_is_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    import nltk

    with monkeypatch.context() as patch:
        patch.setattr(nltk.data, "path", [])
        with pytest.raises(ConfigError, match=r"`punkt_tab`, which is not there; run `python -m nltk\.downloader"):
            Verifier()
    monkeypatch.setitem(sys.modules, "langdetect", None)
    with pytest.raises(ConfigError, match=r'langdetect is not installed; pip install "nemo-srl\[ifeval\]"'):
        Verifier()
