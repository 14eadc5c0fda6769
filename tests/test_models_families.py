"""A user's own family of models: its config and tensor names are read, converted and served as a Llama's are."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from nemo_srl.config import SFTConfig
from nemo_srl.engines.embedded.llama import LlamaModel
from nemo_srl.errors import ConfigError, ModelError
from nemo_srl.models import families
from nemo_srl.models.convert import hf_to_nemo, nemo_to_hf
from nemo_srl.models.distributed_checkpoint import CheckpointReader
from nemo_srl.models.hf import read_spec
from nemo_srl.trainers.nemo_aligner.data import DataStatistics
from nemo_srl.trainers.nemo_aligner.settings import NemoAlignerSettings
from nemo_srl.trainers.nemo_aligner.training_plan import make_plan
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
