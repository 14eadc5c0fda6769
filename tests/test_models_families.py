"""Families of models: what their config.json says, what is refused, and a user's own family.

That a family is converted, served and trained as in transformers is in the tests of these parts.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from nemo_srl.config import SFTConfig
from nemo_srl.engines.embedded.llama import LlamaModel
from nemo_srl.errors import ConfigError, ModelError
from nemo_srl.models import families
from nemo_srl.models.convert import hf_to_nemo, nemo_to_hf
from nemo_srl.models.distributed_checkpoint import CheckpointReader
from nemo_srl.models.hf import read_spec
from nemo_srl.models.spec import ModelSpec
from nemo_srl.trainers.nemo_aligner.data import DataStatistics
from nemo_srl.trainers.nemo_aligner.settings import NemoAlignerSettings
from nemo_srl.trainers.nemo_aligner.training_plan import make_plan
from tests.families import FAMILIES
from tests.models_support import assert_same_weights, make_llama, weights
from tests.user_family import renamed


@pytest.fixture
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(families, "_registered", {})
    families.register("tests.user_family")


def make_trunk(llama: Path, directory: Path) -> Path:
    """The same model under the user's names."""
    directory.mkdir()
    for path in llama.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    config = json.loads((llama / "config.json").read_text())
    config |= {"architectures": ["TrunkForCausalLM"], "model_type": "trunk", "depth": config.pop("num_hidden_layers")}
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {renamed(name): value for name, value in weights(llama).items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.usefixtures("_registered")
def test_a_users_family_is_read_converted_and_served(tmp_path: Path) -> None:
    llama = make_llama(tmp_path / "llama")
    trunk = make_trunk(llama, tmp_path / "trunk")
    spec = read_spec(trunk)
    assert (spec.model_type, spec.num_layers) == ("trunk", 3)
    hf_to_nemo(trunk, tmp_path / "nemo")
    hf_to_nemo(llama, tmp_path / "nemo_llama")
    keys = [CheckpointReader(tmp_path / name).tensor_keys() for name in ("nemo", "nemo_llama")]
    assert keys[0] == keys[1]
    nemo_to_hf(tmp_path / "nemo", tmp_path / "back", template_hf_dir=trunk)
    assert_same_weights(tmp_path / "back", trunk)
    served, expected = (LlamaModel(d, dtype=torch.float32) for d in (trunk, llama))
    x = torch.ones(2, 48)
    assert torch.equal(served.layers[2].qkv(x), expected.layers[2].qkv(x))
    assert torch.equal(served.logits(x), expected.logits(x))


@pytest.mark.usefixtures("_registered")
def test_its_nemo_settings_come_before_a_llamas(tmp_path: Path) -> None:
    spec = read_spec(make_trunk(make_llama(tmp_path / "llama"), tmp_path / "trunk"))
    rows = DataStatistics(num_rows=16)
    plan = make_plan(SFTConfig(max_seq_length=64), NemoAlignerSettings(), seed=1, spec=spec, train=rows)
    assert plan["model"]["activation"] == "fast-geglu"
    assert plan["model"]["layernorm_zero_centered_gamma"] is True


LLAMA = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8,
    "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 8192,
}  # fmt: skip


def spec_of(family: str, **config: object) -> ModelSpec:
    (architecture,) = families.known()[family].architectures
    return families.read_spec({"model_type": family, "architectures": [architecture], **LLAMA, **config})


@pytest.mark.parametrize(
    ("family", "config", "context"),
    [
        ("mistral", {"sliding_window": 4096}, 4096),
        ("mistral", {}, 4096),  # transformers' default
        ("mistral", {"sliding_window": None}, 8192),
        ("phi3", {"sliding_window": 2047}, 2047),
        ("phi3", {"sliding_window": 262144}, 8192),
        ("phi3", {}, 8192),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 4096}, 4096),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 4096}, 8192),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 4096}, 4096),
        ("qwen3", {"sliding_window": 4096}, 8192),
    ],
)
def test_the_context_ends_where_a_sliding_window_would_begin_to_hide(
    family: str, config: dict[str, object], context: int
) -> None:
    assert spec_of(family, **config).max_position_embeddings == context


def test_each_family_has_transformers_defaults() -> None:
    given = {**LLAMA, "num_attention_heads": 32}
    del given["num_key_value_heads"]
    for family in FAMILIES[:-1]:
        (architecture,) = families.known()[family].architectures
        found = families.read_spec({"architectures": [architecture], **given})
        expected = CONFIG_MAPPING[family](**given, pad_token_id=0)
        assert (found.model_type, found.num_query_groups) == (family, expected.num_key_value_heads)
        for name in ("rms_norm_eps", "rope_theta", "tie_word_embeddings"):
            assert getattr(found, name) == getattr(expected, name), family
    assert (spec_of("qwen2").head_dim, spec_of("qwen3").head_dim) == (8, 128)


@pytest.mark.parametrize(
    ("model_type", "architecture"),
    [
        ("gemma2", "Gemma2ForCausalLM"),
        ("gemma3_text", "Gemma3ForCausalLM"),
        ("mixtral", "MixtralForCausalLM"),
        ("phimoe", "PhiMoEForCausalLM"),
        ("qwen2_moe", "Qwen2MoeForCausalLM"),
        ("qwen3_moe", "Qwen3MoeForCausalLM"),
        ("qwen2", "Qwen2ForSequenceClassification"),
    ],
)
def test_other_families_are_refused_by_name_with_what_is_supported(model_type: str, architecture: str) -> None:
    with pytest.raises(ModelError) as refused:
        families.read_spec({"model_type": model_type, "architectures": [architecture], **LLAMA})
    assert f"model_type='{model_type}', architectures=['{architecture}'] is not supported. " in str(refused.value)
    for family in FAMILIES:
        assert families.known()[family].supported in str(refused.value)


@pytest.mark.parametrize(
    ("family", "config", "reason"),
    [
        ("phi3", {"partial_rotary_factor": 0.75}, r"partial_rotary_factor=0\.75 .*Supported is Phi3ForCausalLM"),
        ("qwen3", {"attention_bias": True}, "attention_bias=True .*Supported is Qwen3ForCausalLM"),
        ("qwen2", {"sliding_window": -1, "use_sliding_window": True}, "sliding_window=-1 must be a positive integer"),
    ],
)
def test_what_a_family_cannot_have_is_refused(family: str, config: dict[str, object], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        spec_of(family, **config)


def test_qwen3_in_the_tests_is_that_of_transformers() -> None:
    recorded = json.loads((Path(__file__).parent / "data" / "qwen3_logits.json").read_text())
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["qwen3"](**recorded["config"])).eval()
    for i, (_, parameter) in enumerate(sorted(model.named_parameters())):
        angles = torch.arange(parameter.numel(), dtype=torch.float64) * (0.7 + 0.1 * i)
        parameter.data = (0.6 * angles.sin()).view(parameter.shape).float()
    with torch.no_grad():
        logits = model(torch.tensor([recorded["tokens"]])).logits[0]
    torch.testing.assert_close(logits, torch.tensor(recorded["logits"]), atol=2e-5, rtol=0)


@pytest.mark.parametrize("value", [None, "", {}])
def test_an_empty_model_type_counts_as_absent(tmp_path: Path, value: object) -> None:
    model = make_llama(tmp_path / "llama")
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"model_type": value}))
    spec = read_spec(model)
    assert families.of(spec) is families.of(read_spec(make_llama(tmp_path / "other")))


def test_without_registration_it_is_refused_with_the_way_out(tmp_path: Path) -> None:
    trunk = make_trunk(make_llama(tmp_path / "llama"), tmp_path / "trunk")
    with pytest.raises(ModelError, match=r"model_type='trunk', .*TrunkForCausalLM.*Supported is Llama.*model.family"):
        read_spec(trunk)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("tests.no_such_family", r"model.family='tests.no_such_family:FAMILY'.*No module named"),
        ("tests.user_losses", r"model.family=.*FAMILY"),
        ("tests.user_family:read_spec", r"model.family=.*function.*Family is needed"),
    ],
)
def test_a_path_that_gives_no_family_is_refused(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        families.register(path)
