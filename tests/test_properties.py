"""What holds for every input: verdicts, rows of files, rendered text, journals.

`NEMO_SRL_EXAMPLES=20000 python -m pytest tests/test_properties.py` tries more inputs, and other ones each time.
"""

from __future__ import annotations

import gzip
import io
import os
import re
import tempfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_srl.artifacts import JOURNAL, Journal, read_jsonl, to_line
from nemo_srl.chat import ChatTemplate
from nemo_srl.errors import DataError
from nemo_srl.judging.form import own_words
from nemo_srl.judging.pairwise import first_share
from nemo_srl.judging.points import STATED, parse_score, stated_score, verdict_text
from nemo_srl.records import Completion, EFTExample, IFTExample
from nemo_srl.rows import read_rows
from nemo_srl.thinking import answer_of
from nemo_srl.words import normalised, tokenize, words
from tests import tiny

NUM_EXAMPLES = int(os.environ.get("NEMO_SRL_EXAMPLES", "0"))
# The tests try the same inputs every time, so that they do not fail by chance.
try_all = settings(max_examples=NUM_EXAMPLES or 150, deadline=None, derandomize=not NUM_EXAMPLES, database=None)

PIECES = [
    "Score", "score:", "Score: ", "**Score:** ", "Total score: ", "Final Score = ", "Relevance score: ", "Winner: ",
    "A", "tie", "0", "1", "4", "5", "7", "4.5", "-3", "4/5", "5/10", " out of 5", "(", ")", "[[", "]]", "<", ">",
    "\\boxed{", "}", "{", '{"score": 4}', "\n", "\n\n", "\r\n", " ", "\u00a0", "\t", ".", ":", ",", "*", "**", "#",
    "- ", "1. ", '"', "'", "\u201c", "\u201d", "\u00ab", "\u00bb", "`", "```", "~~~", "> ", "<think>", "</think>",
    "<reasoning>", "<response>", "</response>", "</answer>", "<answer>", "<|im_end|>", "</s>", "\uff14", "\uff1a",
    "the response says", "it claims", "\u2028", "\x00", "\u2026", "points", "\u0664",
]  # fmt: skip
KEYS = st.sampled_from(["Score: ", "**Score:** ", "Total score: ", "Winner: ", "- Score:\n"])
VALUES = st.sampled_from(["0", "3", "4", "6", "11", "4.5", "4/5", "5/10", "4-5", "[[4]]", "A", "\uff14", "04", "12345"])
PARTS = st.lists(st.one_of(st.sampled_from(PIECES), st.text(max_size=5)), max_size=25).map("".join)
TEXTS = st.one_of(st.text(max_size=60), PARTS, st.builds("{}\n{}{}{}".format, PARTS, KEYS, VALUES, PARTS | st.just("")))
PLAIN = st.lists(st.sampled_from(["The answer is clear.", "It is short.", "Good.", "Much is missing!"]), max_size=3)


def completion(text: str, *, index: int = 0, finish_reason: str = "stop") -> Completion:
    return Completion(request_key="r", index=index, text=text, num_tokens=1, finish_reason=finish_reason)  # type: ignore[arg-type]


@given(TEXTS, st.sampled_from([1, 5, 10, 9999]), st.sampled_from(["stop", "length"]))
@try_all
def test_any_verdict_gives_no_score_or_one_in_range_that_it_contains(text: str, most: int, reason: str) -> None:
    score = stated_score(completion(text, finish_reason=reason), most).value
    assert score is None or 0 <= score <= most
    assert len(own_words(text)) == len(text)
    if score is not None:
        # The number stands in the text, perhaps in full-width digits.
        numbers = re.findall(r"[0-9]+(?:\.[0-9]+)?", text.translate({0xFF10 + i: 0x30 + i for i in range(10)}))
        assert score in map(float, numbers)
    assert first_share(completion(text)) in (None, 0, 0.5, 1)
    assert isinstance(STATED.justification(text), str)


@given(PLAIN, st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7)), max_size=4), PLAIN, st.integers(0, 5))
@try_all
def test_what_others_say_is_never_the_score(
    before: list[str], others: list[tuple[int, int]], after: list[str], own: int
) -> None:
    ways = [
        'The response ends with "Score: {}".', "> Score: {}", "```\nScore: {}\n```", "Relevance score: {}",
        "<think>Score: {}\nScore: {}</think>", "<response>\nScore: {}\n</response>",
        "The response claims Score: {}.", "It says: Score: {}",
    ]  # fmt: skip
    said = [ways[way].replace("{}", str(score)) for score, way in others]
    verdict = "\n".join([*before, *said, *after])
    assert parse_score(verdict, max_score=5) is None
    assert parse_score(f"{verdict}\nScore: {own}", max_score=5) == own
    assert parse_score(f"Score: {own}\n{verdict}".rstrip(), max_score=5) == own
    assert parse_score(verdict_text(verdict, own), max_score=5) == own


@pytest.mark.parametrize(
    "piece", [*PIECES, "Score: 4 ", "Score: ((", "<a ", '"Score: ', "1. 1. ", "Total ", "\nScore:\n"]
)
def test_a_long_verdict_is_read(piece: str) -> None:
    # Where the time grew with the square of the length, this would take hours.
    score = parse_score(piece * 100_000, max_score=5)
    assert score is None or 0 <= score <= 5


NAMES = ("rows.jsonl", "rows.json", "rows", "rows.jsonl.gz", "rows.parquet")


def parquet() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"example_id": ["a", "b"], "instruction": ["x", "y"], "response": ["1", None]}), file)
    return file.getvalue()


LINES = b"".join(to_line(IFTExample(example_id=x, instruction="Say \u00e9.", response="r")).encode() for x in "abc")
FILES = st.sampled_from([
    LINES, b"\xef\xbb\xbf" + LINES, LINES.decode().encode("utf-16"), LINES.decode().encode("latin-1"),
    gzip.compress(LINES), parquet(), b"[" + LINES.replace(b"\n", b",")[:-1] + b"]", b'\n[{"a": NaN}]', b'{"a": 1e999}',
    b'{"a": "\\ud83d"}', b"[" * 5000, b'{"a": ' + b"9" * 6000 + b"}", b"version https://git-lfs.github.com/spec/v1\n",
    b"PAR1", b"\x1f\x8b",
])  # fmt: skip


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A file with some of its bytes changed, left out or put in."""
    data = draw(st.one_of(FILES, st.binary(max_size=80)))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=3)) + data[at + draw(st.integers(0, 4)) :]
    return data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data


@given(damaged(), st.sampled_from(NAMES), st.sampled_from([None, IFTExample, EFTExample]))
@try_all
def test_any_file_gives_rows_or_an_error_that_names_it(data: bytes, name: str, record: type[IFTExample] | None) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / name
        path.write_bytes(data)
        message, rows = "", []
        try:
            rows = read_jsonl(path, record) if record else list(read_rows(path))
        except DataError as e:
            message = str(e)
        assert bool(rows) != (str(path) in message)


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    return ChatTemplate(tiny.make_model(tmp_path_factory.mktemp("properties") / "model", ["A text."], vocab_size=300))


CONTROL = "|".join(map(re.escape, tiny.SPECIAL_TOKENS))
MARKUP = [*tiny.SPECIAL_TOKENS, "<|", "|>", "im_end", "<", " ", "{{ x }}", "{% if", "\n"]
UNTRUSTED = st.lists(st.one_of(st.sampled_from(MARKUP), st.text(max_size=8)), max_size=12).map("".join)


@given(text=UNTRUSTED, earlier=st.lists(st.tuples(UNTRUSTED, UNTRUSTED), max_size=2))
@try_all
def test_untrusted_text_brings_no_control_token(chat: ChatTemplate, text: str, earlier: list[tuple[str, str]]) -> None:
    control = {chat.encode(token)[0] for token in tiny.SPECIAL_TOKENS}
    written = Counter(i for i in chat.encode(chat.render(text, after=earlier)) if i in control)
    alone = Counter(i for i in chat.encode(chat.render("x", after=[("x", "x")] * len(earlier))) if i in control)
    assert written == alone
    assert not control & set(chat.encode(chat.response_text(text)))
    assert not control & set(chat.encode_plain(text))
    if not re.search(CONTROL, text):
        assert chat.response_text(text) == text


@given(st.lists(st.lists(TEXTS, max_size=3), max_size=4), st.data())
@try_all
def test_a_journal_that_was_cut_anywhere_has_the_first_of_its_completions(
    groups: list[list[str]], data: st.DataObject
) -> None:
    numbers = iter(range(99))
    made = [tuple(completion(text, index=next(numbers)) for text in group) for group in groups]
    everything = [c for group in made for c in group]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        journal = Journal(directory)
        for group in made:
            journal.append(group)
        journal.close()
        whole = (directory / JOURNAL).read_bytes()
        cut = data.draw(st.integers(0, len(whole)))
        (directory / JOURNAL).write_bytes(whole[:cut])
        opened = Journal(directory)
        kept = list(opened.completions.values())
        assert kept == everything[: len(kept)]
        assert len(kept) == whole[:cut].count(b"\n")
        opened.append(tuple(everything[len(kept) :]))
        opened.close()
        assert (directory / JOURNAL).read_bytes() == whole


@given(TEXTS, st.sampled_from([(), ("<think>", "</think>")]))
@try_all
def test_an_answer_is_the_end_of_its_text_and_has_no_tag(text: str, tags: tuple[str, ...]) -> None:
    answer = answer_of(text, tags)
    assert text.endswith(answer)
    assert not any(tag in answer for tag in tags)
    assert answer_of(answer, tags) == answer


@given(st.text(max_size=40))
@try_all
def test_words_of_any_text_do_not_depend_on_how_it_is_written(text: str) -> None:
    assert tokenize(normalised(text)) == tokenize(text)
    assert normalised(normalised(text)) == normalised(text)
    assert all(any(map(str.isalnum, token)) for token in tokenize(text))
    assert "".join(words(text)).replace(" ", "") in "".join(text.split()) or len(words(text)) > 1
