"""HF <-> NeMo: exact both ways, NeMo's own layout, and errors that come before anything is written."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import shutil
import warnings
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch.distributed.checkpoint.metadata import TensorProperties
from torch.distributed.checkpoint.planner import LoadItemType
from transformers import AutoModelForCausalLM, AutoTokenizer

from nemo_srl.errors import ModelError
from nemo_srl.models import distributed_checkpoint, nemo_layout
from nemo_srl.models.arithmetic import num_parameters
from nemo_srl.models.convert import hf_to_nemo, nemo_to_hf
from nemo_srl.models.distributed_checkpoint import CheckpointReader, Chunk, write_checkpoint
from nemo_srl.models.hf import read_spec
from nemo_srl.models.tensor_io import ahead
from tests.families import FAMILIES
from tests.models_support import assert_same_weights, edit_json, make_llama, weights

RECORDED = json.loads((Path(__file__).parent / "data" / "nemo_gpt_keys.json").read_text())
QKV = "model.decoder.layers.self_attention.linear_qkv.weight"
FC1 = "model.decoder.layers.mlp.linear_fc1.weight"
EMBEDDING = "model.embedding.word_embeddings.weight"


@pytest.fixture(scope="module")
def hf_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("convert") / "hf")


@pytest.fixture(scope="module")
def nemo_dir(hf_dir: Path) -> Path:
    target = hf_dir.parent / "model_weights"
    hf_to_nemo(hf_dir, target)
    return target


def read_nemo(directory: Path) -> dict[str, torch.Tensor]:
    """Whole tensors, read by PyTorch's own loader."""
    metadata = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    state = {key: torch.empty(value.size, dtype=value.properties.dtype) for key, value in metadata.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=directory, no_dist=True)
    return state


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bit_exact(tmp_path: Path, family: str, tied: bool) -> None:
    """Shards come in, and one file comes out."""
    source = make_llama(tmp_path / "hf", family=family, tied=tied, seed=3, max_shard_size="100kB")
    assert len(list(source.glob("model-*-of-*.safetensors"))) > 2
    hf_to_nemo(source, tmp_path / "nemo")
    assert ("model.output_layer.weight" in CheckpointReader(tmp_path / "nemo").tensor_keys()) != tied
    nemo_to_hf(tmp_path / "nemo", tmp_path / "back", template_hf_dir=source)
    assert_same_weights(tmp_path / "back", source)
    assert (spec := read_spec(tmp_path / "back")) == read_spec(source)
    assert num_parameters(spec) == sum(tensor.numel() for tensor in weights(source).values())


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_exported_model_loads_in_transformers_and_answers_the_same(tmp_path: Path, family: str) -> None:
    source = make_llama(tmp_path / "hf", family=family)
    hf_to_nemo(source, tmp_path / "nemo")
    nemo_to_hf(tmp_path / "nemo", tmp_path / "back", template_hf_dir=source, max_shard_bytes=100_000)
    assert len(list((tmp_path / "back").glob("model-*-of-*.safetensors"))) > 2
    tokens = AutoTokenizer.from_pretrained(tmp_path / "back")("w5 w77 w202", return_tensors="pt")["input_ids"]
    assert tokens.tolist() == [[5, 77, 202]]
    with torch.no_grad():
        logits = [AutoModelForCausalLM.from_pretrained(d)(tokens).logits for d in (source, tmp_path / "back")]
    assert torch.equal(*logits)


def test_keys_and_shapes_are_those_of_nemo(nemo_dir: Path) -> None:
    assert {key: list(value.shape) for key, value in read_nemo(nemo_dir).items()} == RECORDED["keys"]


def test_files_are_those_that_megatron_looks_for(nemo_dir: Path) -> None:
    assert {".metadata", "common.pt", "metadata.json"} <= set(os.listdir(nemo_dir))
    assert json.loads((nemo_dir / "metadata.json").read_text())["sharded_backend"] == "torch_dist"
    assert torch.load(nemo_dir / "common.pt", weights_only=True) == {}


def test_qkv_goes_by_query_group_and_fc1_is_gate_then_up(hf_dir: Path, nemo_dir: Path) -> None:
    hf, nemo = weights(hf_dir), read_nemo(nemo_dir)
    heads_per_group, head_dim, ffn = 3, 16, 80
    for layer in range(3):
        q, k, v = (hf[f"model.layers.{layer}.self_attn.{name}_proj.weight"] for name in "qkv")
        row = 0
        for group in range(2):
            for source, head in [(q, group * heads_per_group + i) for i in range(heads_per_group)] + [
                (k, group),
                (v, group),
            ]:
                expected = source[head * head_dim : (head + 1) * head_dim]
                assert torch.equal(nemo[QKV][layer, row : row + head_dim], expected)
                row += head_dim
        assert row == nemo[QKV].shape[1]
        assert torch.equal(nemo[FC1][layer, :ffn], hf[f"model.layers.{layer}.mlp.gate_proj.weight"])
        assert torch.equal(nemo[FC1][layer, ffn:], hf[f"model.layers.{layer}.mlp.up_proj.weight"])


def test_biases_go_by_query_group_too(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf", family="qwen2")
    hf_to_nemo(source, tmp_path / "nemo")
    found = read_nemo(tmp_path / "nemo")["model.decoder.layers.self_attention.linear_qkv.bias"]
    names = [f"model.layers.2.self_attn.{name}_proj.bias" for name in "qkv"]
    q, k, v = (weights(source)[name].chunk(2) for name in names)
    assert torch.equal(found[2], torch.cat([q[0], k[0], v[0], q[1], k[1], v[1]]))


def test_layer_norms_are_fused_into_the_linear_layer_behind_them(tmp_path: Path) -> None:
    source = make_llama(tmp_path / "hf")
    tensors = weights(source)
    for layer in range(3):
        tensors[f"model.layers.{layer}.input_layernorm.weight"].fill_(10 + layer)
        tensors[f"model.layers.{layer}.post_attention_layernorm.weight"].fill_(20 + layer)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    hf_to_nemo(source, tmp_path / "nemo")
    nemo = read_nemo(tmp_path / "nemo")
    assert nemo["model.decoder.layers.self_attention.linear_qkv.layer_norm_weight"][:, 0].tolist() == [10, 11, 12]
    assert nemo["model.decoder.layers.mlp.linear_fc1.layer_norm_weight"][:, 0].tolist() == [20, 21, 22]


@pytest.mark.parametrize(
    ("vocab", "tp", "divisor", "padded"),
    [(203, 1, 128, 256), (203, 3, 128, 384), (32000, 8, 128, 32768), (32000, 8, 1, 32000), (49152, 3, 128, 49152)],
)
def test_padded_vocab_size(vocab: int, tp: int, divisor: int, padded: int) -> None:
    found = nemo_layout.padded_vocab_size(vocab, tensor_model_parallel_size=tp, divisible_by=divisor)
    assert found == padded


def test_padding_is_zero_written_in_blocks_and_dropped_again(
    hf_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nemo_srl.models.convert._BLOCK_BYTES", 100 * 48 * 4)  # 100 rows
    hf_to_nemo(hf_dir, tmp_path / "nemo", tensor_model_parallel_size=3)
    embedding = read_nemo(tmp_path / "nemo")[EMBEDDING]
    assert torch.equal(embedding[:203], weights(hf_dir)["model.embed_tokens.weight"])
    assert embedding.shape == (384, 48)
    assert not embedding[203:].any()
    nemo_to_hf(tmp_path / "nemo", tmp_path / "back", template_hf_dir=hf_dir)
    assert_same_weights(tmp_path / "back", hf_dir)


def test_dtype_is_converted_on_request_and_named_in_config(hf_dir: Path, nemo_dir: Path, tmp_path: Path) -> None:
    expected = {name: value.bfloat16() for name, value in weights(hf_dir).items()}
    hf_to_nemo(hf_dir, tmp_path / "nemo", dtype=torch.bfloat16)
    nemo_to_hf(tmp_path / "nemo", tmp_path / "on_import", template_hf_dir=hf_dir)
    nemo_to_hf(nemo_dir, tmp_path / "on_export", template_hf_dir=hf_dir, dtype=torch.bfloat16)
    for directory in (tmp_path / "on_import", tmp_path / "on_export"):
        found = weights(directory)
        assert all(
            found[name].dtype == torch.bfloat16 and torch.equal(found[name], expected[name]) for name in expected
        )
        assert read_spec(directory).torch_dtype == "bfloat16"


def megatron_chunks(whole: dict[str, torch.Tensor], tensor_parallel: int) -> Iterator[Chunk]:
    """As Megatron saves: one chunk per layer and tensor parallel rank, gate and up cut separately."""
    row_parallel = ("linear_proj.weight", "linear_fc2.weight")
    for key, tensor in whole.items():
        stacked = ".layers." in key
        axis = (1 if stacked else 0) + (1 if key.endswith(row_parallel) else 0)
        num_cuts = 1 if "norm" in key else tensor_parallel * (2 if key == FC1 else 1)
        for layer in range(tensor.shape[0] if stacked else 1):
            block = tensor[layer : layer + 1] if stacked else tensor
            offset = 0
            for piece in block.chunk(num_cuts, dim=axis):
                offsets = [layer if stacked and i == 0 else 0 for i in range(tensor.dim())]
                offsets[axis] = offset if num_cuts > 1 else offsets[axis]
                offset += piece.shape[axis]
                own = piece.contiguous().clone()
                yield Chunk(key, tuple(tensor.shape), tuple(offsets), tuple(own.shape), own.dtype, lambda own=own: own)


@pytest.mark.parametrize("block_bytes", [1 << 20, 50 * 48 * 4])
def test_training_checkpoint_of_tensor_parallel_ranks_is_read_without_its_optimizer(
    hf_dir: Path, nemo_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int
) -> None:
    monkeypatch.setattr("nemo_srl.models.convert._BLOCK_BYTES", block_bytes)
    whole = read_nemo(nemo_dir)
    optimizer = {f"optimizer.state.exp_avg.{key}": torch.full_like(value, 9) for key, value in whole.items()}
    (tmp_path / "last").mkdir()
    write_checkpoint(tmp_path / "last", [*megatron_chunks(whole, 2), *megatron_chunks(optimizer, 1)])
    nemo_to_hf(tmp_path / "last", tmp_path / "back", template_hf_dir=hf_dir)
    assert_same_weights(tmp_path / "back", hf_dir)


def test_one_tensor_is_made_ahead_of_the_one_in_use() -> None:
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    most = 0

    def produce() -> Iterator[torch.Tensor]:
        nonlocal most
        for _ in range(20):
            tensor = torch.zeros(1)
            alive.add(tensor)
            most = max(most, len(alive))
            yield tensor
            del tensor

    assert sum(1 for _ in ahead(produce())) == 20
    assert most <= 3


def test_an_error_while_converting_leaves_nothing_under_the_final_name(hf_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "nemo.partial").mkdir()
    (tmp_path / "nemo.partial" / "left by a killed run").touch()

    def fail() -> torch.Tensor:
        raise OSError("disk full")

    with pytest.MonkeyPatch.context() as patch:
        broken = Chunk("model.x", (1,), (0,), (1,), torch.float32, fail)
        patch.setattr("nemo_srl.models.convert._plan_chunks", lambda *_: [broken])
        with pytest.raises(OSError, match="disk full"):
            hf_to_nemo(hf_dir, tmp_path / "nemo")
    assert not (tmp_path / "nemo").exists()
    hf_to_nemo(hf_dir, tmp_path / "nemo")
    assert os.listdir(tmp_path) == ["nemo"]
    assert not (tmp_path / "nemo" / "left by a killed run").exists()


def test_existing_targets_are_not_overwritten(hf_dir: Path, nemo_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="exists already"):
        hf_to_nemo(hf_dir, nemo_dir)
    with pytest.raises(ModelError, match="exists already"):
        nemo_to_hf(nemo_dir, hf_dir, template_hf_dir=hf_dir)


def _edited(source: Path, target: Path, **changes: torch.Tensor | None) -> Path:
    shutil.copytree(source, target)
    tensors = weights(source)
    for name, value in changes.items():
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("model.norm.weight", None, "model.norm.weight is missing"),
        ("lm_head.weight", None, "lm_head.weight is missing"),
        ("model.norm.weight", torch.ones(47), r"shape \[47\], but config.json asks for \[48\]"),
        ("model.norm.weight", torch.ones(48, dtype=torch.int8), "type I8"),
        ("model.norm.weight", torch.ones(48, dtype=torch.bfloat16), "of several types"),
        ("model.layers.0.self_attn.q_proj.bias", torch.ones(96), "q_proj.bias.*no place for"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused_before_writing(
    hf_dir: Path, tmp_path: Path, name: str, value: torch.Tensor | None, message: str
) -> None:
    source = _edited(hf_dir, tmp_path / "hf", **{name: value})
    with pytest.raises(ModelError, match=message):
        hf_to_nemo(source, tmp_path / "nemo")
    assert os.listdir(tmp_path) == ["hf"]


def test_rotary_frequencies_of_old_checkpoints_are_left_out(hf_dir: Path, nemo_dir: Path, tmp_path: Path) -> None:
    old = _edited(hf_dir, tmp_path / "hf", **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    hf_to_nemo(old, tmp_path / "nemo")
    assert CheckpointReader(tmp_path / "nemo").tensor_keys() == CheckpointReader(nemo_dir).tensor_keys()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, "asks for"),
        ({"intermediate_size": 40}, "asks for"),
        ({"vocab_size": 300}, "256 rows.*vocab_size is 300"),
        ({"tie_word_embeddings": True}, "output_layer.weight, which.*no place for"),
    ],
)
def test_template_of_another_model_is_refused_before_writing(
    hf_dir: Path, nemo_dir: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    shutil.copytree(hf_dir, tmp_path / "template")
    edit_json(tmp_path / "template" / "config.json", **changes)
    with pytest.raises(ModelError, match=message):
        nemo_to_hf(nemo_dir, tmp_path / "back", template_hf_dir=tmp_path / "template")
    assert os.listdir(tmp_path) == ["template"]


def test_tied_checkpoint_with_an_untied_template_names_what_is_missing(hf_dir: Path, tmp_path: Path) -> None:
    tied = make_llama(tmp_path / "tied", tied=True)
    hf_to_nemo(tied, tmp_path / "nemo")
    with pytest.raises(ModelError, match=r"output_layer.weight is not in this checkpoint"):
        nemo_to_hf(tmp_path / "nemo", tmp_path / "back", template_hf_dir=hf_dir)


def test_unfinished_and_damaged_checkpoints_are_refused(hf_dir: Path, nemo_dir: Path, tmp_path: Path) -> None:
    damaged = Path(shutil.copytree(nemo_dir, tmp_path / "damaged"))
    (file,) = damaged.glob("*.distcp")
    os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ModelError, match="missing or damaged"):
        nemo_to_hf(damaged, tmp_path / "back", template_hf_dir=hf_dir)
    (damaged / ".metadata").unlink()
    with pytest.raises(ModelError, match="no finished NeMo checkpoint"):
        nemo_to_hf(damaged, tmp_path / "back", template_hf_dir=hf_dir)
    assert not (tmp_path / "back").exists()


def test_missing_chunks_are_noticed(tmp_path: Path) -> None:
    half = Chunk("model.x", (4, 2), (0, 0), (2, 2), torch.float32, lambda: torch.zeros(2, 2))
    write_checkpoint(tmp_path, [half])
    reader = CheckpointReader(tmp_path)
    assert reader.read("model.x", (0, 0), (2, 2)).shape == (2, 2)
    with pytest.raises(ModelError, match="do not cover it"):
        reader.read("model.x", (0, 0), (4, 2))


class _Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, ("run by a pickle",)


def test_metadata_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(_Malicious()))
    with pytest.raises(ModelError, match=r"refused posix\.mkdir"):
        CheckpointReader(tmp_path)
    assert os.listdir(tmp_path) == [".metadata"]


def test_megatrons_own_objects_in_the_metadata_are_passed_over() -> None:
    text = b"\x80\x04\x8c,megatron.core.dist_checkpointing.strategies.x\x94\x8c\x0dMCoreSavePlan\x94\x93\x94)\x81\x94."
    text = text.replace(b"\x8c,", b"\x8c" + bytes([len("megatron.core.dist_checkpointing.strategies.x")]))
    found = distributed_checkpoint._MetadataUnpickler(io.BytesIO(text)).load()
    assert isinstance(found, distributed_checkpoint._MegatronBookkeeping)


@dataclasses.dataclass
class _ByName:
    """Pickled as `getattr(of, name)`, which is how Python 3.11.2 pickles the members of enumerations."""

    of: object
    name: str

    def __reduce__(self) -> tuple[object, tuple[object, str]]:
        return getattr, (self.of, self.name)


def test_members_of_enumerations_are_read_by_name_and_nothing_else_is() -> None:
    def loaded(x: _ByName) -> object:
        return distributed_checkpoint._MetadataUnpickler(io.BytesIO(pickle.dumps(x))).load()

    assert loaded(_ByName(LoadItemType, "TENSOR")) is LoadItemType.TENSOR
    for of, name in ((LoadItemType, "mro"), (TensorProperties, "__init__"), (torch.Size, "__class__")):
        with pytest.raises((pickle.UnpicklingError, KeyError)):
            loaded(_ByName(of, name))
