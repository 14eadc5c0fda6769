"""Settings and data that cannot work are refused before the first stage, each with its key and remedy."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from nemo_srl import preflight
from nemo_srl.artifacts import read_jsonl
from nemo_srl.errors import ConfigError, DataError, ModelError
from nemo_srl.experiment import Experiment
from nemo_srl.records import EFTExample
from recipes import iterate as recipe
from tests.support import ROOT, composed
from tests.tiny import make_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "hf", ["Name a color. Grade this. Score: 4"])


def example(text: str) -> EFTExample:
    return EFTExample(example_id="long", instruction="Name a color.", response=text, justification="J.", score=3)


def test_the_default_recipe_fits(model_dir: Path) -> None:
    preflight.check(composed(), model_dir, [example("Red.")])


def test_a_prompt_longer_than_the_context_is_refused_by_name(model_dir: Path) -> None:
    with pytest.raises(DataError, match=r"'long' has \d+ tokens as a prompt.*context is 1024 tokens.*Shorten"):
        preflight.check(composed(), model_dir, [example("Red and blue. " * 500)])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.tensor_model_parallel_size=3"], r"tensor_model_parallel_size=3: does not divide.*Usable.*1, 2"),
        (["trainer.pipeline_model_parallel_size=5"], r"pipeline_model_parallel_size=5: does not divide.*2 layers"),
        (["dpo.global_batch_size=3", "trainer.micro_batch_size=2"], r"dpo\.global_batch_size=3: is not a multiple"),
        (["sft.max_seq_length=4096"], r"sft\.max_seq_length=4096: is above the model's context"),
        (["trainer.sequence_parallel=true"], r"sequence_parallel=True.*only one"),
        (["engine.name=vllm"], r"engine\.name='vllm'"),
        (["trainer.name=trl"], r"trainer\.name='trl'"),
    ],
)
def test_settings_that_only_dpo_or_the_engine_would_notice_are_refused_at_once(
    model_dir: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        preflight.check(composed(*overrides), model_dir, [example("Red.")])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dpo.beta=-1", r"dpo\.beta=-1\.0: must be above 0"),
        ("dpo.label_smoothing=0.5", r"dpo\.label_smoothing=0\.5: must be in \[0, 0\.5\)"),
        ("dpo.rdpo_alpha=-1", r"dpo\.rdpo_alpha=-1\.0: must be at least 0"),
        ("sft.adam_beta2=1", r"sft\.adam_beta2=1\.0: must be in \[0, 1\)"),
        ("candidates.num_samples=1", r"candidates\.num_samples=1: a pair needs at least 2"),
        ("candidates.top_p=0", r"candidates\.top_p=0\.0: must be in"),
        ("judge.rubric='no slots, Score:'", r"judge\.rubric=.*must hold \{instruction\} once"),
        ("sft.min_learning_rate=1", r"sft\.min_learning_rate=1\.0: must be between 0 and learning_rate"),
        ("trainer.precision=fp8", r"trainer\.precision='fp8': must be one of"),
        ("trainer.devices=3", r"trainer\.devices=3"),
    ],
)
def test_bad_values_are_refused_at_set_up(override: str, message: str) -> None:
    parallel = ["trainer.tensor_model_parallel_size=2"] if "devices" in override else []
    with pytest.raises(ConfigError, match=message):
        Experiment(composed(override, *parallel))


def test_an_unknown_key_and_an_unknown_recipe_are_named_without_a_traceback() -> None:
    for override, message in (("dpo.betaa=1", "betaa"), ("recipe=srl-none", "srl-none")):
        command = [sys.executable, str(ROOT / "recipes" / "iterate.py"), override]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode != 0
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_a_model_that_is_missing_or_unsupported_is_refused_with_what_is_supported(tmp_path: Path) -> None:
    for path in (str(tmp_path / "none"), "gpt-4"):
        cfg = replace(composed(f"model.path={path}"), run_dir=str(tmp_path / "run"))
        with pytest.raises(ValueError, match=r"smollm2-135m-instruct"):
            recipe.run(cfg)
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "gpt2" / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}')
    cfg = replace(composed(f"model.path={tmp_path / 'gpt2'}"), run_dir=str(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel.*Supported is LlamaForCausalLM"):
        recipe.run(cfg)


@pytest.mark.parametrize("key", ["eft_path", "eft_eval_path"])
def test_a_score_that_no_verdict_can_have_is_refused_by_name(model_dir: Path, key: str) -> None:
    good, bad = example("Red."), replace(example("Blue."), example_id="seven", score=7)
    examples = {"eft_path": ([good], [bad]), "eft_eval_path": ([good, bad], [good])}[key]
    with pytest.raises(DataError, match=rf"data\.{key}: 'seven' has score=7, and judge\.max_score=5.*Correct"):
        preflight.check(composed(), model_dir, *examples)


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("score", -3, "score=-3: it is below 0. Correct it, or remove the row."),
        ("instruction", " \n", "instruction=' \\n': it is blank. Give it a text, or remove the row."),
        ("response", "", "response='': it is blank."),
    ],
)
def test_rows_that_would_teach_nothing_are_refused_by_line(
    tmp_path: Path, field: str, value: object, reason: str
) -> None:
    path = tmp_path / "eft.jsonl"
    rows = [asdict(replace(example("Red."), example_id=str(i))) for i in range(2)]
    rows[1][field] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as e:
        read_jsonl(path, EFTExample)
    assert str(e.value).startswith(f"{path}, line 2: {reason}")


def test_tokens_above_the_embedding_are_refused(model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(model_dir, tmp_path / "hf")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    config["vocab_size"] = len(tokenizer) - 1
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"ids up to \d+, and config\.json has vocab_size=.*resize_token_embeddings"):
        preflight.check(composed(), tmp_path / "hf", [example("Red.")])
