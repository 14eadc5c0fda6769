"""Small model directories for tests, written by transformers and so independent of our own writer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.families import random_model

TINY = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 203,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
"""Untied, GQA, heads wider than hidden_size / heads, and a vocabulary that is no multiple of 128."""


def make_llama(
    directory: Path,
    *,
    family: str = "llama",
    tied: bool = False,
    seed: int = 0,
    max_shard_size: str = "5GB",
    **config: Any,
) -> Path:
    """A random model with a word-level tokenizer: a Llama, or one of another family with its shape."""
    settings = {**TINY, "tie_word_embeddings": tied, **config}
    random_model(family, seed=seed, **settings).save_pretrained(directory, max_shard_size=max_shard_size)
    specials = ["<unk>", "<s>", "</s>", "<pad>"]
    words = specials + [f"w{i}" for i in range(len(specials), settings["vocab_size"])]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    ).save_pretrained(directory)
    return directory


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors, read by the safetensors library."""
    return {name: value for path in sorted(directory.glob("*.safetensors")) for name, value in load_file(path).items()}


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert torch.equal(value, second[name]), name
