"""The real vLLM, on a CPU. `make vllm` installs it into build/vllm and runs these tests. Elsewhere they are skipped."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import cluster
from tests.tiny import make_model, texts_of, write_seed
from tools.install_vllm import install

__all__ = ["cluster"]  # a fixture

PROJECT = Path(__file__).resolve().parents[2]
DIRECTORY = PROJECT / "build" / "vllm"
INSTALL = "NEMO_SRL_INSTALL_VLLM"
"""Environment variable that allows to install vLLM."""


@pytest.fixture(scope="session")
def engine() -> dict[str, Any]:
    """Settings of `engine=vllm` that fit a busy machine with two cores."""
    if not os.environ.get(INSTALL):
        pytest.skip(f"the real vLLM is not asked for: use `make vllm`, which sets {INSTALL}=1")
    program = install(DIRECTORY)
    # Threads that are bound to cores wait for each other, and for every other program of the machine.
    variables = ("VLLM_CPU_KVCACHE_SPACE=1", "VLLM_CPU_OMP_THREADS_BIND=nobind", "OMP_NUM_THREADS=1")
    return {
        "command": ["env", *variables, str(program), "serve"],
        "dtype": "float32",
        "max_num_seqs": 16,
        "max_concurrency": 1,
        "max_retries": 0,
        "extra_options": {
            "enforce_eager": True,  # compiling takes longer than all calls of a test
            "enable_chunked_prefill": False,  # see docs/engines.md
        },
    }


@pytest.fixture(scope="session")
def tiny_model() -> Callable[[Path], Path]:
    """Makes a model with random weights. The CPU kernels of vLLM take heads of 32 numbers and more."""

    def make(base: Path) -> Path:
        write_seed(base / "seed")
        return make_model(base / "vllm-model", texts_of(base / "seed"), num_attention_heads=2, num_query_groups=1)

    return make
