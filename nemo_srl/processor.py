"""Where this machine computes, and the number format in which it is fast."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_BF16_UNITS = re.compile(r"^(?:flags|Features)\b.*\b(?:avx512_bf16|amx_bf16|bf16)\b", re.MULTILINE)
"""x86 has the first two names, Arm has the last one."""


def is_gpu(device: str) -> bool:
    """Whether `device`, as settings name it, is a GPU. "auto" is one where there is NVIDIA's driver."""
    return device != "cpu" and (device != "auto" or shutil.which("nvidia-smi") is not None)


def has_bf16_units() -> bool:
    """Whether the processor multiplies bfloat16 itself.

    Without such units, each product in bfloat16 is converted first: on a Xeon it took 2.4 times as long. False for a
    system that does not tell its processor's units in /proc/cpuinfo.
    """
    return CPUINFO.exists() and _BF16_UNITS.search(CPUINFO.read_text()) is not None
