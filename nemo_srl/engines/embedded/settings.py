"""Settings of the embedded engine."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_srl.config.check import check
from nemo_srl.processor import has_bf16_units, is_gpu

DTYPES = ("bfloat16", "float32", "auto")
DEVICES = ("auto", "cpu", "cuda")
BATCH_SIZES = {"cpu": 128, "cuda": 256}
"""Sequences that are decoded together if nothing else is set."""


@dataclass
class EmbeddedSettings:
    """`engine=embedded`: the engine runs in the stage's own process, on the CPU or on one GPU."""

    name: str = "embedded"
    dtype: str = "bfloat16"
    """Of weights and matrix products: bfloat16, float32 or auto. auto: bfloat16 on a GPU and on a processor with units
    for it, else float32. The machine of the orchestrator decides, and run directories hold what was decided."""
    device: str = "auto"
    """cpu; cuda: one NVIDIA GPU; auto: a GPU if PyTorch finds one. On a cluster, a job gets a GPU for cuda only."""
    max_batch_size: int | None = None
    """Sequences decoded together; null: 256 on a GPU, and on the CPU between 32 and 128, so that their keys and values
    have room in 1 GB."""

    cuda_graphs: bool = True
    """On a GPU: record decoding steps as CUDA graphs, which starts their kernels much faster. The text is the same."""

    def __post_init__(self) -> None:
        check(self.dtype in DTYPES, "engine.dtype", self.dtype, f"the embedded engine knows {', '.join(DTYPES)}")
        check(self.device in DEVICES, "engine.device", self.device, f"must be one of {', '.join(DEVICES)}")
        if self.dtype == "auto":
            self.dtype = "bfloat16" if is_gpu(self.device) or has_bf16_units() else "float32"
        fits = self.max_batch_size is None or self.max_batch_size >= 1
        check(fits, "engine.max_batch_size", self.max_batch_size, "must be at least 1")
