# ruff: noqa: RUF001 -- letters of other scripts look like Latin ones
"""Instructions in many scripts: they are kept, and they are found again in every way of writing them."""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import replace

import pytest

from nemo_srl.config import PromptsConfig
from nemo_srl.data.dedup import RougeLIndex
from nemo_srl.data.diversity import distinct_n, novelty
from nemo_srl.data.oasst import Answer, Tree, _distinct
from nemo_srl.data.prompt_filter import PromptFilter
from nemo_srl.judging.surface import features
from nemo_srl.records import Completion
from nemo_srl.stages.prompts import tasks_in
from nemo_srl.words import normalised, tokenize, words

# By script: an instruction, one that differs a little, and another one.
INSTRUCTIONS = {
    "Chinese": ("请给一位新同事写一封欢迎信。", "请给一位新同学写一封欢迎信。", "怎样才能把自行车的轮胎补好？"),
    "Japanese": (
        "新しい同僚を歓迎する手紙を書いてください。",
        "新しい同僚を歓迎するメモを書いてください。",
        "自転車のタイヤを直す方法を説明してください。",
    ),
    "Thai": (
        "เขียนจดหมายต้อนรับเพื่อนร่วมงานคนใหม่",
        "เขียนจดหมายต้อนรับเพื่อนร่วมชั้นคนใหม่",
        "อธิบายวิธีซ่อมยางจักรยานที่รั่ว",
    ),
    "Korean": (
        "새로 온 동료에게 보낼 짧은 환영 편지를 써 주세요.",
        "새로 온 이웃에게 보낼 짧은 환영 편지를 써 주세요.",
        "구멍 난 자전거 타이어를 고치는 방법은 무엇인가요?",
    ),
    "Arabic": (
        "اكتب رسالة قصيرة ترحب فيها بزميل جديد في المكتب.",
        "اكتب رسالة قصيرة ترحب فيها بزميل جديد في الفريق.",
        "كيف يمكنني إصلاح إطار دراجة مثقوب؟",
    ),
    "Devanagari": (
        "नए सहकर्मी के स्वागत में एक छोटा पत्र लिखिए।",
        "नए पड़ोसी के स्वागत में एक छोटा पत्र लिखिए।",
        "साइकिल का पंक्चर टायर कैसे ठीक करें?",
    ),
    "Cyrillic": (
        "Напишите короткое письмо с приветствием новому коллеге.",
        "Напишите короткое письмо с приветствием новому соседу.",
        "Как починить проколотую шину велосипеда?",
    ),
    "Greek": (
        "Γράψε ένα σύντομο γράμμα για να καλωσορίσεις έναν νέο συνάδελφο.",
        "Γράψε ένα σύντομο γράμμα για να καλωσορίσεις έναν νέο γείτονα.",
        "Πώς φτιάχνω ένα τρύπιο λάστιχο ποδηλάτου;",
    ),
    "Hebrew": (
        "כתוב מכתב קצר שמקבל בברכה עמית חדש במשרד.",
        "כתוב מכתב קצר שמקבל בברכה עמית חדש בצוות.",
        "איך מתקנים תקר בגלגל של אופניים?",
    ),
    "Khmer": (
        "សូមសរសេរសំបុត្រខ្លីមួយដើម្បីស្វាគមន៍មិត្តរួមការងារថ្មី។",
        "សូមសរសេរសំបុត្រខ្លីមួយដើម្បីស្វាគមន៍មិត្តរួមថ្នាក់ថ្មី។",
        "តើត្រូវជួសជុលសំបកកង់ដែលបែកដោយរបៀបណា?",
    ),
}
THREE = pytest.mark.parametrize(("first", "near", "other"), INSTRUCTIONS.values(), ids=list(INSTRUCTIONS))


def new_filter(*, held_out: str = "", seed: str = "", **changes: object) -> PromptFilter:
    cfg = replace(PromptsConfig(language="any"), **changes)  # type: ignore[arg-type]
    return PromptFilter(cfg, seed=[seed], held_out=[held_out])


@THREE
def test_an_instruction_in_any_script_is_kept_once(first: str, near: str, other: str) -> None:
    keep = new_filter()
    assert [keep.reason_to_drop(text) for text in (first, other)] == [None, None]
    assert [keep.reason_to_drop(text) for text in (first, other, near)] == ["duplicate", "duplicate", "similar"]
    assert [new_filter(seed=first).reason_to_drop(text) for text in (first, near)] == ["duplicate", "similar"]


@THREE
def test_a_held_out_instruction_is_found_in_any_script(first: str, near: str, other: str) -> None:
    keep = new_filter(held_out=first)
    assert [keep.reason_to_drop(text) for text in (first, near, other)] == ["contaminated", "contaminated", None]


@THREE
def test_another_way_of_writing_is_the_same_text(first: str, near: str, other: str) -> None:
    ways = [
        unicodedata.normalize("NFD", first), unicodedata.normalize("NFKD", first), first.upper(), first.lower(),
        f" {first} ", first.replace(" ", "\u00a0"), first.replace(" ", "  "), f"\u200f{first[:3]}\u200b{first[3:]}",
    ]  # fmt: skip
    index = RougeLIndex(1.0, [first])
    assert [index.most_similar(way) for way in ways] == [(1.0, 0)] * len(ways)
    assert index.most_similar(near) is None
    assert len({normalised(way) for way in ways}) == 1
    answer, counts = Answer(text="a", rank=0, quality=0), Counter[str]()
    trees = [Tree(tree_id=str(i), prompt=text, answers=[answer]) for i, text in enumerate([first, *ways, other])]
    assert [t.prompt for t in _distinct(trees, counts)] == [first, other]
    assert counts.total() == len(ways)


@THREE
def test_diversity_is_measured_in_any_script(first: str, near: str, other: str) -> None:
    assert novelty([first], [first]) == 0
    small, large = novelty([near], [first]), novelty([other], [first])
    assert small is not None
    assert large is not None
    assert 0 < small < 0.35 < 0.5 < large
    once, twice = distinct_n([first], 2), distinct_n([first, first], 2)
    assert once is not None
    assert once > 0.9
    assert twice == once / 2


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("春天", "length"),
        ("写诗。", "length"),
        ("请写一首诗" * 80 + "。", "length"),
        ("春天的诗春天的诗春天的诗春天的诗春天的诗春天的诗。", "garbage"),
        ("请把好好好好好好的故事讲完。", "garbage"),
        ("Ｗｒｉｔｅ ａ ｐｏｅｍ ａｂｏｕｔ ｔｈｅ ｓｅａ．", None),
        ("напишите письмо новому коллеге.", "not_an_instruction"),
        ("Напишите письмо новому", "not_an_instruction"),
        ("请画一张城市的地图。", "blocked_word"),
        ("أكمل الجملة «السماء زرقاء لأن».", None),
        ("می‌خواهم نامه‌ای کوتاه بنویسم؛ کمک کن.", None),
        ("¿Cómo se repara una rueda pinchada?", None),
        ("「春」という題で短い詩を書いてください。", None),
    ],
)
def test_each_text_has_its_reason(text: str, reason: str | None) -> None:
    assert new_filter(blocked_words=["地图", ""]).reason_to_drop(text) == reason


def test_tokens_and_words_of_some_texts() -> None:
    assert tokenize("Ｎaïve Straße, it's 12.5%") == ["naïve", "strasse", "it", "s", "12", "5"]
    assert tokenize("写a1诗，「春」") == ["写", "a1", "诗", "春"]
    assert tokenize("हिन्दी में।") == ["हिन्दी", "में"]
    assert tokenize("ดูที่") == ["ดู", "ที่"]
    assert words("请写 a poem — 诗。") == ["请写", "a", "poem", "—", "诗"]


def test_the_words_of_an_answer_without_spaces_are_counted() -> None:
    assert features("天空因为散射而呈现蓝色。")[0] == 6
    assert features("The sky scatters blue light.")[0] == 5


def test_tasks_of_a_list_in_chinese_are_found() -> None:
    text = "1、写一首诗。\n（2）讲一个故事。\n３．介绍北京。\n**4：** 解释重力。"
    completion = Completion(request_key="r", index=0, text=text, num_tokens=9, finish_reason="stop")
    assert tasks_in(completion, first_number=1) == ["写一首诗。", "讲一个故事。", "介绍北京。", "解释重力。"]


@pytest.mark.parametrize(
    "text",
    [
        "Sure, here are more:\n- Write a poem.\n- Explain gravity.",
        "9 - Write a poem.\n10 \u2013 Explain gravity.\nI hope this helps!",
        "Here you are!\n[9] Write a poem.\n(10) Explain gravity.",
    ],
)
def test_tasks_of_other_lists_are_found(text: str) -> None:
    completion = Completion(request_key="r", index=0, text=text, num_tokens=9, finish_reason="stop")
    assert tasks_in(completion, first_number=9) == ["Write a poem.", "Explain gravity."]
