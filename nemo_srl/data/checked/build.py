"""Makes the files of `data/checked/` from tasks and models' answers. The same input and seed give the same files.

Every example has a true score that is known: from the damage that was done, and from what code sees in the text. Where
the two disagree, the text is not used.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from nemo_srl.data.checked import rows
from nemo_srl.data.checked.damage import Sample
from nemo_srl.data.checked.instructions import Composer, Task
from nemo_srl.data.checked.topics import topics
from nemo_srl.data.checked.truth import MAX_SCORE, CheckedInstruction, true_score
from nemo_srl.data.dedup import RougeLIndex
from nemo_srl.records import Candidate, EFTExample, IFTExample, Prompt

SPLITS = ("train", "held_out", "prompts")

MAX_ROUGE_L = 0.7
"""No instruction of a split has this ROUGE-L F1 or more with one of another split (the limit of `prompts`)."""

_NUM_INSTRUCTIONS = {"train": 2, "prompts": 2, "held_out": 1}
_NUM_VARIANTS = 3
"""Instructions that are made of a task. Those beyond the numbers above only lend their answers (`mismatched`)."""
_LEFT_OUT = ("code",)
"""Categories of the seed whose answers do not end as sentences do."""
_HELD_OUT_ANSWERS = 4
_EFT_ANSWERS = 6


@dataclass(frozen=True, kw_only=True)
class CheckedSeed:
    """The tables. `prompts[t]` are the prompts of iteration t + 1."""

    instructions: Mapping[str, Sequence[CheckedInstruction]]
    ift: Sequence[IFTExample]
    eft: Sequence[EFTExample]
    eft_eval: Sequence[EFTExample]
    prompts: Sequence[Sequence[Prompt]]


@dataclass(frozen=True, kw_only=True)
class LargeSeed:
    """More training examples of the same tasks. `instructions[r]` are the training instructions of round r + 1."""

    instructions: Sequence[Sequence[CheckedInstruction]]
    ift: Sequence[IFTExample]
    eft: Sequence[EFTExample]


def seed_tasks(ift: Iterable[IFTExample], eft: Iterable[EFTExample]) -> list[Task]:
    """The tasks of another seed with their good answers, as training tasks."""
    good: list[IFTExample | EFTExample] = [*ift, *(x for x in eft if x.score == MAX_SCORE)]
    return [
        Task(
            task_id=x.example_id, split="train", category=x.category, instruction=x.instruction, response=x.response,
            topic_words=[],
        )
        for x in good
        if x.category not in _LEFT_OUT
    ]  # fmt: skip


def build(
    tasks: Sequence[Task],
    answers: Sequence[Candidate],
    *,
    seed: int,
    num_ift: int,
    num_eft: int | None = None,
    num_iterations: int = 2,
) -> CheckedSeed:
    """All tables. `answers` are models' answers to instructions that an earlier call made. Without `num_eft`, all
    training instructions get judging examples."""
    # The seed's questions ask for things that code does not check ("in one sentence"), so only good answers are known.
    from_seed = {task.key for task in tasks if not task.topic_words}
    made = _instructions(tasks, f"{seed}/instructions")
    by_split: dict[str, list[CheckedInstruction]] = {split: [] for split in SPLITS}
    prompts: list[list[Prompt]] = [[] for _ in range(num_iterations)]
    for number, task in enumerate(tasks):
        used = made[task.key][: 1 if task.key in from_seed else _NUM_INSTRUCTIONS[task.split]]
        by_split[task.split] += used
        if task.split == "prompts":
            prompts[number % num_iterations] += [Prompt(prompt_id=x.key, text=x.instruction) for x in used]
    own = _model_samples([x for xs in by_split.values() for x in xs if x.task_id not in from_seed], answers)
    train = _pools(by_split["train"], made, own, f"{seed}/train")
    held_out = _pools(by_split["held_out"], made, {}, f"{seed}/held_out")
    eft = _eft(by_split["train"], train, random.Random(f"{seed}/eft"), num_eft)
    return CheckedSeed(
        instructions=by_split,
        ift=[_ift_example(x) for x in _drawn(by_split["train"], num_ift, random.Random(f"{seed}/ift"))],
        eft=eft,
        eft_eval=_eft_eval(by_split["held_out"], held_out, own, random.Random(f"{seed}/eft_eval")),
        prompts=prompts,
    )


def build_large(tasks: Sequence[Task], answers: Sequence[Sequence[Candidate]], *, seed: int, num_ift: int) -> LargeSeed:
    """Judging examples for all training instructions, in rounds: each gives other constraints to the same tasks.

    Round r + 1 is what `build` makes with the seed `seed + r` and models' answers `answers[r]`. Training instructions
    that are similar to a held-out instruction or a prompt of the first round are left out.
    """
    rounds = [build(tasks, a, seed=seed + r, num_ift=0) for r, a in enumerate(answers)]
    first = rounds[0].instructions
    apart_from = RougeLIndex(MAX_ROUGE_L, [x.instruction for split in ("held_out", "prompts") for x in first[split]])
    used: list[list[CheckedInstruction]] = []
    eft: dict[tuple[str, str], EFTExample] = {}
    for r, made in enumerate(rounds, start=1):
        train = [x for x in made.instructions["train"] if not apart_from.is_duplicate(x.instruction)]
        used.append([replace(x, instruction_id=_in_round(r, x.key)) for x in train])
        texts = {x.instruction for x in train}
        for example in (e for e in made.eft if e.instruction in texts):
            text = (example.instruction, example.response)
            eft.setdefault(text, replace(example, example_id=_in_round(r, example.key)))
    drawn = _drawn([x for xs in used for x in xs], num_ift, random.Random(f"{seed}/ift_large"))
    return LargeSeed(instructions=used, ift=[_ift_example(x) for x in drawn], eft=list(eft.values()))


def _in_round(number: int, key: str) -> str:
    """A name that no other round has. The first round keeps its names."""
    return key if number == 1 else f"round-{number}-{key}"


def _ift_example(x: CheckedInstruction) -> IFTExample:
    return IFTExample(example_id=x.key, instruction=x.instruction, response=x.response, category=x.category)


def _drawn(instructions: Sequence[CheckedInstruction], number: int, rng: random.Random) -> list[CheckedInstruction]:
    """So many of the instructions, in their order."""
    chosen = {x.key for x in rng.sample(list(instructions), min(number, len(instructions)))}
    return [x for x in instructions if x.key in chosen]


def _instructions(tasks: Sequence[Task], seed: str) -> dict[str, list[CheckedInstruction]]:
    """The instructions of each task. Those of a split are not similar to those of an earlier one."""
    words = topics({t.key: (t.instruction, t.response, t.topic_words) for t in tasks})
    made: dict[str, list[CheckedInstruction]] = {}
    for split in SPLITS:
        earlier = RougeLIndex(MAX_ROUGE_L, [x.instruction for xs in made.values() for x in xs])
        for task in (t for t in tasks if t.split == split):
            composer = Composer(task, words[task.key], random.Random(f"{seed}/{task.key}"))
            number = _NUM_VARIANTS if task.response else _NUM_INSTRUCTIONS[split]
            made[task.key] = composer.instructions(number, apart_from=earlier)
    return made


def _model_samples(instructions: Iterable[CheckedInstruction], answers: Iterable[Candidate]) -> dict[str, list[Sample]]:
    """Different answers of models to each instruction. The texts of instructions find them, so that answers to
    instructions that have changed are not used. An answer that was cut off after a sentence is not used either, because
    its text does not show it."""
    by_text = {x.instruction: x for x in instructions}
    found: dict[str, list[Sample]] = defaultdict(list)
    for answer in answers:
        x = by_text.get(answer.prompt)
        if x and answer.response and all(answer.response != s.text for s in found[x.key]):
            true = true_score(x, answer.response, finish_reason=answer.finish_reason)
            if true == true_score(x, answer.response):
                found[x.key].append(Sample("model", answer.response, true))
    return found


def _pools(
    instructions: Sequence[CheckedInstruction],
    made: Mapping[str, Sequence[CheckedInstruction]],
    own: Mapping[str, Sequence[Sample]],
    seed: str,
) -> dict[str, list[Sample]]:
    """The samples that can be made for each instruction, from answers of the same split and from models' answers."""
    found = {}
    for x in instructions:
        same_task = [y.response for y in made[x.task_id] if y.response != x.response]
        others = [y.response for y in instructions if y.task_id != x.task_id]
        found[x.key] = list(rows.samples(x, same_task, others, own.get(x.key, ()), random.Random(f"{seed}/{x.key}")))
    return found


def _eft(
    instructions: Sequence[CheckedInstruction],
    pools: Mapping[str, Sequence[Sample]],
    rng: random.Random,
    number: int | None,
) -> list[EFTExample]:
    """Six samples of an instruction, of as many instructions as `number` allows, or of all. Those to which a model
    answered come first, because a judge of models' answers must see such answers."""
    found: list[EFTExample] = []
    shuffled = rng.sample(list(instructions), len(instructions))
    answered_first = sorted(shuffled, key=lambda x: all(s.kind != "model" for s in pools[x.key]))
    for x in answered_first[: None if number is None else number // _EFT_ANSWERS]:
        others = [y.instruction for y in instructions if y.task_id != x.task_id]
        found += rows.examples(x, rows.lesson(x, pools[x.key], others, _EFT_ANSWERS, rng))
    return sorted(found, key=lambda example: example.key)


def _eft_eval(
    instructions: Sequence[CheckedInstruction],
    pools: Mapping[str, Sequence[Sample]],
    own: Mapping[str, Sequence[Sample]],
    rng: random.Random,
) -> list[EFTExample]:
    """Four samples of each instruction: two of models where there are so many, one with a damage that is never trained,
    and others. The instructions are in a random order, so that the first ones can stand for all."""
    chooser, found = rows.Chooser(rows.SHARES, rng), []
    for x in rng.sample(list(instructions), len(instructions)):
        first = [*own.get(x.key, [])[:2], rng.choice(list(rows.unseen_samples(x, rng)))]
        found += rows.examples(x, chooser.choose(pools[x.key], _HELD_OUT_ANSWERS, first=first))
    return found
