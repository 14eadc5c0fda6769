"""HF <-> NeMo conversion against NeMo's own script and `cp`: speed, and peak memory over that after the imports.

    git clone --depth 1 --branch v2.2.1 https://github.com/NVIDIA/NeMo    # its scripts are not in the package
    python benchmarks/conversion.py --nemo NeMo [--directory DIR] [--num-layers N] [--repeats N] [--output FILE]

Makes a random bfloat16 Llama (by default 2.5 GB on disk: untied, GQA) below DIR, converts it both ways, each time
in a new process, and removes everything. The methods run in turn, after one round of warm-up, and medians are printed.
An fsync of every file follows `cp`, because the conversions do this too. NeMo's script, which is left out without
`--nemo`, writes a tar file of as many bytes; it needs about six times the model's size in memory. Goals: at least half
of cp's speed, and a peak resident memory of at most two layers + 1 GB over the process after its imports. Run it on an
idle machine: the conversions read and write in two threads, and cp needs a fifth of one core. With other work on the
same cores, cp would look better than it is.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import resource
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as nemo_srl.worker, which converts, sets it for torch

from nemo_srl.models import nemo_layout
from nemo_srl.models.convert import hf_to_nemo, nemo_to_hf
from nemo_srl.models.directories import publish
from nemo_srl.models.hf import read_spec
from nemo_srl.models.spec import ModelSpec
from nemo_srl.models.tensor_io import write_shards


def make_model(directory: Path, num_layers: int) -> None:
    """A random model of Llama 3's proportions at hidden size 2048."""
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "eos_token_id": 2,
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(config["vocab_size"])}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0", bos_token="w1", eos_token="w2").save_pretrained(
        directory
    )
    (directory / "model.safetensors").touch()  # read_spec asks for weights
    spec = read_spec(directory)
    parameters = nemo_layout.parameters(spec, spec.vocab_size)
    plan = [(name, shape, torch.bfloat16) for p in parameters for name, shape in p.hf_shapes.items()]
    (directory / "model.safetensors").unlink()
    tensors = ((name, torch.randn(shape).bfloat16()) for name, shape, _ in plan)
    write_shards(directory, plan, tensors, max_shard_bytes=1_000_000_000)


def layer_bytes(spec: ModelSpec) -> int:
    parameters = nemo_layout.parameters(spec, spec.vocab_size)
    return sum(2 * torch.Size(p.shape).numel() for p in parameters if p.layer == 0)


Work = Callable[[], object]


def prepare(method: str, source: Path, target: Path, template: Path, nemo: Path | None) -> Work:
    """Import what the method needs. The result does the work."""
    if method == "hf_to_nemo":
        return lambda: hf_to_nemo(source, target)
    if method == "nemo_to_hf":
        return lambda: nemo_to_hf(source, target, template_hf_dir=template)
    assert nemo is not None
    return prepare_nemos_script(source, target, nemo)


def prepare_nemos_script(source: Path, target: Path, nemo: Path) -> Work:
    """NeMo's own script, on this project's CPU platform, because NeMo needs CUDA, Apex and Transformer Engine."""
    from nemo_srl.trainers.nemo_aligner import run as training
    from nemo_srl.trainers.nemo_aligner.platforms import cpu

    warnings.simplefilter("ignore")
    training.adopt_rank_environment(os.environ)
    cpu.keep_freed_memory = lambda: None  # it is for trainings, and would count as the script's memory
    cpu.install()
    importlib.import_module("nemo.collections.nlp.models.language_modeling.megatron_gpt_model")
    os.dup2(2, 1)  # the script prints every parameter
    script = nemo / "scripts/checkpoint_converters/convert_llama_hf_to_nemo.py"
    arguments = {"input_name_or_path": source, "output_path": target, "precision": 16, "llama31": ""}
    sys.argv = [str(script), *(f"--{key}={value}" for key, value in arguments.items())]
    return lambda: runpy.run_path(str(script), run_name="__main__")


def convert(pipe: Connection, *arguments: Any) -> None:
    """In a process of its own: convert and send (seconds, bytes of peak memory over that before)."""
    work = prepare(*arguments)
    before = _status_bytes("VmRSS")
    start = time.perf_counter()
    work()
    seconds = time.perf_counter() - start
    pipe.send((seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before))


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(key)


def measure(method: str, source: Path, target: Path, template: Path, nemo: Path | None) -> tuple[float, int]:
    """Seconds, and bytes of memory."""
    if method == "cp":
        return measure_cp(source, target), 0
    # spawn, not fork: a forked child would inherit the peak of this process
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=convert, args=(there, method, source, target, template, nemo))
    process.start()
    there.close()
    try:
        seconds, peak = here.recv()
    except EOFError:
        raise SystemExit(f"error: {method} failed; its message is above") from None
    process.join()
    return float(seconds), int(peak)


def measure_cp(source: Path, target: Path) -> float:
    start = time.perf_counter()
    partial = target.with_name(target.name + ".partial")
    subprocess.run(["cp", "-r", str(source), str(partial)], check=True)
    publish(partial, target)
    return time.perf_counter() - start


def run(directory: Path, num_layers: int, repeats: int, nemo: Path | None) -> dict[str, object]:
    hf = directory / "hf"
    make_model(hf, num_layers)
    os.sync()
    spec = read_spec(hf)
    num_bytes = sum(path.stat().st_size for path in hf.iterdir())
    plan = [("cp", hf, "copy"), ("hf_to_nemo", hf, "nemo"), ("nemo_to_hf", directory / "nemo", "back")]
    if nemo:
        plan.append(("nemos_hf_to_nemo", hf, "nemos.nemo"))
    seconds: dict[str, list[float]] = {name: [] for name, *_ in plan}
    peaks: dict[str, list[int]] = {name: [] for name in seconds}
    for repeat in range(repeats + 1):
        for name, source, target_name in plan:
            target = directory / target_name
            # Removed just before, so that each method writes into memory that the machine has already used. A virtual
            # machine needs several times longer for pages that it touches for the first time.
            shutil.rmtree(target, ignore_errors=True)
            target.unlink(missing_ok=True)
            elapsed, peak = measure(name, source, target, hf, nemo)
            if repeat:  # the first round warms up
                seconds[name].append(elapsed)
                peaks[name].append(peak)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    goal = 2 * layer_bytes(spec) + 1_000_000_000
    return {
        "gigabytes": round(num_bytes / 1e9, 3),
        "repeats": repeats,
        "median_seconds": {name: round(value, 3) for name, value in median.items()},
        "all_seconds": {name: [round(v, 3) for v in values] for name, values in seconds.items()},
        **{
            f"speed_vs_{other}": {name: round(median[other] / median[name], 3) for name in seconds}
            for other in ("cp", "nemos_hf_to_nemo")
            if other in median
        },
        "peak_gigabytes_over_imports": {name: round(max(v) / 1e9, 3) for name, v in peaks.items()},
        "peak_goal_gigabytes": round(goal / 1e9, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--directory", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--num-layers", type=int, default=18)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--nemo", type=Path, help="a checkout of NeMo v2.2.1, for its own script")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="conversion-") as temporary:
        text = json.dumps(run(Path(temporary), options.num_layers, options.repeats, options.nemo), indent=2)
    print(text)
    if options.output is not None:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
