"""Packs what a bare GPU machine without a network lacks: `python -m tools.gpu_bundle` writes build/gpu-bundle.tar.xz.

Such a machine is taken to have Python 3.12, a CUDA build of torch 2.6 or newer, transformers 5, and the usual packages
for scientific work: numpy (also 2), scipy, pandas, pyarrow, scikit-learn, matplotlib, tensorboard, onnx, protobuf,
sentencepiece, accelerate and what these need. The archive has two folders for PYTHONPATH:

    site   the pins of requirements.lock that a run, the trainer and the doctor import
    trl    TRL, which needs the newer transformers that is installed there

`benchmarks/gpu_bare.sh` unpacks it and runs the doctor and the benchmark; benchmarks/README.md says how. This program
downloads wheels for that Python and installs nothing here. Files that no training imports are left out of the archive.
It then has about 40 MB, and making it takes some minutes.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from tools import install, lock_check

PYTHON = "3.12"
CARRIED = (
    "annotated-types", "antlr4-python3-runtime", "asciitree", "braceexpand", "datasets", "dill", "fasteners", "fsspec",
    "gguf", "huggingface-hub", "hydra-core", "ijson", "jieba", "jsonlines", "lightning", "megatron-core",
    "multiprocess", "nemo-aligner", "nemo-toolkit", "nltk", "numcodecs", "omegaconf", "opencc", "packaging", "pangu",
    "pydantic", "pydantic-core", "pytz", "rapidfuzz", "rouge-score", "ruamel.yaml", "sacrebleu", "setuptools",
    "tensorstore", "text-unidecode", "tokenizers", "torchmetrics", "transformers", "typing-inspection", "tzdata",
    "webdataset", "wget", "zarr",
)  # fmt: skip
"""Names in requirements.lock. Where the machine has another version, this one goes before it."""
TRL = ("trl==1.16.0", "datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19")
"""The newest TRL, and those of its needs that such a machine lacks (2026-11-26)."""
PRUNED = (
    "bin", "examples", "jieba/dict.txt", "jieba/analyse", "jieba/lac_small", "jieba/posseg", "nemo/collections/tts",
    "nemo/collections/vlm", "nemo/collections/diffusion", "nemo/collections/multimodal_autoregressive",
    "tensorstore/include", "**/tests", "**/test", "**/*.pyi", "**/*.h", "**/*.cu",
)  # fmt: skip
"""What no training imports, as patterns below `site` and `trl`."""


def fill_site(site: Path) -> None:
    """Install the pins of `CARRIED` into the folder `site`."""
    lock = install.LOCK.read_text()
    pins = {x.name: x for x in lock_check.pins_of(lock, PYTHON)}
    built = [name for name in CARRIED if name in lock_check.SOURCE_ONLY]
    wheels = [f"{name}{pins[name].specifier}" for name in CARRIED if name not in built]
    _pip_install(site, *lock_check.wheels_only(PYTHON), *wheels)
    with tempfile.TemporaryDirectory() as directory:
        found = lock_check.build_without_compiler(lock, Path(directory), built)
        # Without a compiler these are plain Python, whatever Python built them.
        _pip_install(site, "--no-deps", *map(str, found))


def _pip_install(target: Path, *arguments: str) -> None:
    command = [*install.PIP, "install", "--quiet", "--no-compile", "--upgrade", "--target", str(target), *arguments]
    subprocess.run(command, check=True)


def prune(folder: Path) -> None:
    for pattern in PRUNED:
        for path in sorted(folder.glob(pattern), reverse=True):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def pack(folders: list[Path], archive: Path) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "w:xz", preset=9) as tar:
        for folder in folders:
            tar.add(folder, arcname=folder.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=install.ROOT / "build" / "gpu-bundle.tar.xz")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        site, trl = Path(directory) / "site", Path(directory) / "trl"
        try:
            fill_site(site)
            _pip_install(trl, *lock_check.wheels_only(PYTHON), *TRL)
        except subprocess.CalledProcessError as e:
            sys.exit(f"error: this failed, for the reason above: {' '.join(map(str, e.cmd))}")
        for folder in (site, trl):
            prune(folder)
        pack([site, trl], args.output)
    print(f"{args.output}: {args.output.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
