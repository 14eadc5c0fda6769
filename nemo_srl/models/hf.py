"""Hugging Face model directories: what is in one, and whether this package can work with it.

Only small files and safetensors headers are read here. No tensor is read, and torch is not imported. A directory that
cannot be used raises `ModelError` with the path, the reason and the remedy: an architecture of no known family,
biases, quantised weights, weights that are pickles, missing or truncated files.

Not covered: whether the tokenizer fits the weights.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, cast

from nemo_srl import jsonio
from nemo_srl.errors import ConfigError, ModelError
from nemo_srl.models import families
from nemo_srl.models.spec import ModelSpec as ModelSpec

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
COMPANION_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
"""The files of a model directory beside its weights. All of them are copied with a model and are in its digest."""

_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
_SAMPLE_BYTES = 16 * 1024
_SAMPLES_PER_TENSOR = 4


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in a safetensors file: bytes [begin, end) from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_spec(model_dir: Path) -> ModelSpec:
    """Read `config.json` and `generation_config.json`, and check that weights and tokenizer are there.

    Raises `ModelError` for everything that the head of this file lists, except for the contents of the weights.
    """
    if not model_dir.is_dir():
        raise ModelError(
            f"{model_dir}: no such directory. Give the path of a Hugging Face model directory that holds "
            f"config.json, *.safetensors and a tokenizer. {families.supported()}"
        )
    spec = read_shape(model_dir)
    for names in (("tokenizer.json", "tokenizer.model"), ("tokenizer_config.json",)):
        if not any((model_dir / name).is_file() for name in names):
            raise ModelError(
                f"{model_dir}: {' or '.join(names)} is missing, so there is no tokenizer. Copy it from where "
                "the model came from, or write it with tokenizer.save_pretrained(this directory)."
            )
    shard_paths(model_dir)
    return spec


def read_shape(model_dir: Path) -> ModelSpec:
    """What `config.json` and `generation_config.json` alone say, so that a model can be planned for before it is there.

    `quantization_config` is refused here: it is about the weights, whatever the family.
    """
    path = model_dir / "config.json"
    config = _read_json(path)
    try:
        spec = families.read_spec(config)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    if (quantization := config.get("quantization_config")) is not None:
        raise ModelError(f"{path}: quantization_config={quantization!r} is not supported. {families.supported()}")
    return replace(spec, eos_token_ids=_eos_token_ids(model_dir, config))


def companions(model_dir: Path) -> list[Path]:
    """Those of `COMPANION_FILES` that this model has."""
    return [path for name in COMPANION_FILES if (path := model_dir / name).is_file()]


def shard_paths(model_dir: Path) -> list[Path]:
    """The safetensors files of the model, sorted. Raises `ModelError` if one is missing."""
    index = model_dir / INDEX_FILE
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index}: has no weight_map. The download is damaged: fetch this file again.")
        names = sorted({str(name) for name in weight_map.values()})
        if outside := [name for name in names if Path(name).name != name]:
            raise ModelError(
                f"{index}: names {outside[0]!r}, which is not a plain file name, so it is not read. Use a model from a "
                "place that you trust."
            )
    else:
        names = [SINGLE_FILE]
    missing = [name for name in names if not (model_dir / name).is_file()]
    if not missing:
        return [model_dir / name for name in names]
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in model_dir.glob(pattern))
    if pickles and not index.is_file():
        raise ModelError(
            f"{model_dir}: its weights are pickles ({pickles[0]}), which can run code when they are loaded. So "
            "they are not read. If you trust them, save them once as safetensors: "
            "AutoModelForCausalLM.from_pretrained(src).save_pretrained(dst, safe_serialization=True)"
        )
    raise ModelError(
        f"{model_dir}: {missing[0]} is missing"
        + (f" ({len(missing)} of the {len(names)} files that {INDEX_FILE} names)" if index.is_file() else "")
        + ". Copy or download the directory again, completely."
    )


def tensor_index(model_dir: Path) -> dict[str, Path]:
    """Every tensor's name and the file that holds it. Read from the headers, not from the index file."""
    found: dict[str, Path] = {}
    for path in shard_paths(model_dir):
        for name in read_header(path):
            if name in found:
                raise ModelError(f"{path}: holds {name}, which {found[name].name} holds too. Remove one of them.")
            found[name] = path
    return found


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, in the order in which they lie there.

    Raises `ModelError` for a file that is not safetensors or is shorter or longer than its header says.
    """
    with path.open("rb") as file:
        start, header = _raw_header(path, file)
    try:
        entries = []
        for name, info in jsonio.loads(header).items():
            if name != "__metadata__":
                begin, end = (start + int(offset) for offset in info["data_offsets"][:2])
                shape = tuple(int(n) for n in info["shape"])
                entries.append(TensorEntry(name, str(info["dtype"]), shape, begin, end))
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ModelError(
            f"{path}: is not a safetensors file, or is damaged (its header is unreadable: {error}). Copy or download "
            "it again."
        ) from error
    entries.sort(key=lambda entry: entry.begin)
    expected = max((entry.end for entry in entries), default=start)
    if any(not start <= entry.begin <= entry.end for entry in entries) or path.stat().st_size != expected:
        raise ModelError(
            f"{path}: has {path.stat().st_size} bytes where its header asks for {expected}. The file is cut off "
            "or damaged: copy or download it again."
        )
    return {entry.name: entry for entry in entries}


def digest(model_dir: Path) -> str:
    """A hex SHA-256 that tells models apart at the cost of a few megabytes read, never all weights.

    It covers the companion files and the headers in full, and 4 evenly spaced blocks of 16 KiB of each tensor (all of a
    tensor of up to 64 KiB). A training step changes nearly every element of every tensor, so two trainings differ in
    these blocks. An edit of single elements by hand can stay unnoticed: the digest tells models apart, it does not
    protect against tampering.
    """
    total = hashlib.sha256()
    for path in companions(model_dir):
        total.update(f"{path.name}\0".encode())
        total.update(hashlib.sha256(path.read_bytes()).digest())
    for path in shard_paths(model_dir):
        entries = read_header(path)
        total.update(f"{path.name}\0{path.stat().st_size}\0".encode())
        with path.open("rb") as file:
            total.update(_raw_header(path, file)[1])
            for entry in entries.values():
                _hash_samples(file, entry, total)
    return total.hexdigest()


def _hash_samples(file: BinaryIO, entry: TensorEntry, total: hashlib._Hash) -> None:
    size = entry.end - entry.begin
    if size <= _SAMPLE_BYTES * _SAMPLES_PER_TENSOR:
        starts, length = [0], size
    else:
        step = (size - _SAMPLE_BYTES) // (_SAMPLES_PER_TENSOR - 1)
        starts, length = [i * step for i in range(_SAMPLES_PER_TENSOR)], _SAMPLE_BYTES
    for start in starts:
        file.seek(entry.begin + start)
        total.update(file.read(length))


def _raw_header(path: Path, file: BinaryIO) -> tuple[int, bytes]:
    """The offset of the first byte of the data, and the header's JSON."""
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER_BYTES + 1
    header = file.read(length) if length <= _MAX_HEADER_BYTES else b""
    if len(header) != length:
        raise ModelError(
            f"{path}: is not a safetensors file, or is cut off. If it is a Git LFS pointer of a few hundred bytes, "
            "run `git lfs pull`; otherwise copy or download it again."
        )
    return 8 + length, header


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
        if content.startswith(b"version https://git-lfs"):
            raise ModelError(f"{path}: is a pointer of Git LFS, and not the file. `git lfs pull` fetches the file.")
        value = jsonio.loads(content)
    except FileNotFoundError:
        raise ModelError(f"{path}: is missing. A Hugging Face model has this file. {families.supported()}") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror}). Make it readable, or copy it again.") from error
    except ValueError as error:
        raise ModelError(f"{path}: is not valid JSON ({error}). Copy or download it again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}. Copy or download it again.")
    return cast(dict[str, Any], value)


def check_end(model_dir: Path, spec: ModelSpec, token_id: int | None, where: str) -> None:
    """Raise `ConfigError` unless generation ends at this token, which ends a response `where` it is."""
    if token_id in spec.eos_token_ids:
        return
    ids = [i for i in (token_id, *spec.eos_token_ids) if i is not None]
    raise ConfigError(
        f"eos_token_id={token_id} {where} of {model_dir}: generation ends at {spec.eos_token_ids} (eos_token_id in "
        "generation_config.json, or else in config.json), so a model that ends its responses with the other token "
        f"would never stop. Set eos_token_id in generation_config.json to {ids} (make the file if there is none), or "
        "use the tokenizer and the chat template that belong to this model."
    )


def _eos_token_ids(model_dir: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """`generation_config.json` comes first: Llama 3 Instruct lists several ids there and one in config.json."""
    generation = model_dir / "generation_config.json"
    for source in (_read_json(generation) if generation.is_file() else {}, config):
        value = source.get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        if ids and all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            return tuple(ids)
    raise ModelError(
        f"{model_dir}: neither generation_config.json nor config.json has an eos_token_id, so generation would "
        "never end. Add it to generation_config.json."
    )
