"""Shows whether this machine trains correctly: a tiny SFT, DPO and generation, compared with stored results.

The model's random weights come from a generator that never changes, and every platform computes in float32. So the
losses of the first steps must be the same on all machines. The SFT learns its answers by heart, so that the trained
model, exported and served by the embedded engine, must give them. `recipes/doctor.py` prints the findings.

`python -m nemo_srl.doctor SETTINGS.json WORK_DIR` runs one prepared training, which needs a process of its own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nemo_srl import registry
from nemo_srl.config import ClusterConfig, DPOConfig, SFTConfig
from nemo_srl.config.load import default_settings
from nemo_srl.engines import open_engine
from nemo_srl.errors import NemoSrlError
from nemo_srl.launchers import open_launcher
from nemo_srl.protocols import DPORow, GenerationRequest, Job, JobStep, SamplingParams, SFTRow, TrainingTask
from nemo_srl.trainers import open_trainer, trainer_backend

EXPECTED = {
    "sft": (4.921462, 4.590923, 3.393507, 3.194861),
    "dpo": (0.693147, 0.703261, 0.129521, 0.050738),
}
"""The losses of the first steps on the CPU platform (torch 2.13.0, 2026-11-26)."""
TOLERANCE = 1e-4
"""The largest difference of a loss that the order of additions explains."""
TAUGHT = {
    "Name a color.": "The sky is blue.",
    "Count to three.": "One, two, three.",
    "Where is the cat?": "On the mat.",
    "Say hello.": "Hello, dear reader!",
}
"""Instructions and the answers that the SFT teaches. DPO prefers them to the same letters backwards."""
MIN_DISK_GB, MIN_MEMORY_GB = 10, 8
"""What the default recipe needs."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the report. `text` has the remedy when something is wrong."""

    name: str
    ok: bool
    text: str


def examine(settings: Any, directory: Path) -> Iterator[Finding]:
    """Yield each finding as soon as it is known. `settings` are a trainer's, and files go to `directory`.

    A check that fails does not end the others.
    """
    yield _guarded("platform", lambda: trainer_backend(settings).describe(settings))
    for name, check in (("gpus", _gpus), ("memory", _memory), ("disk", partial(_disk, directory))):
        yield _guarded(name, check)
    write_model(directory / "model")
    for algorithm in ("sft", "dpo"):
        yield _guarded(algorithm, partial(_train, algorithm, settings, directory))
    yield _guarded("generation", partial(_generate, directory / "sft-model"))


def _guarded(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name=name, ok=True, text=check())
    except NemoSrlError as e:
        return Finding(name=name, ok=False, text=str(e))


def _gpus() -> str:
    if not shutil.which("nvidia-smi"):
        return "none (there is no nvidia-smi)"
    command = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader"]
    done = subprocess.run(command, text=True, capture_output=True)
    if done.returncode:
        raise NemoSrlError(f"nvidia-smi fails: {done.stdout}{done.stderr}. Install or restart the NVIDIA driver.")
    return "; ".join(f"{line} used" for line in done.stdout.strip().splitlines())


def _memory() -> str:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    text = f"{total:.1f} GB, {os.cpu_count()} cores"
    if total < 0.9 * MIN_MEMORY_GB:  # a machine of 8 GB shows somewhat less
        raise NemoSrlError(f"{text}. The default recipe needs {MIN_MEMORY_GB} GB. Use a smaller model, or more memory.")
    return text


def _disk(directory: Path) -> str:
    free = shutil.disk_usage(directory).free / 1e9
    text = f"{free:.0f} GB free for {directory}"
    if free < MIN_DISK_GB:
        raise NemoSrlError(f"{text}. The default recipe needs {MIN_DISK_GB} GB. Free some, or set run_dir elsewhere.")
    return text


def _train(algorithm: str, settings: Any, directory: Path) -> str:
    """Train and export as a stage does. Raises what the trainer and the launcher do, and for wrong losses."""
    trainer, work_dir, settings_file = open_trainer(settings), directory / algorithm, directory / "trainer.json"
    trainer.prepare(_task(algorithm, directory / "model"), work_dir)
    settings_file.write_text(json.dumps(asdict(settings)))
    step = JobStep(name="train", command=["-m", "nemo_srl.doctor", str(settings_file), str(work_dir)])
    launcher = open_launcher(default_settings("launcher"), ClusterConfig())
    launcher.run(Job(name=algorithm, steps=[step], log_dir=directory, role="trainer", num_gpus_per_node=1))
    trainer.export(work_dir, directory / f"{algorithm}-model")
    return compare([float(row["loss"]) for row in trainer.metrics(work_dir)], EXPECTED[algorithm])


def _task(algorithm: str, model_dir: Path) -> TrainingTask:
    optim: dict[str, Any] = {"global_batch_size": 2, "max_seq_length": 128, "learning_rate": 5e-3}
    if algorithm == "sft":
        rows = [SFTRow(prompt=prompt, response=answer) for prompt, answer in TAUGHT.items()]
        config = SFTConfig(max_epochs=40, **optim)
        return TrainingTask(algorithm="sft", model_dir=model_dir, rows=rows, optim=config, seed=1)
    pairs = [
        DPORow(prompt=prompt, chosen=answer, rejected=answer[::-1], chosen_reward=5.0, rejected_reward=0.0)
        for prompt, answer in TAUGHT.items()
    ]
    return TrainingTask(
        algorithm="dpo", model_dir=model_dir, rows=pairs, optim=DPOConfig(max_epochs=2, **optim), seed=1
    )


def compare(found: Sequence[float], expected: Sequence[float]) -> str:
    """Raises `NemoSrlError` if the first losses are not the expected ones. NaN is never the expected one."""
    first = found[: len(expected)]
    shown, wanted = (" ".join(f"{x:.6f}" for x in losses) for losses in (first, expected))
    differences = [abs(a - b) for a, b in zip(first, expected, strict=False)]
    if len(first) < len(expected) or not all(x <= TOLERANCE for x in differences):
        raise NemoSrlError(
            f"the losses are {shown}, and the right ones are {wanted}. Compare the packages above with "
            "requirements.lock, and install again: make clean install. Or try platform=cpu: if that is right, the GPU "
            "or its driver is at fault."
        )
    return f"losses {shown}; they differ from the stored ones by at most {max(differences):.0e}"


def _generate(model_dir: Path) -> str:
    """Let the embedded engine answer, greedily and in float32."""
    from transformers import AutoTokenizer

    if not model_dir.exists():
        raise NemoSrlError("not checked, because the SFT failed")
    tokenizer, settings = AutoTokenizer.from_pretrained(model_dir), default_settings("engine")
    settings.dtype = "float32"
    requests = [GenerationRequest(key=p, prompt_token_ids=tuple(tokenizer.encode(p)), n=1, seed=1) for p in TAUGHT]
    engine = open_engine(settings, model_dir)
    made = engine.generate(requests, SamplingParams(temperature=0, top_p=1, max_tokens=32))
    answers = {completion.request_key: completion.text for several in made for completion in several}
    engine.close()
    if wrong := [
        f"{p!r}: {answers[p]!r} instead of {answer!r}" for p, answer in TAUGHT.items() if answers[p] != answer
    ]:
        raise NemoSrlError(f"the trained model does not answer as it was taught. {'; '.join(wrong)}")
    return f"the trained model answers as it was taught, {len(answers)} of {len(answers)}"


def write_model(directory: Path) -> None:
    """A Hugging Face Llama of 0.1M random parameters, and a tokenizer of letters. It is the same on every machine."""
    import numpy as np
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    # Byte-level tokenizers write a space as the letter U+0120.
    tokens = ["<|end|>", "\u0120", *map(chr, range(ord("!"), ord("~") + 1))]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")
    fast.save_pretrained(directory)
    config = LlamaConfig(
        vocab_size=len(tokens), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model, numbers = LlamaForCausalLM(config), np.random.RandomState(0)  # a generator that numpy promises to keep
    for name, parameter in sorted(model.named_parameters()):
        if "norm" not in name:
            parameter.data.copy_(torch.from_numpy(numbers.standard_normal(tuple(parameter.shape)) * 0.1))
    model.save_pretrained(directory)


def main(settings_file: Path, work_dir: Path) -> None:
    given = json.loads(settings_file.read_text())
    open_trainer(registry.load("trainers", given["name"]).settings(**given)).train(work_dir)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
