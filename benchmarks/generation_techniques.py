"""What each technique of the embedded engine contributes: the engine is measured without one of them at a time.

The benchmark replaces parts of the engine from outside. So the engine needs no switches that only a benchmark uses.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch.nn.functional as F
from generation_candidates import run_engine
from generation_workloads import Measurement, Workload, measure

from nemo_srl.engines import open_engine
from nemo_srl.engines.embedded import batching, engine, llama, sampling
from nemo_srl.engines.embedded.settings import EmbeddedSettings


@contextlib.contextmanager
def no_prefix_sharing() -> Iterator[None]:
    """Every sample prefills its whole prompt."""

    def separate(prompts: Sequence[tuple[int, ...]]) -> Any:
        segments = [batching.Segment(prompt, 0, None) for prompt in prompts]
        return segments, dict(zip(prompts, segments, strict=True))

    with mock.patch.object(engine, "prefix_tree", separate):
        yield


@contextlib.contextmanager
def no_compaction() -> Iterator[None]:
    """A sequence that has ended stays in its batch until the longest one has ended."""
    step = engine._Batch.step

    def wait(batch: Any, ends: Callable[[Any, list[int]], bool]) -> Any:
        finished = step(batch, lambda slot, tokens: False)
        rows = list(zip(batch.slots, batch.tokens, batch.logprobs, strict=True)) or finished
        reached = batch.__dict__.setdefault("reached", {})
        for slot, tokens, _ in rows:
            if ends(slot, tokens):
                reached.setdefault(slot.key, len(tokens))
        if not finished and len(reached) < len(rows):
            return []
        batch.slots = []
        return [(slot, tokens[: reached.get(slot.key)], logprobs) for slot, tokens, logprobs in rows]

    with mock.patch.object(engine._Batch, "step", wait):
        yield


@contextlib.contextmanager
def no_packed_weights() -> Iterator[None]:
    with mock.patch.object(llama, "make_linear", lambda weight: lambda x: F.linear(x, weight)):
        yield


@contextlib.contextmanager
def no_top_k_first() -> Iterator[None]:
    """Top-p sorts the whole vocabulary."""
    with mock.patch.object(sampling, "_NUM_CANDIDATES", ()):
        yield


def leave_one_out(workloads: Sequence[Workload], model_dir: Path, *, batch_size: int) -> list[Measurement]:
    variants: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
        "everything": contextlib.nullcontext,
        "without bfloat16": contextlib.nullcontext,
        "without prefix sharing": no_prefix_sharing,
        "without leaving the batch at the end": no_compaction,
        "without packed weights": no_packed_weights,
        "without topk before top-p": no_top_k_first,
    }
    found = []
    for name, patched in variants.items():
        with patched():
            dtype = "float32" if "bfloat16" in name else "bfloat16"
            embedded = open_engine(EmbeddedSettings(dtype=dtype, max_batch_size=batch_size), model_dir)
            found += [measure(name, w.name, partial(run_engine, embedded, w)) for w in workloads]
    return found
