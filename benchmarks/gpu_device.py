"""The machine that gpu.py runs on, and the share of its peak that a training reaches.

`gpu_device.py CASE_FILE RESULT_FILE` describes the device, in a process of its own.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from nemo_srl.models.arithmetic import flops_per_token
from nemo_srl.models.spec import ModelSpec

PEAK_TFLOPS = {
    "A100": 312, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "B200": 2250, "L40S": 362,
}  # fmt: skip
"""Dense bfloat16 TFLOP/s by NVIDIA's data sheets, by what a GPU's name contains. The first match counts."""
PACKAGES = ("torch", "transformers", "nemo-toolkit", "nemo-aligner", "megatron-core", "numpy")


def peak_tflops(name: str, measured: float) -> tuple[float, str]:
    """The peak that an MFU refers to, and where it is from: the table, or a large matrix product that was measured."""
    for known, peak in PEAK_TFLOPS.items():
        if known in name:
            return float(peak), "NVIDIA's data sheet"
    return measured, "measured with a large matrix product"


def training_flops(spec: ModelSpec, lengths: Iterable[int], *, forward_passes: int) -> float:
    """Model FLOPs of one step on sequences of these lengths, without padding.

    A forward pass has 2 FLOPs per parameter and token, and attention's. A training step counts as 3 passes, and the
    reference of DPO as one more (Narayanan et al. 2021, arXiv 2104.04473, equation 3).
    """
    return sum(n * flops_per_token(spec, sequence_length=n, forward_passes=forward_passes) for n in lengths)


def matmul_tflops(device: str, size: int) -> float:
    """The rate of a square matrix product in bfloat16: the best of five."""
    import torch

    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(6):  # the first one warms up
        start = time.perf_counter()
        a @ b
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e12


def describe(device: str) -> dict[str, Any]:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} finds no usable GPU. Give --device cpu --small for a dry run.")
    name, memory = f"CPU, {os.cpu_count()} cores ({platform.machine()})", None
    if device == "cuda":
        name, memory = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    measured = matmul_tflops(device, 8192 if device == "cuda" else 512)
    peak, source = peak_tflops(name, measured)
    return {
        "name": name, "memory_bytes": memory, "matmul_tflops": measured, "peak_tflops": peak, "peak_source": source,
        "python": platform.python_version(), "versions": {x: metadata.version(x) for x in PACKAGES},
    }  # fmt: skip


if __name__ == "__main__":
    found = describe(json.loads(Path(sys.argv[1]).read_text())["device"])
    Path(sys.argv[2]).write_text(json.dumps(found))
