"""The number format in which this machine is fast."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
_BF16_UNITS = re.compile(r"^(?:flags|Features)\b.*\b(?:avx512_bf16|amx_bf16|bf16)\b", re.MULTILINE)
"""x86 has the first two names, Arm has the last one."""


def fast_dtype(device: str) -> str:
    """bfloat16 on a GPU and on a processor with units for it, else float32. `device` is that of the settings.

    Without such units, each product in bfloat16 is converted first: on a Xeon it took 2.4 times as long. A system that
    does not tell its processor's units in /proc/cpuinfo gets float32.
    """
    if device == "cuda" or (device == "auto" and shutil.which("nvidia-smi")):
        return "bfloat16"
    return "bfloat16" if CPUINFO.exists() and _BF16_UNITS.search(CPUINFO.read_text()) else "float32"
