"""The tiny models of the doctor, what they are taught, and the losses that every machine must show.

The random weights come from a generator that never changes, and every platform computes in float32. So the losses of
the first steps must be the same on all machines, and however a model is divided over GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_srl.config import DPOConfig, SFTConfig
from nemo_srl.errors import NemoSrlError
from nemo_srl.protocols import DPORow, SFTRow, TrainingTask

EXPECTED = {
    "sft": (4.921462, 4.590923, 3.393507, 3.194861),
    "dpo": (0.693147, 0.703261, 0.129521, 0.050738),
}
"""The losses of the first steps on the CPU platform (torch 2.13.0, 2026-11-26)."""
SHORT_EPOCHS = 2
EXPECTED_SHORT = {"sft": (4.921462, 4.590923, 3.409187, 3.196181), "dpo": EXPECTED["dpo"]}
"""The losses of all four steps of trainings of two epochs, in which the learning rate falls faster."""
TOLERANCE = 1e-4
"""The largest difference of a loss that the order of additions explains."""
TAUGHT = {
    "Name a color.": "The sky is blue.",
    "Count to three.": "One, two, three.",
    "Where is the cat?": "On the mat.",
    "Say hello.": "Hello, dear reader!",
}
"""Instructions and the answers that the SFT teaches. DPO prefers them to the same letters backwards."""


def task(algorithm: str, model_dir: Path, **optim: Any) -> TrainingTask:
    """The training of one algorithm. `optim` are other settings of it."""
    given: dict[str, Any] = {"global_batch_size": 2, "max_seq_length": 128, "learning_rate": 5e-3, **optim}
    if algorithm == "sft":
        rows = [SFTRow(prompt=prompt, response=answer) for prompt, answer in TAUGHT.items()]
        config = SFTConfig(**{"max_epochs": 40, **given})
        return TrainingTask(algorithm="sft", model_dir=model_dir, rows=rows, optim=config, seed=1)
    pairs = [
        DPORow(prompt=prompt, chosen=answer, rejected=answer[::-1], chosen_reward=5.0, rejected_reward=0.0)
        for prompt, answer in TAUGHT.items()
    ]
    dpo = DPOConfig(**{"max_epochs": 2, **given})
    return TrainingTask(algorithm="dpo", model_dir=model_dir, rows=pairs, optim=dpo, seed=1)


WRONG_LOSSES = (
    "Compare the packages above with requirements.lock, and install again: make clean install. Or try platform=cpu: if "
    "that is right, the GPU or its driver is at fault."
)


def compare(found: Sequence[float], expected: Sequence[float], *, remedy: str = WRONG_LOSSES) -> str:
    """Raises `NemoSrlError` if the first losses are not the expected ones. NaN is never the expected one."""
    first = found[: len(expected)]
    shown, wanted = (" ".join(f"{x:.6f}" for x in losses) for losses in (first, expected))
    differences = [abs(a - b) for a, b in zip(first, expected, strict=False)]
    if len(first) < len(expected) or not all(x <= TOLERANCE for x in differences):
        raise NemoSrlError(f"the losses are {shown}, and the right ones are {wanted}. {remedy}".rstrip())
    return f"losses {shown}; they differ from the stored ones by at most {max(differences):.0e}"


def write_tokenizer(directory: Path, ends: Sequence[str] = ("<|end|>",)) -> int:
    """A tokenizer of letters after the tokens that end an answer. Returns the number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # Byte-level tokenizers write a space as the letter U+0120.
    tokens = [*ends, "\u0120", *map(chr, range(ord("!"), ord("~") + 1))]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=ends[0], pad_token=ends[0], additional_special_tokens=list(ends[1:])
    )
    fast.save_pretrained(directory)
    return len(tokens)


def write_model(directory: Path) -> None:
    """A Hugging Face Llama of 0.1M random parameters, and a tokenizer of letters. It is the same on every machine."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=write_tokenizer(directory), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5,
        tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model, numbers = LlamaForCausalLM(config), np.random.RandomState(0)  # a generator that numpy promises to keep
    for name, parameter in sorted(model.named_parameters()):
        if "norm" not in name:
            parameter.data.copy_(torch.from_numpy(numbers.standard_normal(tuple(parameter.shape)) * 0.1))
    model.save_pretrained(directory)
