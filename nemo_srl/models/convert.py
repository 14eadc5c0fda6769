"""Hugging Face directory <-> NeMo distributed checkpoint, exactly and one layer at a time.

Weights are only moved. With the same dtype they keep their bits, so HF -> NeMo -> HF gives back what went in. Peak
memory is about two layers or two blocks of the embedding, however large the model is. Neither NeMo nor Megatron is
imported. Tensor and pipeline parallelism do not change the format: one layout can load what another one trained, and
both directions here run in one process.

Raises `ModelError`, before anything is written, for a model that is unsupported, incomplete or does not fit its
config. A result gets its final name by a rename when it is complete. A `<name>.partial` that a killed run left is
replaced.

Not covered: optimizer state, which is never read or written; adapters of others than our trainer; the fp32 master
weights of Megatron's bf16-O2 mode, which are in the optimizer's shards. Of such a training the model's own bf16
parameters are exported, which its forward pass used.
"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from nemo_srl import jsonio
from nemo_srl.errors import ModelError
from nemo_srl.models import families, nemo_layout
from nemo_srl.models.directories import fresh_partial, publish, refuse_existing
from nemo_srl.models.distributed_checkpoint import CheckpointReader, Chunk, write_checkpoint
from nemo_srl.models.hf import companions, read_spec
from nemo_srl.models.lora import ADAPTERS, Adapters
from nemo_srl.models.nemo_layout import Parameter
from nemo_srl.models.spec import ModelSpec
from nemo_srl.models.tensor_io import TensorReader, write_shards

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
    with ExitStack() as files:
        reader = TensorReader(hf_dir, files)
        chunks = _plan_chunks(reader, spec, padded_vocab, _check_weights(reader, hf_dir, spec, dtype))
        partial = fresh_partial(weights_dir)
        write_checkpoint(partial, chunks)
    publish(partial, weights_dir)


def nemo_to_hf(
    weights_dir: Path,
    hf_dir: Path,
    *,
    template_hf_dir: Path,
    adapters: Adapters | None = None,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
) -> None:
    """Write the Hugging Face directory `hf_dir` from a NeMo checkpoint.

    `weights_dir` is a `model_weights` directory or a training checkpoint (`...-last`), of which only the
    model's tensors are read. `template_hf_dir` is the model that the training started from. Config and
    tokenizer are copied from there, and `torch_dtype` is set to the dtype that was written. `dtype` None keeps each
    tensor's. Padded rows of the vocabulary are dropped. `adapters` are added to the weights.
    """
    spec = read_spec(template_hf_dir)
    refuse_existing(hf_dir)
    reader = CheckpointReader(weights_dir)
    parameters = _checked_parameters(reader, weights_dir, spec)
    if adapters:
        adapters.check({p.key: p.tensor_shape(spec) for p in parameters})
    plan = [(name, shape, dtype or reader.dtype(p.key)) for p in parameters for name, shape in p.hf_shapes.items()]
    partial = fresh_partial(hf_dir)
    write_shards(partial, plan, _hf_tensors(reader, parameters, spec, dtype, adapters), max_shard_bytes=max_shard_bytes)
    for path in companions(template_hf_dir):
        shutil.copyfile(path, partial / path.name)
    config = jsonio.loads((partial / "config.json").read_bytes())
    widest = max((written for _, _, written in plan), key=lambda written: written.itemsize)
    config["torch_dtype"] = str(widest).removeprefix("torch.")
    # Transformers 5 has these in `dtype` and `rope_parameters`. Version 4 reads only the older names, and would take
    # its defaults for what is missing.
    if "dtype" in config:
        config["dtype"] = config["torch_dtype"]
    if "rope_parameters" in config:
        config |= {"rope_theta": spec.rope_theta, "rope_scaling": spec.rope_scaling}
    text = jsonio.dumps(config, indent=2, sort_keys=True) + "\n"
    (partial / "config.json").write_text(text, encoding="utf-8")
    publish(partial, hf_dir)


def check_weights(hf_dir: Path, spec: ModelSpec) -> None:
    """Raise `ModelError` unless the weights of a directory are those that its config.json describes.

    Only the headers of the files are read.
    """
    with ExitStack() as files:
        _check_weights(TensorReader(hf_dir, files), hf_dir, spec, torch.float32)


def _check_weights(reader: TensorReader, hf_dir: Path, spec: ModelSpec, dtype: torch.dtype | None) -> torch.dtype:
    """Compare all names, shapes and types with those that `spec` needs; return the type to write."""
    shapes: dict[str, tuple[int, ...]] = {}
    for parameter in nemo_layout.parameters(spec, spec.vocab_size):
        shapes.update(parameter.hf_shapes)
    for name, shape in shapes.items():
        reader.check(name, shape)
    # Old checkpoints also hold the rotary frequencies, and some tied ones hold a copy of the embedding.
    derived = ("rotary_emb.inv_freq", *((families.of(spec).output,) if spec.tie_word_embeddings else ()))
    if unknown := sorted(n for n in reader.names() if n not in shapes and not n.endswith(derived)):
        raise ModelError(
            f"{hf_dir}: holds {unknown[0]}, which a {spec.model_type} model of this config.json has no place for. "
            "Without it, the result would be another model. Merge adapters first; further biases and norms are not "
            "supported."
        )
    dtypes = {reader.dtype(name) for name in shapes}
    if dtype is None and len(dtypes) > 1:
        raise ModelError(f"{hf_dir}: its tensors are of several types ({sorted(map(str, dtypes))}). Set dtype= to one.")
    return dtype or dtypes.pop()


def _plan_chunks(reader: TensorReader, spec: ModelSpec, padded_vocab: int, dtype: torch.dtype) -> list[Chunk]:
    chunks: list[Chunk] = []
    for parameter in nemo_layout.parameters(spec, padded_vocab):
        if parameter.padded:
            chunks.extend(_row_chunks(reader, parameter, dtype))
        else:
            produce = functools.partial(_fused, reader, spec, parameter, dtype)
            chunks.append(Chunk(parameter.key, parameter.tensor_shape(spec), *parameter.block, dtype, produce))
    return chunks


def _fused(reader: TensorReader, spec: ModelSpec, parameter: Parameter, dtype: torch.dtype) -> torch.Tensor:
    fused = torch.empty(parameter.shape, dtype=dtype)
    for source, view in nemo_layout.parts(parameter, fused, spec):
        reader.read_into(source.name, view, first_row=source.first_row)
    return fused.view(parameter.block[1])


def _row_chunks(reader: TensorReader, parameter: Parameter, dtype: torch.dtype) -> Iterator[Chunk]:
    ((name, (num_filled, columns)),) = parameter.hf_shapes.items()
    num_rows = parameter.shape[0]
    step = max(1, _BLOCK_BYTES // (columns * dtype.itemsize))
    for first in range(0, num_rows, step):
        shape = (min(step, num_rows - first), columns)

        def produce(first: int = first, shape: tuple[int, int] = shape) -> torch.Tensor:
            block = torch.empty(shape, dtype=dtype)
            filled, padding = block[: max(0, num_filled - first)], block[max(0, num_filled - first) :]
            if len(filled):
                reader.read_into(name, filled, first_row=first)
            padding.zero_()
            return block

        yield Chunk(parameter.key, parameter.shape, (first, 0), shape, dtype, produce)


def _checked_parameters(reader: CheckpointReader, weights_dir: Path, spec: ModelSpec) -> list[Parameter]:
    """All parameters, after every shape in the checkpoint was compared with the one that `spec` needs."""
    padded_vocab = reader.shape(nemo_layout.EMBEDDING)[0]
    if padded_vocab < spec.vocab_size:
        raise ModelError(
            f"{weights_dir}: its embedding has {padded_vocab} rows, but the template's vocab_size is "
            f"{spec.vocab_size}. The template must be the model that training started from."
        )
    parameters = nemo_layout.parameters(spec, padded_vocab)
    for parameter in parameters:
        found, expected = reader.shape(parameter.key), parameter.tensor_shape(spec)
        if found != expected:
            raise ModelError(
                f"{weights_dir}: {parameter.key} has shape {list(found)}, but the template's config asks for "
                f"{list(expected)}. The template must be the model that training started from."
            )
    known = {parameter.key for parameter in parameters}
    model_keys = ("model.decoder.", "model.embedding.", "model.output_layer.")
    if unknown := sorted(key for key in reader.tensor_keys() if key.startswith(model_keys) and key not in known):
        raise ModelError(
            f"{weights_dir}: holds {unknown[0]}, which a model of the template's config has no place for "
            f"(model_type={spec.model_type!r}, tie_word_embeddings={spec.tie_word_embeddings}, no adapters). Without "
            "it, the result would be another model. Use the template that training started from, and merge adapters "
            "first."
        )
    return parameters


def _hf_tensors(
    reader: CheckpointReader,
    parameters: list[Parameter],
    spec: ModelSpec,
    dtype: torch.dtype | None,
    adapters: Adapters | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    for parameter in parameters:
        target = dtype or reader.dtype(parameter.key)
        if parameter.padded:
            ((name, (num_rows, columns)),) = parameter.hf_shapes.items()
            for first, last in reader.row_blocks(parameter.key, num_rows, max_bytes=_BLOCK_BYTES):
                yield name, reader.read(parameter.key, (first, 0), (last - first, columns)).to(target)
        else:
            fused = reader.read(parameter.key, *parameter.block).view(parameter.shape)
            if adapters and parameter.layer is not None and parameter.key in ADAPTERS:
                fused = adapters.merged(parameter.key, parameter.layer, fused)
            for source, view in nemo_layout.parts(parameter, fused, spec):
                yield source.name, view.to(target)
