"""Reads and writes safetensors files one tensor at a time, with memory for two tensors.

The safetensors library maps whole files, and every page that was touched counts as resident. `save_file` needs all
tensors of a file in memory. For a 70B model that is a shard of 5 GB, and in float32 an embedding of 4 GB as a whole,
where this keeps two blocks of 256 MB. It also sorts tensors in a way of its own, which would change `hf.digest` of
every model. The format is simple: a length, a JSON header and raw bytes. So this uses plain reads, and writes the
header first, since all shapes are known beforehand. Raises `ModelError` for unexpected names, shapes or types.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import TypeVar, cast

import torch

from nemo_srl.errors import ModelError
from nemo_srl.models.hf import INDEX_FILE, SINGLE_FILE, TensorEntry, read_header, shard_paths

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


_T = TypeVar("_T")


def ahead(source: Iterable[_T]) -> Iterator[_T]:
    """The items of `source`. A thread makes the next one while the caller uses this one; two exist at most."""
    iterator, end = iter(source), object()
    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(next, iterator, end)
        while (item := future.result()) is not end:
            future = pool.submit(next, iterator, end)
            yield cast(_T, item)


class TensorReader:
    """Tensors of a model directory by name. Closing `files` closes what it reads from."""

    def __init__(self, model_dir: Path, files: ExitStack) -> None:
        self._entries: dict[str, tuple[TensorEntry, FileIO]] = {}
        for path in shard_paths(model_dir):
            file = files.enter_context(path.open("rb", buffering=0))
            self._entries.update({name: (entry, file) for name, entry in read_header(path).items()})
        self._model_dir = model_dir

    def names(self) -> list[str]:
        return list(self._entries)

    def dtype(self, name: str) -> torch.dtype:
        entry = self._entry(name)[0]
        if entry.dtype not in DTYPES:
            raise ModelError(
                f"{self._model_dir}: {name} has the type {entry.dtype}, and only {sorted(DTYPES)} are supported. "
                "Dequantise the weights first."
            )
        return DTYPES[entry.dtype]

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Raise `ModelError` unless the tensor exists with this shape and a supported type."""
        entry = self._entry(name)[0]
        self.dtype(name)
        if entry.shape != tuple(shape):
            raise ModelError(
                f"{self._model_dir}: {name} has shape {list(entry.shape)}, but config.json asks for {list(shape)}. "
                "Weights and config are not of the same model: copy both from the same place."
            )

    def read_into(self, name: str, out: torch.Tensor, *, first_row: int = 0) -> None:
        """Fill `out` with the tensor's elements in their order, from `first_row` on, converted to its type."""
        entry, file = self._entry(name)
        target = out
        if out.dtype != self.dtype(name) or not out.is_contiguous():
            target = torch.empty(out.shape, dtype=self.dtype(name))
        view = target.view(-1).view(torch.uint8).numpy().data
        begin = entry.begin + first_row * math.prod(entry.shape[1:]) * target.itemsize
        assert begin + len(view) <= entry.end, name
        file.seek(begin)
        while view:
            count = file.readinto(view)
            if not count:
                raise ModelError(f"{self._model_dir}: {name} ends early. The file was changed while it was read.")
            view = view[count:]
        if target is not out:
            out.copy_(target)

    def _entry(self, name: str) -> tuple[TensorEntry, FileIO]:
        try:
            return self._entries[name]
        except KeyError:
            raise ModelError(
                f"{self._model_dir}: tensor {name} is missing from the weights, but config.json asks for it. Weights "
                "and config are not of the same model, or a shard is missing: copy the directory again."
            ) from None


_Announced = tuple[str, tuple[int, ...], torch.dtype]
"""Name, shape and type of a tensor that is to come."""


def write_shards(
    directory: Path,
    plan: Sequence[_Announced],
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write `tensors`, in the order of `plan`, into safetensors shards of a new directory.

    A tensor may come as several blocks of rows, one after the other, each with the tensor's name. The next one is made
    while one is written. A shard ends before it would exceed `max_shard_bytes`; a larger tensor gets a shard of its
    own. With more than one shard there is an index file, as transformers writes it.
    """
    source = ahead(tensors)
    shards = _split_shards(plan, max_shard_bytes)
    count = len(shards)
    names = [SINGLE_FILE if count == 1 else f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    for name, shard in zip(names, shards, strict=True):
        _write_shard(directory / name, shard, source)
    assert next(source, None) is None, "more tensors than announced"
    if count > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor, _, _ in shard}
        total = sum(_num_bytes(shape, dtype) for _, shape, dtype in plan)
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _num_bytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _split_shards(plan: Sequence[_Announced], max_shard_bytes: int) -> list[list[_Announced]]:
    shards: list[list[_Announced]] = [[]]
    size = 0
    for name, shape, dtype in plan:
        num_bytes = _num_bytes(shape, dtype)
        if shards[-1] and size + num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append((name, shape, dtype))
        size += num_bytes
    return shards


def _write_shard(path: Path, shard: Sequence[_Announced], source: Iterator[tuple[str, torch.Tensor]]) -> None:
    # transformers refuses a file whose metadata does not name the framework that wrote it.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, shape, dtype in shard:
        end = position + _num_bytes(shape, dtype)
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data begins at a multiple of 8, as the format asks
    with path.open("wb", buffering=0) as file:
        _write_all(file, memoryview(struct.pack("<Q", len(text)) + text))
        for name, shape, dtype in shard:
            remaining = _num_bytes(shape, dtype)
            while remaining:
                given, block = next(source)
                remaining -= block.nbytes
                assert given == name, (given, name)
                assert block.dtype == dtype, name
                assert remaining >= 0, name
                _write_all(file, block.contiguous().view(-1).view(torch.uint8).numpy().data)


def _write_all(file: FileIO, view: memoryview) -> None:
    while view:
        view = view[file.write(view) :]
