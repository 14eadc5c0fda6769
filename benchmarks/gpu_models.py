"""Models with random weights, preference pairs and prompts for gpu.py: `gpu_models.py CASE_FILE RESULT_FILE`.

Speed and memory do not depend on what a model knows. So no weights need to be fetched: a shape of recipes/shapes/ gets
random weights, and a small tokenizer that is trained on the seed data. In the directory of the case are then

    model/          the model
    endless/        the same with an end-of-sequence token that does not exist
    pairs.json      preference pairs and the lengths of their sequences
    workloads.json  prompts to continue and verdicts to write
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from generation_workloads import make_workloads, without_end_tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
SEED_FILES = ("ift.jsonl", "eft.jsonl", "eft_eval.jsonl")
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TINY = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 1024, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": True,
    "eos_token_id": 2, "torch_dtype": "float32",
}  # fmt: skip
NUM_PAIRS, MAX_LENGTH, NUM_PROMPTS = 32, 1024, 64
TINY_NUM_PAIRS, TINY_MAX_LENGTH, TINY_NUM_PROMPTS = 8, 128, 2


def shape(name: str) -> dict[str, Any]:
    """The config.json of a model in recipes/shapes/, or of a tiny one."""
    if name == "tiny":
        return dict(TINY)
    config: dict[str, Any] = json.loads((ROOT / "recipes" / "shapes" / name / "config.json").read_text())
    return config


def seed_texts() -> list[str]:
    rows = [json.loads(line) for name in SEED_FILES for line in (ROOT / "data/seed" / name).read_text().splitlines()]
    return [row[key] for row in rows for key in ("instruction", "response", "justification") if key in row]


def write_tokenizer(directory: Path, *, vocab_size: int) -> None:
    """A byte-level BPE of the seed data, with a chat template. It is the same on every machine."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(seed_texts(), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        unk_token="<|endoftext|>", chat_template=CHAT_TEMPLATE, clean_up_tokenization_spaces=False,
    ).save_pretrained(directory)  # fmt: skip


def write_model(directory: Path, config: dict[str, Any], *, device: str) -> None:
    """A Hugging Face Llama of that shape with random weights, in the shape's own type."""
    write_tokenizer(directory, vocab_size=min(4096, config["vocab_size"]))
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    dtype = getattr(torch, config["torch_dtype"])
    torch.manual_seed(1)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlamaForCausalLM(LlamaConfig(**{**config, **ids}))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(directory)


def make_pairs(model_dir: Path, *, num_pairs: int, max_length: int, seed: int) -> dict[str, Any]:
    """Preference pairs of random words: `rows`, and `lengths`, the tokens of their sequences.

    Lengths are spread evenly from half of `max_length` to `max_length`, with the end-of-sequence token. The prompt is a
    quarter of `max_length`. One sequence has `max_length` exactly, so the longest micro-batch is as long as it may be.
    """
    tokenizer, rng = AutoTokenizer.from_pretrained(model_dir), random.Random(seed)
    candidates = sorted({word for text in seed_texts() for word in text.split() if word.isalpha()})
    words = [f" {word}" for word in candidates if len(tokenizer.encode(f" {word}")) == 1]
    num_prompt = max_length // 4

    def text(num_tokens: int) -> str:
        return "".join(rng.choice(words) for _ in range(num_tokens))

    lengths = [max_length, *(rng.randint(max_length // 2, max_length) for _ in range(2 * num_pairs - 1))]
    rows = []
    for i in range(num_pairs):
        chosen, rejected = (text(length - num_prompt - 1) for length in lengths[2 * i : 2 * i + 2])
        rows.append({"prompt": text(num_prompt), "chosen": chosen, "rejected": rejected})
    return {"rows": rows, "lengths": lengths}


def main(case: dict[str, Any]) -> dict[str, Any]:
    directory, is_tiny = Path(case["directory"]), case["shape"] == "tiny"
    model_dir = directory / "model"
    write_model(model_dir, shape(case["shape"]), device=case["device"])
    num_pairs, max_length = (TINY_NUM_PAIRS, TINY_MAX_LENGTH) if is_tiny else (NUM_PAIRS, MAX_LENGTH)
    pairs = make_pairs(model_dir, num_pairs=num_pairs, max_length=max_length, seed=5)
    (directory / "pairs.json").write_text(json.dumps(pairs))
    num_prompts = TINY_NUM_PROMPTS if is_tiny else NUM_PROMPTS
    workloads = make_workloads(model_dir, num_prompts=num_prompts, small=is_tiny)
    if not is_tiny:  # a GPU would be done too soon
        workloads = [replace(w, max_tokens=2 * w.max_tokens) for w in workloads]
    (directory / "workloads.json").write_text(json.dumps([asdict(w) for w in workloads]))
    without_end_tokens(model_dir, directory / "endless")
    return {"num_pairs": num_pairs, "max_length": max_length}


if __name__ == "__main__":
    found = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(found))
