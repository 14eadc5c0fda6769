"""Hugging Face Llama directories: what is in one, and whether this package can work with it.

Only small files and safetensors headers are read here; no tensor is, and torch is not imported. Whatever
cannot be used raises `ModelError` with the path, the reason and the remedy: another architecture,
biases, quantised weights, weights that are pickles, missing or truncated files.

Not covered: whether the tokenizer fits the weights, and any architecture but Llama's.
"""

from __future__ import annotations

import hashlib
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from nemo_srl.errors import ModelError

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
"""What makes up a model directory beside its weights; the same list is copied and digested."""

_SUPPORTED = (
    "Supported is LlamaForCausalLM (Llama 2, Llama 3.x, SmolLM2, TinyLlama, ...) with hidden_act=silu, without "
    "biases and without quantization, in safetensors format."
)
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself
_SAMPLE_BYTES = 16 * 1024
_SAMPLES_PER_TENSOR = 4


@dataclass(frozen=True)
class ModelSpec:
    """The shape of a Llama model, by the names of its `config.json` where Megatron has no other.

    `num_query_groups` is Megatron's name for the number of key-value heads. `head_dim` need not be
    hidden_size / num_attention_heads (Megatron: `kv_channels`). `torch_dtype` is a name such as
    "bfloat16". Generation ends at any of `eos_token_ids`.
    """

    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: dict[str, Any] | None
    rms_norm_eps: float
    tie_word_embeddings: bool
    torch_dtype: str
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class TensorEntry:
    """Where one tensor lies in a safetensors file: bytes [begin, end) from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_spec(model_dir: Path) -> ModelSpec:
    """Read `config.json` and `generation_config.json`, and see that weights and tokenizer are there.

    Raises `ModelError` for all that the head of this file lists, except the contents of the weights.
    """
    if not model_dir.is_dir():
        raise ModelError(
            f"{model_dir}: no such directory. Give the path of a Hugging Face model directory that holds "
            f"config.json, *.safetensors and a tokenizer. {_SUPPORTED}"
        )
    spec = read_shape(model_dir)
    _check_tokenizer(model_dir)
    shard_paths(model_dir)
    return spec


def read_shape(model_dir: Path) -> ModelSpec:
    """What `config.json` and `generation_config.json` alone say: a model can be planned for before it is there."""
    config = _read_json(model_dir / "config.json", "a Hugging Face model directory has one")
    _check_architecture(model_dir, config)
    heads = _positive(model_dir, config, "num_attention_heads")
    hidden = _positive(model_dir, config, "hidden_size")
    groups = _positive(model_dir, config, "num_key_value_heads", heads)
    if heads % groups:
        raise ModelError(
            f"{model_dir / 'config.json'}: num_attention_heads={heads} is not a multiple of "
            f"num_key_value_heads={groups}, which grouped-query attention needs"
        )
    return ModelSpec(
        num_layers=_positive(model_dir, config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=_positive(model_dir, config, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=_positive(model_dir, config, "head_dim", hidden // heads),
        vocab_size=_positive(model_dir, config, "vocab_size"),
        max_position_embeddings=_positive(model_dir, config, "max_position_embeddings"),
        rope_theta=float(config.get("rope_theta", 10000.0)),
        rope_scaling=config.get("rope_scaling"),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        torch_dtype=str(config.get("torch_dtype") or config.get("dtype") or "float32"),
        eos_token_ids=_eos_token_ids(model_dir, config),
    )


def shard_paths(model_dir: Path) -> list[Path]:
    """The safetensors files of the model, sorted; `ModelError` if any is missing."""
    index = model_dir / INDEX_FILE
    if index.is_file():
        weight_map = _read_json(index, "it was found a moment ago").get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelError(f"{index}: has no weight_map. The download is damaged: fetch this file again.")
        names = sorted({str(name) for name in weight_map.values()})
        if outside := [name for name in names if Path(name).name != name]:
            raise ModelError(f"{index}: names {outside[0]!r}, which is not a plain file name; refused")
    else:
        names = [SINGLE_FILE]
    missing = [name for name in names if not (model_dir / name).is_file()]
    if not missing:
        return [model_dir / name for name in names]
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in model_dir.glob(pattern))
    if pickles and not index.is_file():
        raise ModelError(
            f"{model_dir}: its weights are pickles ({pickles[0]}), which can run code when they are loaded, so "
            "they are not read. Save them once as safetensors where you trust them: "
            "AutoModelForCausalLM.from_pretrained(src).save_pretrained(dst, safe_serialization=True)"
        )
    raise ModelError(
        f"{model_dir}: {missing[0]} is missing"
        + (f" ({len(missing)} of the {len(names)} files that {INDEX_FILE} names)" if index.is_file() else "")
        + ". Copy or download the directory again, completely."
    )


def tensor_index(model_dir: Path) -> dict[str, Path]:
    """Every tensor's name with the file that holds it, from the headers (not from the index file)."""
    found: dict[str, Path] = {}
    for path in shard_paths(model_dir):
        for name in read_header(path):
            if name in found:
                raise ModelError(f"{path}: holds {name}, which {found[name].name} holds too; remove one of them")
            found[name] = path
    return found


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of one safetensors file, in the order in which they lie there.

    Raises `ModelError` for a file that is not safetensors or is shorter or longer than its header says.
    """
    with path.open("rb") as file:
        start, header = _raw_header(path, file)
    try:
        table = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
        entries = [
            TensorEntry(
                name=name,
                dtype=str(info["dtype"]),
                shape=tuple(int(n) for n in info["shape"]),
                begin=start + int(info["data_offsets"][0]),
                end=start + int(info["data_offsets"][1]),
            )
            for name, info in table.items()
        ]
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise ModelError(f"{path}: is not a safetensors file (its header is unreadable: {error})") from error
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

    Covers the companion files and the headers in full, and of each tensor 4 evenly spaced blocks of
    16 KiB (a tensor of up to 64 KiB: all of it). A training step moves every tensor, and an optimizer moves
    nearly every element of each, so two trainings differ in the sample. An edit of single elements by
    hand can escape: this is a guard against mistaken identity, not against tampering.
    """
    total = hashlib.sha256()
    for name in COMPANION_FILES:
        path = model_dir / name
        if path.is_file():
            total.update(f"{name}\0".encode())
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
    """The offset at which the data begins, and the header's JSON."""
    prefix = file.read(8)
    length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else _MAX_HEADER_BYTES + 1
    header = file.read(length) if length <= _MAX_HEADER_BYTES else b""
    if len(header) != length:
        raise ModelError(
            f"{path}: is not a safetensors file, or is cut off. If it is a Git LFS pointer of a few hundred bytes, "
            "run `git lfs pull`; otherwise copy or download it again."
        )
    return 8 + length, header


def _read_json(path: Path, why: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: is missing; {why}. {_SUPPORTED}") from None
    except ValueError as error:
        raise ModelError(f"{path}: is not valid JSON ({error}). Copy or download it again.") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return cast(dict[str, Any], value)


def _check_architecture(model_dir: Path, config: dict[str, Any]) -> None:
    path = model_dir / "config.json"
    architectures = config.get("architectures")
    if architectures != ["LlamaForCausalLM"]:
        raise ModelError(f"{path}: architectures={architectures!r} is not supported. {_SUPPORTED}")
    wrong = {
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "attention_bias": bool(config.get("attention_bias", False)),
        "mlp_bias": bool(config.get("mlp_bias", False)),
        "quantization_config": config.get("quantization_config") is not None,
    }
    for key, is_wrong in wrong.items():
        if is_wrong:
            raise ModelError(f"{path}: {key}={config.get(key)!r} is not supported. {_SUPPORTED}")


def _check_tokenizer(model_dir: Path) -> None:
    for names in (("tokenizer.json", "tokenizer.model"), ("tokenizer_config.json",)):
        if not any((model_dir / name).is_file() for name in names):
            raise ModelError(
                f"{model_dir}: {' or '.join(names)} is missing, so there is no tokenizer. Copy it from where "
                "the model came from, or write it with tokenizer.save_pretrained(this directory)."
            )


def _positive(model_dir: Path, config: dict[str, Any], key: str, default: int | None = None) -> int:
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(f"{model_dir / 'config.json'}: {key}={value!r} must be a positive integer")
    return value


def _eos_token_ids(model_dir: Path, config: dict[str, Any]) -> tuple[int, ...]:
    """`generation_config.json` wins: Llama 3 Instruct lists several ids there and one in config.json."""
    generation = model_dir / "generation_config.json"
    sources = [_read_json(generation, "it was found a moment ago")] if generation.is_file() else []
    for source in [*sources, config]:
        value = source.get("eos_token_id")
        ids = value if isinstance(value, list) else [value]
        if ids and all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            return tuple(ids)
    raise ModelError(
        f"{model_dir}: neither generation_config.json nor config.json has an eos_token_id, so generation would "
        "never end. Add it to generation_config.json."
    )
