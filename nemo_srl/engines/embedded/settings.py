"""Settings of the embedded engine."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_srl.config.check import check

DTYPES = ("bfloat16", "float32")


@dataclass
class EmbeddedSettings:
    """`engine=embedded`: the engine runs in the stage's own process, on the CPU."""

    name: str = "embedded"
    dtype: str = "bfloat16"
    """Of weights and matrix products: bfloat16 or float32."""
    max_batch_size: int = 32
    """Sequences decoded together. More than about 32 need more memory and gain little."""

    def __post_init__(self) -> None:
        check(self.dtype in DTYPES, "engine.dtype", self.dtype, f"the embedded engine knows {', '.join(DTYPES)}")
        check(self.max_batch_size >= 1, "engine.max_batch_size", self.max_batch_size, "must be at least 1")
