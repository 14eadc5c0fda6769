"""Generated instructions: which are kept, and by which reason the others are counted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nemo_srl.artifacts import BaseModel, SourceFile, Table, to_line
from nemo_srl.config import Config, PromptsConfig
from nemo_srl.data.prompt_filter import PromptFilter
from nemo_srl.errors import ConfigError, DataError
from nemo_srl.records import Completion, EFTExample, IFTExample, Prompt
from nemo_srl.stages import prompts
from tests import tiny
from tests.loopback import Loopback, ids_of
from tests.support import made, server

ROOT = Path(__file__).resolve().parent.parent
SEED = "Write a short poem about the sea in autumn."
HELD_OUT = "Explain why the sky is blue to a curious child."


def new_filter(**changes: Any) -> PromptFilter:
    return PromptFilter(replace(PromptsConfig(), **changes), seed=[SEED], held_out=[HELD_OUT])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Name three fruits that grow on trees.", None),
        ("Compute 12 * (7 + 3) - 4 / 2.", None),
        ('Translate "Guten Morgen" into English.', None),
        ("Summarize climate change briefly.", None),
        ("Why is my sourdough so dense, and what can I do about it?", None),
        ("Hello there.", "length"),
        (" ".join(["Say it again"] * 60) + ".", "length"),
        ("Draw a map of the town.", "blocked_word"),
        ("name three fruits that grow on trees.", "not_an_instruction"),
        ("Name three fruits that grow on", "not_an_instruction"),
        ("Name three\x07 fruits that grow.", "not_an_instruction"),
        ("Nenne drei Früchte, welche auf Bäumen wachsen können und schmecken.", "language"),
        ("Назови три фрукта.", "language"),
        ("Name the 三个水果 that 长在树上的 fruit.", "language"),
        ("The cat the cat the cat the cat the cat the cat.", "garbage"),
        ("Say noooooooo to the offer.", "garbage"),
        ("Compute 1 2 3 4 5 6 7 8 9 10 11 12 13 14.", "garbage"),
        (f"Open http://{'a' * 40}.example and read.", "garbage"),
        (HELD_OUT, "contaminated"),
        ("Explain why the sky is blue to a small child.", "contaminated"),
        (SEED, "duplicate"),
        ("Write a short poem about the sea, in autumn!", "duplicate"),
        ("Write a short poem about the sea in spring.", "similar"),
    ],
)
def test_each_text_has_its_reason(text: str, reason: str | None) -> None:
    assert new_filter().reason_to_drop(text) == reason


def test_what_was_kept_is_not_kept_again_and_other_languages_can_be_asked_for() -> None:
    keep = new_filter(language="any")
    assert keep.reason_to_drop("Nenne drei Früchte, welche auf Bäumen wachsen.") is None
    assert keep.reason_to_drop("Nenne drei Früchte, welche auf Bäumen wachsen.") == "duplicate"
    with pytest.raises(ConfigError, match=r"prompts\.language='fr'"):
        PromptsConfig(language="fr")


@pytest.mark.parametrize("name", ["ift", "eft", "eft_eval"])
def test_no_instruction_of_the_seed_counts_as_garbage_or_foreign(name: str) -> None:
    lines = (ROOT / "data" / "seed" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    texts = {json.loads(line)["instruction"] for line in lines}
    empty = PromptFilter(replace(PromptsConfig(), blocked_words=[], min_words=1, max_words=1000), seed=[], held_out=[])
    found = {t: empty.reason_to_drop(t) for t in texts}
    assert [t for t, reason in found.items() if reason in ("garbage", "language")] == []


def run_stage(
    tmp_path: Path, replies: list[str], num_prompts: int, *earlier: Table[Prompt]
) -> tuple[list[str], dict[str, float]]:
    def reply(body: dict[str, Any], index: int) -> tuple[list[int], str]:
        return ids_of(replies.pop(0) if replies else "no"), "stop"

    ift, held_out = tmp_path / "ift.jsonl", tmp_path / "eft_eval.jsonl"
    ift.write_text(to_line(IFTExample(example_id="a", instruction=SEED, response="r")))
    held_out.write_text(
        to_line(EFTExample(example_id="a", instruction=HELD_OUT, response="r", justification="j", score=1))
    )
    policy = BaseModel(tiny.make_model(tmp_path / "model", [SEED], vocab_size=300), "digest")
    with Loopback(reply).running() as url:
        engine = server(url, max_concurrency=1)
        cfg = Config(run_dir=str(tmp_path), prompts=PromptsConfig(num_prompts=num_prompts, max_rounds=3, engine=engine))
        inputs = {"ift": SourceFile(ift, IFTExample), "eft_eval": SourceFile(held_out, EFTExample), "policy": policy}
        output, metrics = made(prompts.STAGE, cfg, tmp_path / "prompts", iteration=2, **inputs, earlier=earlier)
    return [p.text for p in output.read()], dict(metrics)


def test_rounds_go_on_until_enough_survive_and_every_rejection_is_counted(tmp_path: Path) -> None:
    earlier = Table(tmp_path / "earlier", {}, Prompt)
    earlier.write([Prompt(prompt_id="iter1-000000", text="List five rivers in South America.")])
    replies = [
        f" {SEED}\n3. {HELD_OUT}\n4. List five rivers in South America.",
        "Name three fruits that grow on trees.\n3. too",
        "Describe your favourite day of the week.",
    ]
    texts, metrics = run_stage(tmp_path, replies, 2, earlier)
    assert texts == ["Name three fruits that grow on trees.", "Describe your favourite day of the week."]
    assert metrics.pop("distinct_2") == 1
    assert 0.3 < metrics.pop("novelty") < 1
    assert metrics == {"num_calls": 4, "num_kept": 2, "num_duplicate": 2, "num_contaminated": 1, "num_length": 2}


def test_a_shortfall_names_what_dropped_most(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"only 0 new instructions passed the filters.*'length': 3"):
        run_stage(tmp_path, [], 1)


@pytest.mark.parametrize(
    ("text", "tasks"),
    [
        (" Name a fish.\n10. Name a bird.\n11. Name", ["Name a fish.", "Name a bird.", "Name"]),
        (" Name a fish.\n\n 10) Name a bird.", ["Name a fish.", "Name a bird."]),
        ("9. Name a fish.\n10. Name a bird.", ["Name a fish.", "Name a bird."]),
        ("Sure! Here are some more tasks:\n\n9. Name a fish.\n10. Name a bird.", ["Name a fish.", "Name a bird."]),
        ("Of course!\n**9.** Name a fish.\n**10.** Name a bird.\n\nLet me know!", ["Name a fish.", "Name a bird."]),
        ("**9. Name a fish.**\n**10. Name a bird.**\nI hope this helps!", ["Name a fish.", "Name a bird."]),
        ("Here you go:\n1. Name a fish.\n2. Name a bird.", ["Name a fish.", "Name a bird."]),
        ("- 9. Name a fish.\n- 10. Name **three** birds.", ["Name a fish.", "Name **three** birds."]),
        ("### Task 9: Name a fish.\nTask 10: Name a bird.", ["Name a fish.", "Name a bird."]),
        ("Name a fish.\nName a bird.", ["Name a fish.", "Name a bird."]),
        ("10. \n", []),
        ("", []),
    ],
)
def test_tasks_are_the_numbered_lines_and_what_continues_the_list(text: str, tasks: list[str]) -> None:
    completion = Completion(request_key="r", index=0, text=text, num_tokens=9, finish_reason="stop")
    assert prompts.tasks_in(completion, first_number=9) == tasks


def test_a_task_that_was_cut_off_is_left_out() -> None:
    cut = Completion(request_key="r", index=0, text=" Name a fish.\n10. Nam", num_tokens=9, finish_reason="length")
    assert prompts.tasks_in(cut, first_number=9) == ["Name a fish."]
    assert prompts.tasks_in(replace(cut, text=" Name a fi"), first_number=9) == ["Name a fi"], "the filters judge it"


def test_rounds_are_as_large_as_the_missing_prompts_need() -> None:
    def size(num_prompts: int, **so_far: int) -> int:
        return prompts.num_calls_of_round(num_prompts, **so_far)

    assert size(5000, num_kept=0, num_calls=0) == 625
    assert size(5000, num_kept=2500, num_calls=625) == 625, "four tasks a call"
    assert size(24, num_kept=0, num_calls=0) == 8
    assert size(24, num_kept=4, num_calls=8) == 40, "half a task a call, and at most twice the missing ones"
    assert size(24, num_kept=1, num_calls=8) == 46
    assert size(24, num_kept=0, num_calls=8) == 24
    assert size(3, num_kept=0, num_calls=0) == 3
