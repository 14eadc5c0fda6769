"""A toy language whose true scores code can compute.

An instruction is such as `4 animal tiny huge !`. It asks for four different animals, of which the first is tiny and the
last is huge, and for a mark at the end. `bee cat pig elk !` is a perfect response. The oracle (`oracle_verdict`) gives
one point for each of five criteria, like the rubric of the paper, so every response has a true score from 0 to 5.

The model judges in the same form as every judge of nemo_srl: first its reasons, then the score. The reasons look like
`4 y animal y tiny y huge y ! y`. `Score: 5` follows. The model learns to answer and to judge from the files that
`write_seed` writes. These hold demonstrations, each of which meets each criterion with probability
`DEMONSTRATION_QUALITY`, and answers with the oracle's verdicts.

Only the verdicts on seed answers and the ranks of some answers come from the oracle and are trained on. In the paper,
people's judgements do the same. New prompts come without any score.

Limits: the vocabulary has about a hundred words, and a model of 0.35M parameters is enough for it. Nothing here says
anything about real language.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_srl.artifacts import to_line, write_atomic
from nemo_srl.records import EFTExample, IFTExample, Prompt, RankedAnswers

SIZES = ("tiny", "small", "large", "huge")
WORDS = {
    category: dict(zip(SIZES, (words.split() for words in by_size.split(",")), strict=True))
    for category, by_size in {
        "animal": "ant bee, cat owl, pig ram, cow elk",
        "fruit": "berry currant, plum kiwi, pear mango, melon papaya",
        "tool": "pin nail, file awl, saw axe, drill crane",
        "vehicle": "kart bike, car van, bus truck, train ship",
        "building": "hut tent, shed barn, house villa, tower castle",
        "plant": "moss fern, rose lily, bush vine, oak pine",
        "clothing": "ring sock, hat glove, shirt skirt, coat gown",
        "furniture": "stool lamp, chair shelf, table desk, bed sofa",
    }.items()
}
"""Two words of each category and size."""
CATEGORY_OF = {w: category for category, sizes in WORDS.items() for words in sizes.values() for w in words}
SIZE_OF = {w: size for sizes in WORDS.values() for size, words in sizes.items() for w in words}
MARKS = (".", "!", "?", ";")
LENGTHS = (3, 4, 5, 6)
NUM_CRITERIA = 5
DEMONSTRATION_QUALITY = 0.6
ANSWER_QUALITIES = (0.3, 0.6, 0.9)
"""Judged and ranked answers have mixed qualities, so that every score occurs."""

CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% else %}"
    "<|assistant|>{{ m['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL_TOKENS = ("<|unknown|>", "<|user|>", "<|assistant|>", "<|end|>")
VOCABULARY = (
    *SPECIAL_TOKENS, "judge", "answer", "Score:", "y", "n", "none", "twice",
    *map(str, range(10)), *MARKS, *SIZES, *WORDS, *CATEGORY_OF, "compare", "Winner:", "A", "B", "tie",
)  # fmt: skip


@dataclass(frozen=True)
class Instruction:
    """What is asked for. `str` gives the text that the model sees, and `parse` reads that text."""

    num_words: int
    category: str
    first_size: str
    last_size: str
    mark: str

    def __str__(self) -> str:
        return f"{self.num_words} {self.category} {self.first_size} {self.last_size} {self.mark}"

    @staticmethod
    def parse(text: str) -> Instruction:
        num_words, category, first_size, last_size, mark = text.split()
        return Instruction(int(num_words), category, first_size, last_size, mark)


def all_instructions() -> list[Instruction]:
    """Every instruction of the language. There are 2,048."""
    return [
        Instruction(n, category, first_size, last_size, mark)
        for n, category, first_size, last_size, mark in itertools.product(LENGTHS, WORDS, SIZES, SIZES, MARKS)
    ]


def oracle_verdict(instruction: str, response: str) -> tuple[bool, ...]:
    """Which of the five criteria the response meets. The response may be any text, and may be empty."""
    asked, tokens = Instruction.parse(instruction), response.split()
    words = [t for t in tokens if t in CATEGORY_OF]
    marks = [t for t in tokens if t in MARKS]
    return (
        len(words) == asked.num_words and len(words) + len(marks) == len(tokens),
        bool(words) and {CATEGORY_OF[w] for w in words} == {asked.category} and len(set(words)) == len(words),
        bool(tokens) and SIZE_OF.get(tokens[0]) == asked.first_size,
        bool(words) and SIZE_OF[words[-1]] == asked.last_size,
        tokens[-1:] == [asked.mark] and len(marks) == 1,
    )


def oracle_score(instruction: str, response: str) -> int:
    """The true score, from 0 to 5."""
    return sum(oracle_verdict(instruction, response))


def share_of_criteria(instruction: str, response: str) -> float:
    """The oracle as a verifier: the share of the criteria that the response meets."""
    return oracle_score(instruction, response) / NUM_CRITERIA


def demonstration(rng: random.Random, instruction: Instruction, *, quality: float) -> str:
    """A response that meets each criterion with probability `quality`. It has no word twice."""
    x, words = instruction, WORDS[instruction.category]
    right_length, right_category, right_first, right_last, right_mark = (rng.random() < quality for _ in range(5))
    length = x.num_words if right_length else rng.choice([n for n in LENGTHS if n != x.num_words])
    first_size = x.first_size if right_first else rng.choice([s for s in SIZES if s != x.first_size])
    last_size = x.last_size if right_last else rng.choice([s for s in SIZES if s != x.last_size])
    first = rng.choice(words[first_size])
    last = rng.choice([w for w in words[last_size] if w != first])
    between = rng.sample([w for same in words.values() for w in same if w not in (first, last)], length - 2)
    if not right_category:
        i = rng.randrange(len(between))
        wrong = rng.choice([category for category in WORDS if category != x.category])
        between[i] = rng.choice(WORDS[wrong][rng.choice(SIZES)])
    mark = x.mark if right_mark else rng.choice([m for m in MARKS if m != x.mark])
    return " ".join([first, *between, last, mark])


def justification(instruction: str, response: str) -> str:
    """The reasons of a verdict. For each criterion: what was found, and y or n for whether it was asked for.

    `4 y animal y huge n tiny y ! y` means: there are four words; all are animals; the first one is huge and should not
    be; the last one is tiny; the mark is right. `twice` means that a word is repeated. `none` means that something is
    missing.
    """
    asked, tokens = Instruction.parse(instruction), response.split()
    words = [t for t in tokens if t in CATEGORY_OF]
    others = [CATEGORY_OF[w] for w in words if CATEGORY_OF[w] != asked.category]
    category = others[0] if others else "twice" if len(set(words)) < len(words) else asked.category if words else "none"
    found = [
        str(min(len(words), 9)),
        category,
        SIZE_OF.get(tokens[0], "none") if tokens else "none",
        SIZE_OF[words[-1]] if words else "none",
        tokens[-1] if tokens[-1:] and tokens[-1] in MARKS else "none",
    ]
    verdict = oracle_verdict(instruction, response)
    return " ".join(f"{f} {'y' if met else 'n'}" for f, met in zip(found, verdict, strict=True))


def judged(key: str, instruction: Instruction, response: str) -> EFTExample:
    """A response with the oracle's verdict, in the form in which the judge learns to write it."""
    verdict = oracle_verdict(str(instruction), response)
    return EFTExample(
        example_id=key,
        instruction=str(instruction),
        response=response,
        justification=justification(str(instruction), response),
        score=sum(verdict),
    )


META_RUBRIC = "compare {instruction} answer {response} judge {verdict_a} judge {verdict_b} Winner:"


def compared(rng: random.Random, key: str, instruction: Instruction, response: str) -> IFTExample:
    """A comparison of two verdicts on a response, of which one is the oracle's, and the oracle's choice.

    The other verdict has one to three criteria wrong, and the score that follows from them.
    """
    asked = str(instruction)
    words, right = justification(asked, response).split(), oracle_verdict(asked, response)
    wrong = list(right)
    for i in rng.sample(range(NUM_CRITERIA), rng.randint(1, 3)):
        wrong[i] = not wrong[i]
    other = " ".join(f"{found} {'y' if met else 'n'}" for found, met in zip(words[::2], wrong, strict=True))
    verdicts = [f"{' '.join(words)} Score: {sum(right)}", f"{other} Score: {sum(wrong)}"]
    first = rng.randrange(2)
    prompt = META_RUBRIC.format(
        instruction=asked, response=response, verdict_a=verdicts[first], verdict_b=verdicts[1 - first]
    )
    return IFTExample(example_id=key, instruction=prompt, response=f"Winner: {'AB'[first]}")


@dataclass(frozen=True)
class SeedFiles:
    """The files that `write_seed` writes into `directory`."""

    directory: Path

    @property
    def ift(self) -> Path:
        return self.directory / "ift.jsonl"

    @property
    def meta_ift(self) -> Path:
        """The same with comparisons of verdicts."""
        return self.directory / "ift_meta.jsonl"

    @property
    def eft(self) -> Path:
        return self.directory / "eft.jsonl"

    @property
    def weak_eft(self) -> Path:
        """The EFT data of the weak judge: few examples, repeated so that the training is as long."""
        return self.directory / "eft_weak.jsonl"

    @property
    def eft_eval(self) -> Path:
        return self.directory / "eft_eval.jsonl"

    @property
    def rankings(self) -> Path:
        return self.directory / "rankings.jsonl"

    @property
    def new_prompts(self) -> Path:
        """With `{iteration}` where the number of the iteration goes."""
        return self.directory / "prompts_{iteration}.jsonl"


def write_seed(
    directory: Path,
    *,
    seed: int,
    num_ift: int,
    num_eft: int,
    num_weak_eft: int,
    num_held_out: int,
    num_rankings: int,
    num_meta: int,
    num_prompts: int,
    num_iterations: int,
) -> SeedFiles:
    """Write the seed data and the new prompts of each iteration.

    The instructions that are not held out are divided into two halves. One half is demonstrated, with one or more
    responses each, and has judged and ranked answers. The new prompts of all iterations come from the other half.
    """
    rng = random.Random(f"proof/{seed}")
    pool = all_instructions()
    rng.shuffle(pool)
    held_out, rest = pool[:num_held_out], pool[num_held_out:]
    known, new = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    files = SeedFiles(directory)

    def answer(x: Instruction) -> str:
        return demonstration(rng, x, quality=rng.choice(ANSWER_QUALITIES))

    ift = [
        IFTExample(
            example_id=f"ift-{i:05d}",
            instruction=str(x),
            response=demonstration(rng, x, quality=DEMONSTRATION_QUALITY),
        )
        for i, x in enumerate(rng.choices(known, k=num_ift))
    ]
    _write(files.ift, ift)
    eft = [judged(f"eft-{i:05d}", x, answer(x)) for i, x in enumerate(rng.choices(known, k=num_eft))]
    _write(files.eft, eft)
    weak = [replace(eft[i % num_weak_eft], example_id=f"eft-weak-{i:05d}") for i in range(num_eft)]
    _write(files.weak_eft, weak)
    _write(
        files.eft_eval, [judged(f"eval-{i:05d}-{j}", x, answer(x)) for i, x in enumerate(held_out) for j in range(4)]
    )
    ranked_instructions = enumerate(rng.choices(known, k=num_rankings))
    _write(files.rankings, [ranked(f"rank-{i:05d}", x, [answer(x) for _ in range(4)]) for i, x in ranked_instructions])
    for t in range(1, num_iterations + 1):
        drawn = enumerate(rng.sample(new, num_prompts))
        prompts = [Prompt(prompt_id=f"iter{t}-{i:06d}", text=str(x)) for i, x in drawn]
        _write(Path(str(files.new_prompts).format(iteration=t)), prompts)
    # Drawn last, so that the other files do not depend on it.
    meta = [compared(rng, f"meta-{i:05d}", x, answer(x)) for i, x in enumerate(rng.choices(known, k=num_meta))]
    _write(files.meta_ift, [*ift, *meta])
    return files


def ranked(key: str, instruction: Instruction, answers: Sequence[str]) -> RankedAnswers:
    """Answers with their ranks and without scores. Rank 0 is the best, and equally good answers share a rank."""
    scores = [oracle_score(str(instruction), a) for a in answers]
    levels = sorted(set(scores), reverse=True)
    return RankedAnswers(
        example_id=key, instruction=str(instruction), responses=list(answers), ranks=[levels.index(s) for s in scores]
    )


def write_model(directory: Path, *, seed: int) -> None:
    """Write M0, a Hugging Face directory: a Llama with 0.35M random parameters, and a tokenizer of whole words."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    directory.mkdir(parents=True, exist_ok=True)
    _write_tokenizer(directory)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=112,
                hidden_size=96,
                intermediate_size=256,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=64,
                rms_norm_eps=1e-5,
                initializer_range=0.05,
                tie_word_embeddings=True,
                bos_token_id=None,
                eos_token_id=VOCABULARY.index("<|end|>"),
                pad_token_id=VOCABULARY.index("<|end|>"),
            )
        )
    model.save_pretrained(directory)


def _write_tokenizer(directory: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Words are joined by blanks, but a verdict's score stands on a line of its own, as the reader of verdicts wants it.
    own_line = decoders.Replace(" Score:", "\nScore:")
    tokenizer.decoder = decoders.Sequence([decoders.WordPiece(cleanup=False), decoders.Fuse(), own_line])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<|unknown|>",
        eos_token="<|end|>",
        pad_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)


def _write(path: Path, records: Iterable[object]) -> None:
    write_atomic(path, "".join(map(to_line, records)))
