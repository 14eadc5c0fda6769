"""A model small enough to be trained in seconds, with a real tokenizer and chat template."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer(directory: Path, texts: Iterable[str], *, vocab_size: int) -> int:
    """Train a byte-level BPE on `texts` and save it as a Hugging Face tokenizer; returns its size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)
    return int(tokenizer.get_vocab_size())


def make_model(
    directory: Path,
    texts: Iterable[str],
    *,
    vocab_size: int = 384,
    num_layers: int = 2,
    hidden_size: int = 64,
    num_attention_heads: int = 4,
    num_query_groups: int = 2,
    tie_word_embeddings: bool = True,
    family: str = "llama",
    seed: int = 1,
) -> Path:
    """A Hugging Face directory with random weights."""
    from tests.families import random_model

    directory.mkdir(parents=True, exist_ok=True)
    size = make_tokenizer(directory, texts, vocab_size=vocab_size)
    model = random_model(
        family,
        seed=seed,
        vocab_size=size,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_query_groups,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        tie_word_embeddings=tie_word_embeddings,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model.save_pretrained(directory)
    return directory


def write_seed(directory: Path) -> dict[str, str]:
    """A seed that a tiny model learns by heart; returns the overrides that name it."""
    things = {"color": ["red", "blue", "green"], "animal": ["cat", "dog", "owl"], "fruit": ["fig", "pear", "plum"]}
    ift, eft, held_out = [], [], []
    for kind, names in things.items():
        for i, name in enumerate(names):
            instruction = f"Name {kind} number {i}."
            ift.append({"example_id": f"{kind}{i}", "instruction": instruction, "response": f"It is {name}."})
            for score, response in ((0, "No."), (2, f"Some {kind}."), (5, f"It is {name}.")):
                row = {
                    "example_id": f"{kind}{i}-{score}",
                    "instruction": instruction,
                    "response": response,
                    "justification": {0: "Off.", 2: "Half.", 5: "Right."}[score],
                    "score": score,
                }
                (held_out if i == 2 else eft).append(row)
    directory.mkdir(parents=True, exist_ok=True)
    for name, rows in (("ift", ift), ("eft", eft), ("eft_eval", held_out)):
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {f"data.{name}_path": str(directory / f"{name}.jsonl") for name in ("ift", "eft", "eft_eval")}


def texts_of(seed_dir: Path) -> list[str]:
    return [path.read_text() for path in sorted(seed_dir.glob("*.jsonl"))]
