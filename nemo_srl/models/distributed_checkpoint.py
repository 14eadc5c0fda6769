"""PyTorch distributed checkpoints, as megatron-core 0.10/0.11 reads and writes them, chunk by chunk.

A checkpoint has a `.metadata` file (the shape of every tensor, and where its chunks are) and `*.distcp` files of
chunks. megatron-core adds `common.pt` and `metadata.json`. A stacked tensor [num_layers, ...] is one tensor with a
chunk for each layer. So a model is written and read one layer at a time, through the planner interfaces of
`torch.distributed.checkpoint` and without a process group.

Chunks are read with `weights_only=True`. The format of `.metadata` is pickle. It is read by an unpickler that knows
the classes of which such a file is made, and refuses any other.
"""

from __future__ import annotations

import io
import json
import math
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.utils import _create_file_view

from nemo_srl.errors import ModelError
from nemo_srl.models.tensor_io import ahead

METADATA_FILE = ".metadata"
_MCORE_FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Chunk:
    """A block of the tensor `key` at `offsets`. `produce` makes it when it is to be written."""

    key: str
    tensor_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    produce: Callable[[], torch.Tensor]


def write_checkpoint(directory: Path, chunks: list[Chunk]) -> None:
    """Write `chunks` in their order into the existing, empty `directory`.

    In memory are the chunk that is written, the next one, and the last one of each key, which torch's writer keeps.
    The calls are those that `torch.distributed.checkpoint.save` makes for one process. Files are not forced to disk:
    the caller does that when it publishes the directory.
    """
    # With per_thread_copy_ahead=0 and one thread the writer asks for chunks in the plan's order, also with CUDA.
    writer = FileSystemWriter(directory, thread_count=1, sync_files=False, per_thread_copy_ahead=0)
    writer.set_up_storage_writer(True)
    items: list[WriteItem] = []
    tensors: dict[str, TensorStorageMetadata] = {}
    for chunk in chunks:
        place = ChunkStorageMetadata(offsets=torch.Size(chunk.offsets), sizes=torch.Size(chunk.shape))
        properties, size = TensorProperties(dtype=chunk.dtype), torch.Size(chunk.tensor_shape)
        index = MetadataIndex(chunk.key, torch.Size(chunk.offsets))
        items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=TensorWriteData(place, properties, size)))
        tensors.setdefault(chunk.key, TensorStorageMetadata(properties, size, [])).chunks.append(place)
    (plan,) = writer.prepare_global_plan([writer.prepare_local_plan(SavePlan(items))])
    with _without_checksums():
        results = writer.write_data(plan, _ChunkPlanner(chunks)).wait()
    torch.save({}, directory / "common.pt")
    (directory / "metadata.json").write_text(json.dumps(_MCORE_FORMAT), encoding="utf-8")
    writer.finish(Metadata(dict(tensors)), [results])  # writes .metadata, which makes it a checkpoint


@contextmanager
def _without_checksums() -> Iterator[None]:
    """Leave out the CRC of each chunk. It takes longer than writing the chunk, and torch never reads it."""
    serialization: Any = torch.serialization
    if not hasattr(serialization, "set_crc32_options"):  # torch < 2.6
        yield
        return
    before = serialization.get_crc32_options()
    serialization.set_crc32_options(False)
    try:
        yield
    finally:
        serialization.set_crc32_options(before)


class _ChunkPlanner(DefaultSavePlanner):
    """Makes each chunk when the storage writer asks for it."""

    def __init__(self, chunks: list[Chunk]) -> None:
        self._chunks = iter(chunks)
        self._tensors = ahead(chunk.produce() for chunk in chunks)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        chunk, tensor = next(self._chunks), next(self._tensors)
        assert (write_item.index.fqn, write_item.index.offset) == (chunk.key, chunk.offsets)
        assert (tuple(tensor.shape), tensor.dtype) == (chunk.shape, chunk.dtype), chunk.key
        return tensor


class CheckpointReader:
    """The tensors of a checkpoint directory. Reads any block of them, however they are cut into chunks."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._metadata = _read_metadata(directory)

    def tensor_keys(self) -> list[str]:
        """The name of every tensor, also of the optimizer's state."""
        found = self._metadata.state_dict_metadata
        return [name for name, kind in found.items() if isinstance(kind, TensorStorageMetadata)]

    def shape(self, key: str) -> tuple[int, ...]:
        return tuple(self._tensor(key).size)

    def dtype(self, key: str) -> torch.dtype:
        return self._tensor(key).properties.dtype

    def row_blocks(self, key: str, num_rows: int, *, max_bytes: int) -> Iterator[tuple[int, int]]:
        """Cut the first `num_rows` rows of a matrix into (first, past the last) along the stored chunks.

        A block larger than `max_bytes` is cut further. Its chunk is then loaded once for each part.
        """
        size, itemsize = self.shape(key), self.dtype(key).itemsize
        step = max(1, max_bytes // (size[1] * itemsize))
        starts = sorted({chunk.offsets[0] for chunk in self._tensor(key).chunks if chunk.offsets[0] < num_rows})
        for start, stop in zip(starts, [*starts[1:], num_rows], strict=True):
            for first in range(start, stop, step):
                yield first, min(first + step, stop)

    def read(self, key: str, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """The block of `shape` at `offsets` of the tensor, as stored."""
        wanted = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(shape))
        items = create_read_items_for_chunk_list(key, self._tensor(key), [wanted])
        if sum(item.lengths.numel() for item in items) != math.prod(shape):
            raise ModelError(
                f"{self._directory}: {key} is incomplete at {offsets}: its chunks do not cover it. The checkpoint was "
                "not saved to its end. Use an earlier one."
            )
        if len(items) == 1:  # the usual case, which needs no copy
            return _narrow(self._load_chunk(items[0]), items[0].storage_offsets, items[0].lengths)
        block = torch.empty(shape, dtype=self.dtype(key))
        for item in items:
            part = _narrow(self._load_chunk(item), item.storage_offsets, item.lengths)
            _narrow(block, item.dest_offsets, item.lengths).copy_(part)
        return block

    def _load_chunk(self, item: ReadItem) -> torch.Tensor:
        place = self._metadata.storage_data[item.storage_index]
        path = self._directory / place.relative_path
        if path.parent != self._directory or getattr(place, "transform_descriptors", None):
            raise ModelError(f"{self._directory}: keeps {item.storage_index.fqn} in a way that is not supported")
        try:
            with path.open("rb") as file:
                # Each chunk in a larger file is a `torch.save` of its own.
                chunk = _create_file_view(cast(io.IOBase, file), place.offset, place.length)
                tensor = torch.load(cast(IO[bytes], chunk), weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise ModelError(
                f"{path}: {item.storage_index.fqn} cannot be read from it ({error}). The file is missing or damaged: "
                "use another checkpoint."
            ) from error
        assert isinstance(tensor, torch.Tensor)
        return tensor

    def _tensor(self, key: str) -> TensorStorageMetadata:
        found = self._metadata.state_dict_metadata.get(key)
        if not isinstance(found, TensorStorageMetadata):
            names = [name for name in self.tensor_keys() if not name.startswith("optimizer")][:4]
            raise ModelError(
                f"{self._directory}: tensor {key} is not in this checkpoint, which holds {names}, ... Either it has "
                "another architecture (compare tie_word_embeddings in the template's config.json), or it holds only "
                "adapters, which must be merged first."
            )
        return found


def _narrow(tensor: torch.Tensor, offsets: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    for axis, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(axis, start, length)
    return tensor


def _read_metadata(directory: Path) -> Metadata:
    path = directory / METADATA_FILE
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except FileNotFoundError:
        raise ModelError(
            f"{directory}: no {METADATA_FILE} here, so this is no finished NeMo checkpoint. Give a `model_weights` "
            "directory or one of the trainer's checkpoints (...-last). An interrupted save has no such file."
        ) from None
    except (pickle.UnpicklingError, EOFError, AttributeError, LookupError) as error:
        raise ModelError(f"{path}: cannot be read ({error}). Use another checkpoint.") from error
    if not isinstance(metadata, Metadata) or metadata.storage_data is None:
        raise ModelError(f"{path}: is not the metadata of a distributed checkpoint. Use another checkpoint.")
    return metadata


class _MegatronBookkeeping:
    """Takes the place of what megatron-core adds to the metadata, its save plans. They are not needed here."""


def _enum_member(found: Any, name: str) -> Any:
    """Takes the place of `getattr`, by which some Pythons (3.11.2) pickle the members of an enumeration."""
    if isinstance(found, type) and issubclass(found, Enum):
        return found[name]
    if found is _MegatronBookkeeping:
        return found()
    raise pickle.UnpicklingError(f"refused getattr of {name!r}, which does not belong to checkpoint metadata")


class _MetadataUnpickler(pickle.Unpickler):
    """Builds plain data and the dataclasses of checkpoint metadata, and nothing that could run code."""

    _DATACLASS_MODULES = frozenset(
        f"torch.distributed.checkpoint.{name}" for name in ("metadata", "filesystem", "planner")
    )
    _OTHERS = frozenset(
        {
            ("builtins", "slice"),
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),
            ("pathlib._local", "PosixPath"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        if module.startswith("megatron.core.dist_checkpointing."):
            return _MegatronBookkeeping
        if (module, name) in self._OTHERS:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        if module in self._DATACLASS_MODULES and "." not in name:
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise pickle.UnpicklingError(f"refused {module}.{name}, which does not belong to checkpoint metadata")
