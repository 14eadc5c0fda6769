"""Decoding steps that are recorded as CUDA graphs, so that a GPU need not wait for Python.

A step of a small model is hundreds of short kernels. Python starts them more slowly than the GPU runs them. A CUDA
graph starts all of them at once. It records addresses and shapes, and no values. So the batch lives in buffers that
stay where they are, and shapes are rounded up: the rows of the batch to `_row_bucket`, the columns of attention to
multiples of 128. Rows that are only there because of the rounding compute something, and nobody reads it.

The first step of a shape runs as it is. It warms up the kernels. The second one is recorded, and from then on the
recording is replayed, also in later batches. A larger batch needs larger buffers. Then the recordings begin again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from nemo_srl.engines.embedded.kv_cache import KVCache, round_up
from nemo_srl.engines.embedded.llama import LlamaModel
from nemo_srl.errors import EngineError

Capture = Callable[[Callable[[], None]], Callable[[], object]]
"""Records a function without running it, and returns what runs it again."""

_WIDTH_BLOCK = 128
"""Wider blocks read more masked columns. Narrower ones need more graphs."""


@dataclass
class _Buffers:
    """What stays at one place, and what was recorded on it by (rows, width)."""

    cache: KVCache
    tokens: Tensor
    positions: Tensor
    logits: Tensor
    warm: set[tuple[int, int]] = field(default_factory=set)
    replays: dict[tuple[int, int], Callable[[], object]] = field(default_factory=dict)


class GraphedSteps:
    """Takes the place of `new_cache` and `decode` of a model, for one batch at a time."""

    def __init__(self, model: LlamaModel, capture: Capture) -> None:
        self._model = model
        self._capture = capture
        self._buffers: _Buffers | None = None

    @torch.inference_mode()
    def new_cache(self, *, num_rows: int, max_prompt: int, max_tokens: int) -> KVCache:
        """See `LlamaModel.new_cache`. It is the cache of the batch before, which must be over."""
        rows, capacity = _row_bucket(num_rows), round_up(round_up(max_prompt) + max_tokens, _WIDTH_BLOCK)
        if self._buffers is not None:
            cache = self._buffers.cache
            rows, capacity = max(rows, cache.max_rows), max(capacity, cache.capacity)
            if (rows, capacity) != (cache.max_rows, cache.capacity):
                del cache
                self._buffers = None  # the old buffers and the new ones would not fit together
        if self._buffers is None:
            self._buffers = self._allocate(rows, capacity)
        self._buffers.cache.begin(num_rows, max_prompt)
        return self._buffers.cache

    def _allocate(self, max_rows: int, capacity: int) -> _Buffers:
        model = self._model
        return _Buffers(
            cache=model.allocate_cache(max_rows, capacity),
            tokens=model.tensor([0] * max_rows),
            positions=model.tensor([0] * max_rows),
            logits=torch.zeros(max_rows, model.spec.vocab_size, dtype=model.dtype, device=model.device),
        )

    @torch.inference_mode()
    def decode(self, tokens: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """See `LlamaModel.decode`. The result is valid up to the next call."""
        buffers, num_rows = self._buffers, len(tokens)
        assert buffers is not None
        assert cache is buffers.cache, "the cache of another batch"
        buffers.tokens[:num_rows], buffers.positions[:num_rows] = tokens, positions
        cache.open_column()
        shape = _row_bucket(num_rows), round_up(cache.column, _WIDTH_BLOCK)
        step = partial(self._step, buffers, *shape)
        if shape in buffers.warm and shape not in buffers.replays:
            buffers.replays[shape] = self._capture(step)
        buffers.warm.add(shape)
        buffers.replays.get(shape, step)()
        return buffers.logits[:num_rows]

    def _step(self, buffers: _Buffers, rows: int, width: int) -> None:
        tokens, positions = buffers.tokens[:rows], buffers.positions[:rows]
        buffers.logits[:rows] = self._model.step(tokens, positions, buffers.cache, width=width)


class CudaGraphs:
    """Records with CUDA graphs. All graphs share one pool of memory, since only one of them runs at a time."""

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], None]) -> Callable[[], object]:
        """Raises `EngineError` if CUDA cannot record the function."""
        try:
            return self._record(function)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:
            raise EngineError(
                f"engine.cuda_graphs=true: a decoding step could not be recorded as a CUDA graph. Set "
                f"engine.cuda_graphs=false, which gives the same text, and is slower. ({e})"
            ) from e

    def _record(self, function: Callable[[], None]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        # `torch.cuda.graph` would do the same, and also collect garbage and empty the allocator's cache each time.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                function()
            finally:
                graph.capture_end()
        current.wait_stream(self._stream)
        return graph.replay


def _row_bucket(num_rows: int) -> int:
    """Multiples of 8 for small batches and of 32 for large ones, so that few graphs cover all sizes."""
    return round_up(num_rows, 8 if num_rows <= 64 else 32)
