"""Settings and data that cannot work are refused before the first stage, each with its key and remedy."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from nemo_srl import preflight
from nemo_srl.artifacts import read_jsonl
from nemo_srl.chat import ChatTemplate
from nemo_srl.errors import ConfigError, DataError, ModelError
from nemo_srl.experiment import Experiment
from nemo_srl.protocols import SFTRow
from nemo_srl.records import EFTExample, IFTExample, Prompt
from recipes import evaluate
from recipes import iterate as recipe
from tests.support import ROOT, composed
from tests.tiny import make_model, write_seed


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


def test_the_beginning_of_verdicts_is_a_part_of_the_prompt(model_dir: Path) -> None:
    numbers = []
    for begun in ("true", "false"):
        cfg = composed("judge=checked_5pt", f"judge.begin_verdict={begun}")
        with pytest.raises(DataError, match=r"has \d+ tokens as a prompt, and judge\.max_tokens") as raised:
            preflight.check(cfg, model_dir, [example("Red and blue. " * 500)])
        numbers.append(int(re.findall(r"has (\d+) tokens", str(raised.value))[0]))
    assert numbers[0] - numbers[1] == len(ChatTemplate(model_dir).encode("Score:"))  # " 4" is one token here


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["trainer.tensor_model_parallel_size=3"], r"tensor_model_parallel_size=3: does not divide.*Usable.*1, 2"),
        (["trainer.pipeline_model_parallel_size=5"], r"pipeline_model_parallel_size=5: does not divide.*2 layers"),
        (["dpo.global_batch_size=3", "trainer.micro_batch_size=2"], r"dpo\.global_batch_size=3: is not a multiple"),
        (["sft.max_seq_length=4096"], r"sft\.max_seq_length=4096: is above the model's context"),
        (["trainer.sequence_parallel=true"], r"sequence_parallel=True.*only one"),
        (["judge=checked_5pt", "judge.mode=sampled"], r"^judge\.begin_verdict=True: with judge\.mode='sampled'"),
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


def copy_of(model_dir: Path, directory: Path, **config: object) -> Path:
    """A copy of the model with other values in its config.json."""
    shutil.copytree(model_dir, directory)
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return directory


def set_eos(model_dir: Path, ids: object) -> None:
    (model_dir / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))


def test_ends_that_do_not_agree_are_refused_with_the_value_that_agrees(model_dir: Path, tmp_path: Path) -> None:
    directory = copy_of(model_dir, tmp_path / "hf")
    set_eos(directory, 0)
    with pytest.raises(ConfigError, match=r"eos_token_id=2 .*generation ends at \(0,\).*would never stop") as e:
        preflight.check(composed(), directory, [example("Red.")])
    set_eos(directory, json.loads(re.findall(r"generation_config\.json to (\[[0-9, ]+\])", str(e.value))[0]))
    preflight.check(composed(), directory, [example("Red.")])
    # The template ends a response with another token than the tokenizer's.
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")
    tokenizer.save_pretrained(directory)
    set_eos(directory, 2)
    with pytest.raises(ConfigError, match=r"eos_token_id=0 \('<\|endoftext\|>' after a response\) in the chat") as e:
        preflight.check(composed(), directory, [example("Red.")])
    set_eos(directory, json.loads(re.findall(r"generation_config\.json to (\[[0-9, ]+\])", str(e.value))[0]))
    preflight.check(composed(), directory, [example("Red.")])


def test_a_tokenizer_without_an_end_is_refused(model_dir: Path, tmp_path: Path) -> None:
    directory = copy_of(model_dir, tmp_path / "hf")
    path = directory / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "eos_token": None}))
    (directory / "special_tokens_map.json").write_text("{}")
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: it has no eos_token"):
        preflight.check(composed(), directory, [example("Red.")])


def rows(count: int, length: int = 1) -> list[IFTExample]:
    return [IFTExample(example_id=str(i), instruction="Say red.", response="Red. " * length) for i in range(count)]


def test_long_rows_of_the_seed_are_counted_as_the_trainer_does(
    model_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from nemo_srl.trainers.nemo_aligner.data import tokenize_rows

    cfg, chat = composed("sft.max_seq_length=128", "sft.global_batch_size=8"), ChatTemplate(model_dir)
    seed = [*rows(8), *rows(3, length=60)]
    preflight.check(cfg, model_dir, [example("Red.")], ift=seed)
    assert "data.ift_path: 3 of 11 rows are longer than sft.max_seq_length=128 tokens" in caplog.text
    for length in range(1, 60):
        (row,) = rows(1, length)
        as_trained = SFTRow(prompt=chat.render(row.instruction), response=chat.response_text(row.response))
        _, counted = tokenize_rows(
            [as_trained], encode=lambda text: list(chat.encode(text)), eos_token_id=2, max_seq_length=1000
        )
        assert chat.num_trained_tokens(row.instruction, row.response) == counted.max_length


def test_too_few_rows_that_fit_are_refused_and_each_remedy_works(model_dir: Path) -> None:
    settings = {"sft.max_seq_length": 128, "sft.global_batch_size": 8}

    def check(**changed: int) -> None:
        named = settings | {f"sft.{key}": value for key, value in changed.items()}
        overrides = [f"{key}={value}" for key, value in named.items()]
        preflight.check(composed(*overrides), model_dir, [example("Red.")], ift=seed)

    seed = [*rows(6), *rows(3, length=60)]
    with pytest.raises(ConfigError, match=r"sft\.global_batch_size=8: .*6 rows have at most .* and 3 are longer") as e:
        check()
    check(max_seq_length=int(re.findall(r"set sft\.max_seq_length to (\d+) or more", str(e.value))[0]))
    check(global_batch_size=int(re.findall(r"set sft\.global_batch_size to (\d+)", str(e.value))[0]))
    seed = rows(8, length=60)
    with pytest.raises(ConfigError, match="0 rows have at most") as e:
        check()
    assert "set sft.global_batch_size" not in str(e.value)
    check(max_seq_length=int(re.findall(r"set sft\.max_seq_length to (\d+) or more", str(e.value))[0]))


@pytest.fixture(scope="module")
def seed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return write_seed(tmp_path_factory.mktemp("seed"))


@pytest.mark.parametrize(
    ("keys", "damage", "message"),
    [
        ("mpa", "none", "is neither a directory nor a model"),
        ("m", "config.json", r"config\.json: is not valid JSON \(.*Copy or download it again"),
        ("p", "deep config.json", r"config\.json: is not valid JSON \(too many lists"),
        ("a", "digits config.json", r"config\.json: is not valid JSON \(Exceeds the limit"),
        ("a", "lfs config.json", r"config\.json: is a pointer of Git LFS.*git lfs pull"),
        ("mpa", "tokenizer.json", r"no usable tokenizer .*copy or download it again"),
        ("p", "model.safetensors", r"model\.safetensors: .*copy or download it again"),
        ("m", "header model.safetensors", r"model\.safetensors: is not a safetensors file, or is damaged"),
        ("a", "vocab", r"has shape .* but config\.json asks for"),
        ("p", "layers", r"tensor model\.layers\.2\..* is missing from the weights"),
        ("ma", "eos", r"eos_token_id=2 .*would never stop"),
        ("a", "gpt2", r"GPT2LMHeadModel.*Supported is LlamaForCausalLM"),
    ],
)
def test_a_model_that_cannot_be_used_is_refused_before_the_first_stage_under_its_key(
    model_dir: Path, tmp_path: Path, seed: dict[str, str], keys: str, damage: str, message: str
) -> None:
    config = {"vocab": {"vocab_size": 100}, "layers": {"num_hidden_layers": 3}}.get(damage, {})
    if damage == "gpt2":
        config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    directory = copy_of(model_dir, tmp_path / "hf", **config)
    how, _, name = damage.rpartition(" ")
    if (path := directory / name).is_file():
        content = path.read_bytes()
        damaged = {"": content[: len(content) // 2], "deep": b"[" * 100_000, "digits": b'{"a": ' + b"9" * 5000 + b"}"}
        damaged["lfs"] = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
        damaged["header"] = (100_000).to_bytes(8, "little") + b"[" * 100_000
        path.write_bytes(damaged[how])
    if damage == "eos":
        set_eos(directory, 0)
    for key in (k for k in ("model.path", "prompts.model", "anchor.model") if k[0] in keys):
        given = {"model.path": str(model_dir), **seed}
        given[key] = str(directory / "none" if damage == "none" else directory)
        cfg = composed(*(f"{k}={v}" for k, v in given.items()), "sft.global_batch_size=4")
        run = Experiment(replace(cfg, run_dir=str(tmp_path / "run")))
        with pytest.raises((ModelError, ConfigError), match=message) as e, run as exp:
            recipe.iterate(exp.cfg, exp)
        assert str(e.value).startswith(f"{key}=")
        assert "\n" not in str(e.value)
        assert not list((tmp_path / "run").glob("iter_*"))


def prompt_rows(count: int, **changed: object) -> str:
    rows = [{"prompt_id": f"p{i}", "text": f"Say {i}."} for i in range(count)]
    rows[-1] |= changed
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none-{iteration}.jsonl", "", r"prompts\.path='.*none-1\.jsonl': no such file"),
        ("{iter}.jsonl", "", r"prompts\.path='.*': the only name in braces is \{iteration\}"),
        ("p{iteration}.jsonl", prompt_rows(3), r"p2\.jsonl': it has 3 prompts.*dpo\.global_batch_size=4 pairs.*lower"),
        ("p{iteration}.jsonl", prompt_rows(4, text=" "), r"prompts\.path=.*p2\.jsonl, line 4: text=' ': it is blank"),
        ("p{iteration}.jsonl", prompt_rows(4, prompt_id="p0"), r"prompts\.path=.*p2\.jsonl, line 4: the key 'p0'"),
        ("p{iteration}.jsonl", "", r"prompts\.path=.*p2\.jsonl: empty"),
        ("p{iteration}.jsonl", prompt_rows(4)[:-9], r"prompts\.path=.*p2\.jsonl, line 4: not JSON"),
    ],
)
def test_given_prompts_are_checked_for_all_iterations_before_the_first_stage(
    model_dir: Path, tmp_path: Path, seed: dict[str, str], name: str, content: str, message: str
) -> None:
    (tmp_path / "p1.jsonl").write_text(prompt_rows(4))
    (tmp_path / "p2.jsonl").write_text(content)
    overrides = [f"{k}={v}" for k, v in {"model.path": model_dir, **seed}.items()]
    cfg = composed(*overrides, f"prompts.path='{tmp_path / name}'", "sft.global_batch_size=4", "num_iterations=2")
    with (
        pytest.raises((DataError, ConfigError), match=message),
        Experiment(replace(cfg, run_dir=str(tmp_path / "run"))) as exp,
    ):
        recipe.iterate(exp.cfg, exp)
    assert not list((tmp_path / "run").glob("iter_*"))


def test_an_iteration_without_a_file_of_prompts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p1.jsonl").write_text(prompt_rows(4))
    cfg = composed(f"prompts.path='{tmp_path}/p{{iteration}}.jsonl'", "num_iterations=2")
    with (
        pytest.raises(DataError, match=r"p2\.jsonl': no such file.* Or set num_iterations=1, or prompts\.path=''"),
        Experiment(replace(cfg, run_dir=str(tmp_path / "run"))) as exp,
    ):
        recipe.prompt_files(exp.cfg, exp)


def test_more_pairs_than_prompts_are_refused(model_dir: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompts\.num_prompts=3: .*dpo\.global_batch_size=4 pairs.*Raise it, or"):
        preflight.check_prompts(composed("prompts.num_prompts=3"), {})
    preflight.check_prompts(composed("prompts.num_prompts=4"), {})


def test_pairs_of_verdicts_count_among_those_of_a_step() -> None:
    verdicts = ("verdict_pairs.num_prompts=1", "verdict_pairs.num_seed=5")
    made = composed("prompts.num_prompts=1", *verdicts)
    preflight.check_prompts(made, {}, num_eft=1)  # one pair of answers, two of verdicts, one example
    with pytest.raises(ConfigError, match=r"prompts\.num_prompts=1: "):
        preflight.check_prompts(made, {}, num_eft=0)
    given, prompts = composed("prompts.path=p.jsonl", *verdicts), {"p.jsonl": [Prompt(prompt_id="p", text="Why?")]}
    preflight.check_prompts(given, prompts, num_eft=1)
    with pytest.raises(DataError, match=r"prompts\.path='p\.jsonl': it has 1 prompts"):
        preflight.check_prompts(given, prompts, num_eft=0)


def test_errors_of_the_judges_engine_have_its_name() -> None:
    with pytest.raises(ConfigError, match=r"^judge\.engine\.base_url=''"):
        composed("+engine@judge.engine=openai")
    with pytest.raises(ConfigError, match=r"^engine\.base_url=''"):
        composed("engine=openai")
    cfg = composed("+engine@judge.engine=openai", "judge.engine.base_url=http://x/v1", "judge.engine.api_key_env=NONE_")
    with pytest.raises(ConfigError, match=r"^judge\.engine\.api_key_env='NONE_'"):
        preflight.check_engine(cfg, "judge", Path())


def test_evaluate_names_its_own_settings_before_any_model_is_asked(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "questions.jsonl").write_text('{"instruction": "Name a color."}\n{"instruction": 3}\n')
    (tmp_path / "answers.json").write_text('[{"instruction": "Name a shape.", "output": "A cube."}]')
    held_out = tmp_path / "eft_eval.jsonl"
    held_out.write_text(json.dumps(asdict(example("Red."))) + "\n")
    good = evaluate.EvaluateSettings(models={"m": str(model_dir)}, questions="")
    exp = Experiment(replace(composed(f"data.eft_eval_path={held_out}"), run_dir=str(tmp_path / "run")))
    evaluate.open_given(good, exp)
    answers = {"m": str(model_dir), "a": str(tmp_path / "answers.json")}
    one_question = tmp_path / "one.jsonl"
    one_question.write_text('{"instruction": "Name a color."}\n')
    for changed, message in (
        ({"models": {"m": str(tmp_path / "none")}}, r"^evaluate\.models\.m='.*none': is neither"),
        ({"judge_model": "gpt-4"}, r"^evaluate\.judge_model='gpt-4': is neither"),
        ({"questions": str(tmp_path / "q.jsonl")}, r"^evaluate\.questions=.*q\.jsonl: no such file"),
        ({"questions": str(tmp_path / "questions.jsonl")}, r"^evaluate\.questions=.*line 2: .*Correct the row"),
        ({"models": answers, "questions": str(one_question)}, r"^evaluate\.models\.a=.*no `output` for the instr"),
    ):
        with pytest.raises((ModelError, DataError), match=message):
            evaluate.open_given(replace(good, **changed), exp)
    (tmp_path / "answers.json").write_text('[{"instruction": "Name a color.", "output": "Red."}]')
    with pytest.raises(ConfigError, match=r"judge\.pairwise_rubric=''.*judge_mode=pairwise sets one"):
        evaluate.open_given(replace(good, models=answers, questions=str(one_question)), exp)
