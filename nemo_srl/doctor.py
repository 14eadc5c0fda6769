"""Shows whether this machine trains correctly: a tiny SFT, DPO and generation, compared with stored results.

The model has random weights from a generator of random numbers that never changes, and every platform computes in
float32. So all machines must get the same losses, and greedy decoding the same text. `recipes/doctor.py` prints it.
`python -m nemo_srl.doctor SETTINGS.json WORK_DIR` trains one prepared training, in a process of its own.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from nemo_srl import registry
from nemo_srl.config import ClusterConfig, DPOConfig, OptimConfig, SFTConfig
from nemo_srl.config.load import default_settings
from nemo_srl.config.training import TrainerSettings
from nemo_srl.engines import open_engine
from nemo_srl.errors import NemoSrlError
from nemo_srl.launchers import open_launcher
from nemo_srl.protocols import DPORow, GenerationRequest, Job, JobStep, SamplingParams, SFTRow, TrainingTask
from nemo_srl.trainers import open_trainer, trainer_backend

EXPECTED = {
    "sft": (0.0,),
    "dpo": (0.0,),
}
"""The losses of each step on the CPU platform, in float32 (2026-11-26)."""
EXPECTED_TEXT = ""
TOLERANCE = 1e-4
"""The largest difference of a loss that the order of additions explains."""
MIN_DISK_GB, MIN_MEMORY_GB = 10, 8
_TEXTS = (
    "Name a color.", "The sky is blue today.", "Count to three.", "One, two, three.",
    "Where is the cat?", "The cat sleeps on a mat.", "Say hello.", "Hello, dear reader!",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor's report."""

    name: str
    ok: bool
    text: str


def examine(settings: TrainerSettings, directory: Path) -> Iterator[Finding]:
    """Yield a finding as soon as it is known. Files go to `directory`. A check that fails does not end the others."""
    yield _guarded("platform", lambda: trainer_backend(settings).describe(settings))
    yield _memory()
    yield _disk(directory)
    model_dir = write_model(directory / "model")
    for algorithm, expected in EXPECTED.items():
        yield _guarded(algorithm, partial(_check_losses, algorithm, expected, settings, model_dir, directory))
    yield _guarded("generation", lambda: _compare_text(generated(model_dir)))


def _guarded(name: str, check: Callable[[], str]) -> Finding:
    try:
        return Finding(name=name, ok=True, text=check())
    except NemoSrlError as e:
        return Finding(name=name, ok=False, text=str(e))


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    ok = total >= MIN_MEMORY_GB * 0.9
    remedy = "" if ok else f" The default recipe needs {MIN_MEMORY_GB} GB."
    return Finding(name="memory", ok=ok, text=f"{total:.1f} GB, {os.cpu_count()} cores.{remedy}")


def _disk(directory: Path) -> Finding:
    free = shutil.disk_usage(directory).free / 1e9
    ok = free >= MIN_DISK_GB
    remedy = "" if ok else f" The default recipe needs {MIN_DISK_GB} GB: free some, or set run_dir to another disk."
    return Finding(name="disk", ok=ok, text=f"{free:.0f} GB free for {directory}.{remedy}")


def losses(algorithm: str, settings: TrainerSettings, model_dir: Path, directory: Path) -> list[float]:
    """The loss of each step of a tiny training on this machine. Raises what the trainer and the launcher do."""
    work_dir = directory / algorithm
    trainer = open_trainer(settings)
    trainer.prepare(_task(algorithm, model_dir), work_dir)
    settings_file = directory / "trainer.json"
    settings_file.write_text(json.dumps(asdict(settings)))  # type: ignore[call-overload]
    step = JobStep(name="train", command=["-m", "nemo_srl.doctor", str(settings_file), str(work_dir)])
    launcher = open_launcher(default_settings("launcher"), ClusterConfig())
    launcher.run(Job(name=algorithm, steps=[step], log_dir=directory, role="trainer", num_gpus_per_node=1))
    return [float(row["loss"]) for row in trainer.metrics(work_dir)]


def _task(algorithm: str, model_dir: Path) -> TrainingTask:
    prompts, answers = _TEXTS[::2], _TEXTS[1::2]
    optim: OptimConfig
    rows: Sequence[SFTRow] | Sequence[DPORow]
    common: dict[str, Any] = {"global_batch_size": 2, "max_epochs": 2, "max_seq_length": 128, "learning_rate": 1e-3}
    if algorithm == "sft":
        rows = [SFTRow(prompt=p, response=a) for p, a in zip(prompts, answers, strict=True)]
        return TrainingTask(algorithm="sft", model_dir=model_dir, rows=rows, optim=SFTConfig(**common), seed=1)
    rows = [
        DPORow(prompt=p, chosen=a, rejected=a[::-1], chosen_reward=5.0, rejected_reward=0.0)
        for p, a in zip(prompts, answers, strict=True)
    ]
    optim = DPOConfig(**common)
    return TrainingTask(algorithm="dpo", model_dir=model_dir, rows=rows, optim=optim, seed=1)


def generated(model_dir: Path) -> str:
    """What the embedded engine answers with the random weights, greedily and in float32."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    settings = default_settings("engine")
    settings.dtype = "float32"
    engine = open_engine(settings, model_dir)
    ids = tuple(tokenizer.encode(_TEXTS[0]))
    request = GenerationRequest(key="doctor", prompt_token_ids=ids, n=1, seed=1)
    greedy = SamplingParams(temperature=0, top_p=1, max_tokens=16)
    texts = [completion.text for made in engine.generate([request], greedy) for completion in made]
    engine.close()
    return texts[0]


def _check_losses(
    algorithm: str, expected: Sequence[float], settings: TrainerSettings, model_dir: Path, directory: Path
) -> str:
    found = losses(algorithm, settings, model_dir, directory)
    lines = f"losses {' '.join(f'{x:.6f}' for x in found)}"
    if len(found) != len(expected):
        raise NemoSrlError(f"{lines}: {len(found)} steps instead of {len(expected)}")
    difference = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    if math.isnan(difference) or difference > TOLERANCE:
        raise NemoSrlError(
            f"{lines}, but the right ones are {' '.join(f'{x:.6f}' for x in expected)}. Compare the packages above "
            "with requirements.lock, and install them again (make clean install). Or try platform=cpu: if that is "
            "right, the GPU or its driver is at fault."
        )
    return f"{lines}; the largest difference to the stored ones is {difference:.0e}"


def _compare_text(found: str) -> str:
    if found != EXPECTED_TEXT:
        raise NemoSrlError(f"the embedded engine wrote {found!r}, and the right text is {EXPECTED_TEXT!r}")
    return f"the embedded engine wrote the {len(found)} characters that it should"


def write_model(directory: Path) -> Path:
    """A Hugging Face Llama of 0.1M random parameters, and a tokenizer of letters. It is the same on every machine."""
    import numpy as np
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    # Printable characters only. Byte-level tokenizers write a space as this letter.
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
            values = numbers.standard_normal(tuple(parameter.shape)) * 0.1
            parameter.data.copy_(torch.from_numpy(values))
    model.save_pretrained(directory)
    return directory


def train(settings_file: Path, work_dir: Path) -> None:
    given = json.loads(settings_file.read_text())
    open_trainer(registry.load("trainers", given["name"]).settings(**given)).train(work_dir)


if __name__ == "__main__":
    train(Path(sys.argv[1]), Path(sys.argv[2]))
