"""Hugging Face directory <-> NeMo distributed checkpoint, exactly and one layer at a time.

Weights are only moved. With the same dtype they keep their bits, so HF -> NeMo -> HF gives back what went in. Peak
memory is about two layers or two blocks of the embedding, however large the model is. Neither NeMo nor Megatron is
imported. Tensor and pipeline parallelism do not change the format: one layout can load what another one trained, and
both directions here run in one process.

Raises `ModelError`, before anything is written, for a model that is unsupported, incomplete or does not fit its
config. A result gets its final name by a rename when it is complete. A `<name>.partial` that a killed run left is
replaced.

Not covered: optimizer state, which is never read or written; adapters, which must be merged first; the fp32 master
weights of Megatron's bf16-O2 mode, which are in the optimizer's shards. Of such a training the model's own bf16
parameters are exported, which its forward pass used.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nemo_srl.errors import ModelError
from nemo_srl.models import families, nemo_layout
from nemo_srl.models.directories import fresh_partial, publish, refuse_existing
from nemo_srl.models.distributed_checkpoint import CheckpointReader, Chunk, write_checkpoint
from nemo_srl.models.hf import COMPANION_FILES, read_spec
from nemo_srl.models.nemo_layout import Parameter
from nemo_srl.models.spec import ModelSpec
from nemo_srl.models.tensor_io import ShardedWriter, TensorReader

_PREFIX = "model."
_BLOCK_BYTES = 256 * 1024 * 1024
"""Embeddings are moved in blocks of rows of about this size, since Llama 3's is larger than one of its layers."""


def hf_to_nemo(
    hf_dir: Path,
    weights_dir: Path,
    *,
    dtype: torch.dtype | None = None,
    tensor_model_parallel_size: int = 1,
    make_vocab_size_divisible_by: int = 128,
) -> None:
    """Write `weights_dir` (NeMo's `model_weights/`) from a Hugging Face directory.

    `dtype` None keeps the model's. The embedding gets as many rows as NeMo computes from
    `tensor_model_parallel_size` and `make_vocab_size_divisible_by`; the additional rows are zero. NeMo's softmax
    includes those rows: each adds exp(0) to the denominator. With a divisor that makes padding unnecessary, NeMo
    trains exactly the Hugging Face model.
    """
    spec = read_spec(hf_dir)
    padded_vocab = nemo_layout.padded_vocab_size(
        spec.vocab_size,
        tensor_model_parallel_size=tensor_model_parallel_size,
        divisible_by=make_vocab_size_divisible_by,
    )
    refuse_existing(weights_dir)
    with TensorReader(hf_dir) as reader:
        chunks = _plan_chunks(reader, spec, padded_vocab, _check_weights(reader, hf_dir, spec, dtype))
        partial = fresh_partial(weights_dir)
        write_checkpoint(partial, chunks)
    publish(partial, weights_dir)


def nemo_to_hf(
    weights_dir: Path,
    hf_dir: Path,
    *,
    template_hf_dir: Path,
    dtype: torch.dtype | None = None,
    prefix: str = _PREFIX,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write the Hugging Face directory `hf_dir` from a NeMo checkpoint.

    `weights_dir` is a `model_weights` directory or a training checkpoint (`...-last`), of which only the
    tensors under `prefix` are read. `template_hf_dir` is the model that the training started from. Config and
    tokenizer are copied from there, and `torch_dtype` is set to the dtype that was written. `dtype` None keeps each
    tensor's. Padded rows of the vocabulary are dropped.
    """
    spec = read_spec(template_hf_dir)
    refuse_existing(hf_dir)
    reader = CheckpointReader(weights_dir)
    parameters = _checked_parameters(reader, weights_dir, spec, prefix)
    plan = [
        (name, shape, dtype or reader.dtype(prefix + parameter.key))
        for layer, parameter in parameters
        for name, shape in zip(_hf_names(parameter, layer), parameter.hf_shapes, strict=True)
    ]
    partial = fresh_partial(hf_dir)
    writer = ShardedWriter(partial, plan, max_shard_bytes=max_shard_bytes)
    writer.write(_hf_tensors(reader, parameters, spec, prefix, dtype))
    _copy_companions(template_hf_dir, partial, {dtype for _, _, dtype in plan})
    publish(partial, hf_dir)


_Located = tuple[int | None, Parameter]
"""A parameter and its layer; the layer is None outside the layers."""


def _all_parameters(spec: ModelSpec, padded_vocab: int) -> list[_Located]:
    """In Hugging Face's order: embedding, layers, norm, output layer."""
    first, *last = nemo_layout.whole_parameters(spec, padded_vocab)
    layer_parameters = nemo_layout.layer_parameters(spec)
    layers = [(layer, p) for layer in range(spec.num_layers) for p in layer_parameters]
    return [(None, first), *layers, *((None, p) for p in last)]


def _hf_names(parameter: Parameter, layer: int | None) -> list[str]:
    return [name.format(layer=layer) for name in parameter.hf_names]


def _check_weights(reader: TensorReader, hf_dir: Path, spec: ModelSpec, dtype: torch.dtype | None) -> torch.dtype:
    """Compare all names, shapes and types with those that `spec` needs; return the type to write."""
    shapes = {
        name: shape
        for layer, parameter in _all_parameters(spec, spec.vocab_size)
        for name, shape in zip(_hf_names(parameter, layer), parameter.hf_shapes, strict=True)
    }
    for name, shape in shapes.items():
        reader.check(name, shape)
    # Old checkpoints also hold the rotary frequencies, and some tied ones hold a copy of the embedding.
    derived = ("rotary_emb.inv_freq", *((families.of(spec).output,) if spec.tie_word_embeddings else ()))
    if unknown := sorted(n for n in reader.names() if n not in shapes and not n.endswith(derived)):
        raise ModelError(
            f"{hf_dir}: holds {unknown[0]}, which a {spec.model_type} model of this config.json has no place for. "
            "Without it, the result would be another model. Merge adapters first; biases and extra norms are not "
            "supported."
        )
    dtypes = {reader.dtype(name) for name in shapes}
    if dtype is None and len(dtypes) > 1:
        raise ModelError(f"{hf_dir}: its tensors are of several types ({sorted(map(str, dtypes))}). Set dtype= to one.")
    return dtype or dtypes.pop()


def _plan_chunks(reader: TensorReader, spec: ModelSpec, padded_vocab: int, dtype: torch.dtype) -> list[Chunk]:
    chunks: list[Chunk] = []
    for layer, parameter in _all_parameters(spec, padded_vocab):
        if parameter.stacked:
            chunks.append(_layer_chunk(reader, spec, parameter, layer, dtype))
        elif parameter.padded:
            chunks.extend(_row_chunks(reader, parameter, dtype))
        else:
            chunks.append(_whole_chunk(reader, parameter, dtype))
    return chunks


def _layer_chunk(
    reader: TensorReader, spec: ModelSpec, parameter: Parameter, layer: int | None, dtype: torch.dtype
) -> Chunk:
    assert layer is not None

    def produce() -> torch.Tensor:
        fused = torch.empty(parameter.shape, dtype=dtype)
        for name, view in zip(_hf_names(parameter, layer), nemo_layout.parts(parameter, fused, spec), strict=True):
            reader.read_into(name, view)
        return fused.unsqueeze(0)

    return Chunk(
        key=_PREFIX + parameter.key,
        tensor_shape=(spec.num_layers, *parameter.shape),
        offsets=(layer, *(0 for _ in parameter.shape)),
        shape=(1, *parameter.shape),
        dtype=dtype,
        produce=produce,
    )


def _whole_chunk(reader: TensorReader, parameter: Parameter, dtype: torch.dtype) -> Chunk:
    def produce() -> torch.Tensor:
        tensor = torch.empty(parameter.shape, dtype=dtype)
        reader.read_into(parameter.hf_names[0], tensor)
        return tensor

    origin = tuple(0 for _ in parameter.shape)
    return Chunk(_PREFIX + parameter.key, parameter.shape, origin, parameter.shape, dtype, produce)


def _row_chunks(reader: TensorReader, parameter: Parameter, dtype: torch.dtype) -> Iterator[Chunk]:
    (num_rows, *rest), num_filled = parameter.shape, parameter.hf_shapes[0][0]
    step = max(1, _BLOCK_BYTES // (rest[0] * dtype.itemsize))
    for first in range(0, num_rows, step):
        last = min(first + step, num_rows)

        def produce(first: int = first, last: int = last) -> torch.Tensor:
            block = torch.empty((last - first, *rest), dtype=dtype)
            num_read = max(0, min(last, num_filled) - first)
            if num_read:
                reader.read_into(parameter.hf_names[0], block[:num_read], first_row=first)
            block[num_read:] = 0
            return block

        shape = (last - first, *rest)
        yield Chunk(_PREFIX + parameter.key, parameter.shape, (first, 0), shape, dtype, produce)


def _checked_parameters(reader: CheckpointReader, weights_dir: Path, spec: ModelSpec, prefix: str) -> list[_Located]:
    """All parameters, after every shape in the checkpoint was compared with the one that `spec` needs."""
    padded_vocab = reader.shape(prefix + nemo_layout.whole_parameters(spec, 0)[0].key)[0]
    if padded_vocab < spec.vocab_size:
        raise ModelError(
            f"{weights_dir}: its embedding has {padded_vocab} rows, but the template's vocab_size is "
            f"{spec.vocab_size}. The template must be the model that training started from."
        )
    parameters = _all_parameters(spec, padded_vocab)
    for _, parameter in parameters:
        expected = (spec.num_layers, *parameter.shape) if parameter.stacked else parameter.shape
        found = reader.shape(prefix + parameter.key)
        if found != expected:
            raise ModelError(
                f"{weights_dir}: {prefix + parameter.key} has shape {list(found)}, but the template's config asks for "
                f"{list(expected)}. The template must be the model that training started from."
            )
    known = {prefix + parameter.key for _, parameter in parameters}
    model_keys = tuple(prefix + start for start in ("decoder.", "embedding.", "output_layer."))
    if unknown := sorted(key for key in reader.tensor_keys() if key.startswith(model_keys) and key not in known):
        raise ModelError(
            f"{weights_dir}: holds {unknown[0]}, which a model of the template's config has no place for "
            f"(tie_word_embeddings={spec.tie_word_embeddings}, no biases, no adapters). Without it, the result would "
            "be another model. Use the template that training started from, and merge adapters first."
        )
    return parameters


def _hf_tensors(
    reader: CheckpointReader, parameters: list[_Located], spec: ModelSpec, prefix: str, dtype: torch.dtype | None
) -> Iterator[tuple[str, torch.Tensor]]:
    for layer, parameter in parameters:
        key = prefix + parameter.key
        target = dtype or reader.dtype(key)
        if parameter.padded:
            (shape,) = parameter.hf_shapes
            for first, last in reader.row_blocks(key, shape[0], max_bytes=_BLOCK_BYTES):
                yield parameter.hf_names[0], reader.read(key, (first, 0), (last - first, shape[1])).to(target)
            continue
        origin = tuple(0 for _ in parameter.shape)
        if parameter.stacked:
            assert layer is not None
            fused = reader.read(key, (layer, *origin), (1, *parameter.shape)).squeeze(0)
        else:
            fused = reader.read(key, origin, parameter.shape)
        for name, view in zip(_hf_names(parameter, layer), nemo_layout.parts(parameter, fused, spec), strict=True):
            yield name, view.to(target)


def _copy_companions(template_hf_dir: Path, directory: Path, dtypes: set[torch.dtype]) -> None:
    for name in COMPANION_FILES:
        if (template_hf_dir / name).is_file():
            shutil.copyfile(template_hf_dir / name, directory / name)
    path = directory / "config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    widest = max(dtypes, key=lambda dtype: dtype.itemsize)
    config["torch_dtype"] = str(widest).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
