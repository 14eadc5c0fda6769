"""Reading model directories: what is understood, what is refused, and that digests tell models apart."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nemo_srl.errors import ModelError
from nemo_srl.models import resolve
from nemo_srl.models.hf import digest, read_spec, tensor_index
from tests.models_support import edit_json, make_llama, weights


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture
def model_dir(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def test_spec_has_megatrons_names_for_what_config_json_says(model_dir: Path) -> None:
    spec = read_spec(model_dir)
    assert (spec.num_layers, spec.hidden_size, spec.ffn_hidden_size) == (3, 48, 80)
    assert (spec.num_attention_heads, spec.num_query_groups, spec.head_dim) == (6, 2, 16)
    assert (spec.vocab_size, spec.max_position_embeddings) == (203, 64)
    assert not spec.tie_word_embeddings
    assert spec.torch_dtype == "float32"


def test_old_configs_without_gqa_and_head_dim_get_the_classic_values(model_dir: Path) -> None:
    path = model_dir / "config.json"
    config = json.loads(path.read_text())
    for key in ("head_dim", "num_key_value_heads", "rope_theta"):
        del config[key]
    path.write_text(json.dumps(config))
    spec = read_spec(model_dir)
    assert (spec.num_query_groups, spec.head_dim, spec.rope_theta) == (6, 8, 10000.0)


def test_eos_tokens_come_from_generation_config_first(model_dir: Path) -> None:
    edit_json(model_dir / "generation_config.json", eos_token_id=[7, 9])
    assert read_spec(model_dir).eos_token_ids == (7, 9)
    (model_dir / "generation_config.json").unlink()
    assert read_spec(model_dir).eos_token_ids == (2,)
    edit_json(model_dir / "config.json", eos_token_id=None)
    with pytest.raises(ModelError, match="would never end"):
        read_spec(model_dir)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("architectures", ["MistralForCausalLM"], r"MistralForCausalLM.*Supported is LlamaForCausalLM"),
        ("hidden_act", "gelu", "hidden_act='gelu'"),
        ("attention_bias", True, "attention_bias=True"),
        ("mlp_bias", True, "mlp_bias=True"),
        ("quantization_config", {"quant_method": "gptq"}, "quantization_config"),
        ("num_hidden_layers", "three", "num_hidden_layers='three' must be a positive integer"),
        ("num_key_value_heads", 4, "not a multiple of num_key_value_heads=4"),
    ],
)
def test_unsupported_config_is_refused_by_key_and_value(model_dir: Path, key: str, value: object, message: str) -> None:
    edit_json(model_dir / "config.json", **{key: value})
    with pytest.raises(ModelError, match=message):
        read_spec(model_dir)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["config.json"], "config.json: is missing"),
        (["model.safetensors"], "model.safetensors is missing"),
        (["tokenizer.json"], "tokenizer.json or tokenizer.model is missing"),
        (["tokenizer_config.json"], "tokenizer_config.json is missing"),
    ],
)
def test_missing_files_are_named(model_dir: Path, names: list[str], message: str) -> None:
    for name in names:
        (model_dir / name).unlink()
    with pytest.raises(ModelError, match=message):
        read_spec(model_dir)


def test_pickled_weights_are_refused_with_the_way_out(model_dir: Path) -> None:
    (model_dir / "model.safetensors").rename(model_dir / "pytorch_model.bin")
    with pytest.raises(ModelError, match="safe_serialization=True"):
        read_spec(model_dir)


def test_index_names_missing_shards_and_may_not_leave_the_directory(model_dir: Path) -> None:
    index = model_dir / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(ModelError, match=r"model-2.safetensors is missing \(1 of the 2 files"):
        read_spec(model_dir)
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    with pytest.raises(ModelError, match="not a plain file name"):
        read_spec(model_dir)


def test_tensor_index_has_every_tensor_and_notices_a_cut_file(model_dir: Path) -> None:
    path = model_dir / "model.safetensors"
    assert tensor_index(model_dir) == dict.fromkeys(weights(model_dir), path)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match="cut off or damaged"):
        tensor_index(model_dir)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        tensor_index(model_dir)


def test_digest_is_of_the_content_and_not_of_the_place(pristine: Path, model_dir: Path) -> None:
    assert digest(model_dir) == digest(pristine)


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_digest_changes_with_any_tensor(pristine: Path, model_dir: Path, name: str) -> None:
    changed = weights(model_dir)
    changed[name] = changed[name] * 1.001
    save_file(changed, model_dir / "model.safetensors", metadata={"format": "pt"})
    assert digest(model_dir) != digest(pristine)


def test_digest_samples_large_tensors_from_end_to_end(model_dir: Path) -> None:
    large = torch.zeros(1_000_000)
    seen = set()
    for position in (0, 999_999, None):
        value = large.clone()
        if position is not None:
            value[position] = 1
        save_file({"large": value}, model_dir / "model.safetensors")
        seen.add(digest(model_dir))
    assert len(seen) == 3


def test_digest_changes_with_tokenizer_and_config(pristine: Path, model_dir: Path) -> None:
    edit_json(model_dir / "tokenizer_config.json", chat_template="{{ messages }}")
    with_template = digest(model_dir)
    edit_json(model_dir / "config.json", rope_theta=5e5)
    assert len({digest(pristine), with_template, digest(model_dir)}) == 3


def test_resolve_takes_directories_and_names_what_it_can_fetch(model_dir: Path, tmp_path: Path) -> None:
    assert resolve(str(model_dir), tmp_path) == model_dir.resolve()
    with pytest.raises(ModelError, match=r"smollm2-135m-instruct"):
        resolve("meta-llama/Llama-2-70b-hf", tmp_path)
    (model_dir / "model.safetensors").write_bytes(b"")
    with pytest.raises(ModelError, match="not a safetensors file"):
        resolve(str(model_dir), tmp_path)


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, nemo_srl.models; print([m for m in ('torch', 'gguf', 'transformers') if m in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert output.strip() == "[]"


TRANSFORMERS_5 = {
    # What transformers 5.17.0 writes for rope_theta=500000 and Llama 3.1's scaling.
    "rope_parameters": {
        "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 32,
        "rope_theta": 500000.0, "rope_type": "llama3",
    },
    "dtype": "bfloat16",
}  # fmt: skip


def rewrite(model_dir: Path, **values: object) -> None:
    """Without what transformers 5 no longer writes."""
    path = model_dir / "config.json"
    config = json.loads(path.read_text())
    for key in ("rope_theta", "rope_scaling", "torch_dtype"):
        config.pop(key, None)
    path.write_text(json.dumps(config | values))


def test_the_rotary_embedding_of_transformers_5_is_read(model_dir: Path) -> None:
    rewrite(model_dir, **TRANSFORMERS_5)
    spec = read_spec(model_dir)
    assert (spec.rope_theta, spec.rope_type, spec.torch_dtype) == (500000.0, "llama3", "bfloat16")
    assert spec.rope_scaling is not None
    assert spec.rope_scaling["original_max_position_embeddings"] == 32
    rewrite(model_dir, rope_parameters={"rope_theta": 1234.0, "rope_type": "default"})
    assert (read_spec(model_dir).rope_theta, read_spec(model_dir).rope_scaling) == (1234.0, None)


def test_an_export_is_read_by_both_generations_of_transformers(model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig

    from nemo_srl.models.convert import hf_to_nemo, nemo_to_hf

    rewrite(model_dir, **TRANSFORMERS_5)
    hf_to_nemo(model_dir, tmp_path / "nemo", make_vocab_size_divisible_by=1, dtype=torch.float32)
    nemo_to_hf(tmp_path / "nemo", tmp_path / "hf", template_hf_dir=model_dir)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["rope_parameters"] == TRANSFORMERS_5["rope_parameters"]
    assert (config["dtype"], config["torch_dtype"]) == ("float32", "float32")
    old = AutoConfig.from_pretrained(tmp_path / "hf")
    assert (old.rope_theta, old.rope_scaling["rope_type"]) == (500000.0, "llama3")
    assert read_spec(tmp_path / "hf").rope_theta == 500000.0


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor=0\.5 is not supported"),
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}}, r"partial_rotary_factor=0\.25"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "one set of values for all layers"),
        ({"rope_theta": "high"}, "rope_theta='high' must be a positive number"),
        ({"rope_theta": 0}, "rope_theta=0 must be a positive number"),
        ({"rms_norm_eps": True}, "rms_norm_eps=True must be a positive number"),
    ],
)
def test_what_would_make_another_model_is_refused(model_dir: Path, values: dict[str, object], reason: str) -> None:
    rewrite(model_dir, **values)
    with pytest.raises(ModelError, match=reason):
        read_spec(model_dir)


def test_nulls_are_defaults(model_dir: Path) -> None:
    rewrite(model_dir, rope_theta=None, rms_norm_eps=None, rope_parameters=None, partial_rotary_factor=None)
    assert (read_spec(model_dir).rope_theta, read_spec(model_dir).rms_norm_eps) == (10000.0, 1e-6)
