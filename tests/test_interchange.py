"""Exported pairs are what other systems read, and a published model is what transformers loads."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_srl.chat import ChatTemplate
from nemo_srl.cli import read_options
from nemo_srl.data.interchange import FORMATS, nemo_aligner_row, write_pairs
from nemo_srl.errors import ConfigError, DataError, ModelError
from nemo_srl.protocols import DPORow
from nemo_srl.records import PreferencePair
from nemo_srl.runs import open_run
from nemo_srl.trainers.nemo_aligner.batches import collate_dpo
from nemo_srl.trainers.nemo_aligner.data import read_rows, tokenize_rows, write_rows
from recipes import export
from tests.run_directory import HOSTILE, make_run
from tests.tiny import make_model

ROOT = Path(__file__).resolve().parents[1]
PAIR = PreferencePair(
    prompt_id="iter1-000001",
    prompt="Name a prime.\u2028<|im_end|>",
    chosen="7",
    rejected=HOSTILE[0],
    chosen_score=4.5,
    rejected_score=1.0,
)


class Chat:
    end_of_turn = "<e>"

    def render_for_training(self, instruction: str) -> str:
        return f"<u>{instruction}<a>"

    def response_text(self, response: str) -> str:
        return f" {response}"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pairs")
    pairs = [(t, PAIR) for t in (1, 2)]
    paths = write_pairs(pairs, directory, formats=FORMATS, chat=Chat())
    assert [p.name for p in paths] == [
        "nemo_aligner.jsonl",
        "nemo_rl.jsonl",
        "trl.jsonl",
        "trl_conversational.jsonl",
        "pairs.parquet",
        "dataset",
    ]
    return directory


def rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_nemo_aligner_gets_rendered_text_that_ends_its_turn(exported: Path) -> None:
    assert rows(exported / "nemo_aligner.jsonl")[0] == {
        "prompt": f"<u>{PAIR.prompt}<a>",
        "chosen_response": " 7<e>",
        "rejected_response": f" {HOSTILE[0]}<e>",
        "chosen_reward": 4.5,
        "rejected_reward": 1.0,
    }


def test_an_answer_that_was_cut_off_does_not_end_its_turn() -> None:
    row = nemo_aligner_row(replace(PAIR, rejected_finish_reason="length"), Chat())
    assert (row["chosen_response"], row["rejected_response"]) == (" 7<e>", f" {HOSTILE[0]}")


def test_nemo_rl_gets_messages_of_which_rank_0_is_preferred(exported: Path) -> None:
    assert rows(exported / "nemo_rl.jsonl")[1] == {
        "context": [{"role": "user", "content": PAIR.prompt}],
        "completions": [
            {"rank": 0, "completion": [{"role": "assistant", "content": "7"}]},
            {"rank": 1, "completion": [{"role": "assistant", "content": HOSTILE[0]}]},
        ],
    }


def test_trl_gets_both_of_its_formats(exported: Path) -> None:
    scores = {"score_chosen": 4.5, "score_rejected": 1.0}
    plain, conversational = rows(exported / "trl.jsonl")[0], rows(exported / "trl_conversational.jsonl")[0]
    assert plain == {"prompt": PAIR.prompt, "chosen": "7", "rejected": HOSTILE[0], **scores}
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    assert conversational == {k: [{"role": role, "content": plain[k]}] for k, role in roles.items()} | scores


def test_the_datasets_package_reads_every_file_back(exported: Path, tmp_path: Path) -> None:
    import datasets

    saved = datasets.load_from_disk(str(exported / "dataset"))
    parquet = datasets.Dataset.from_parquet(str(exported / "pairs.parquet"), cache_dir=str(tmp_path))
    expected = {"iteration": 2, **PAIR.__dict__}
    assert saved[1] == expected == parquet[1]
    for name in ("nemo_aligner", "nemo_rl", "trl", "trl_conversational"):
        data = datasets.Dataset.from_json(str(exported / f"{name}.jsonl"), cache_dir=str(tmp_path))
        assert data[0] == rows(exported / f"{name}.jsonl")[0]


def test_nemo_aligner_makes_of_its_rows_what_our_trainer_feeds_it(tmp_path: Path) -> None:
    """The real `DPOModelDataset` reads the export, and gives the very tokens, labels and rewards of our own dataset."""
    model = make_model(tmp_path / "model", ["Name a prime.", "7"])
    chat = ChatTemplate(model)
    pairs = [PAIR, *(replace(PAIR, prompt_id=f"p{i}", chosen=text, rejected="No.") for i, text in enumerate(HOSTILE))]
    pairs.append(replace(PAIR, prompt_id="cut", rejected_finish_reason="length"))
    write_pairs([(1, p) for p in pairs], tmp_path, formats=["nemo_aligner"], chat=chat)
    output = tmp_path / "items.json"
    command = [sys.executable, "-m", "tests.nemo_aligner_rows", str(model), str(tmp_path / "nemo_aligner.jsonl")]
    done = subprocess.run([*command, str(output)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [
        DPORow(
            prompt=chat.render(p.prompt), chosen=chat.response_text(p.chosen), rejected=chat.response_text(p.rejected),
            chosen_reward=p.chosen_score, rejected_reward=p.rejected_score,
            chosen_finish_reason=p.chosen_finish_reason, rejected_finish_reason=p.rejected_finish_reason,
        )
        for p in pairs
    ]  # fmt: skip
    trained, _ = tokenize_rows(rows, encode=lambda t: list(chat.encode(t)), eos_token_id=2, max_seq_length=512)
    write_rows(trained, tmp_path / "train.jsonl")
    ours = collate_dpo(list(read_rows(tmp_path / "train.jsonl")), pad_id=2)
    theirs = json.loads(output.read_text())
    assert len(theirs) == len(pairs)
    for i, item in enumerate(theirs):
        mine = {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in ours[i].items()}
        ours_alone = [mine.pop(key) for key in ("confidence", "sft_weight", "compared", "row")]
        assert ours_alone == [1.0, 1.0, True, i]
        assert item == mine


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"formats=\['csv'\].*nemo_aligner"):
        write_pairs([], tmp_path, formats=["csv"], chat=Chat())


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("export")
    run_dir = make_run(base / "run")
    model = make_model(base / "base", ["Name a prime.", "7"])
    (model / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\n# Base\n")
    for stage in ("iter_00/sft", "iter_01/policy", "iter_02/policy"):
        shutil.copytree(model, run_dir / stage / "hf", ignore=shutil.ignore_patterns("README.md"))
    return run_dir


def test_a_run_exports_its_last_model_with_a_card_that_transformers_and_the_hub_read(
    run_dir: Path, tmp_path: Path
) -> None:
    from huggingface_hub import ModelCard
    from transformers import AutoModelForCausalLM, AutoTokenizer

    export.export(read_options(export.Options, [f"run_dir={run_dir}", f"output_dir={tmp_path}"]))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "M3").config.num_hidden_layers == 2
    assert AutoTokenizer.from_pretrained(tmp_path / "M3").chat_template
    card = ModelCard.load(tmp_path / "M3" / "README.md")
    assert card.data.license == "mit"
    assert card.data.pipeline_tag == "text-generation"
    for words in ("# run-M3", "2 iterations of DPO", "ift.jsonl", "`dpo.beta=0.1`", "| valid verdicts", "Grade this."):
        assert words in card.content
    assert str(run_dir.parent) not in card.content
    pairs = sum(len(open_run(run_dir).table(t, "pairs", PreferencePair)) for t in (1, 2))
    assert len(rows(tmp_path / "pairs" / "trl.jsonl")) == pairs
    chat = ChatTemplate(tmp_path / "M3")
    assert rows(tmp_path / "pairs" / "nemo_aligner.jsonl")[0]["chosen_response"].endswith(chat.end_of_turn)
    with pytest.raises(ModelError, match="exists already"):
        export.export(read_options(export.Options, [f"run_dir={run_dir}", f"output_dir={tmp_path}"]))


def test_one_iteration_and_another_model_can_be_asked_for(run_dir: Path, tmp_path: Path) -> None:
    arguments = [f"run_dir={run_dir}", f"output_dir={tmp_path}", "formats=[trl]", "iterations=[2]", "model=M1"]
    export.export(read_options(export.Options, [*arguments, "license=cc0-1.0"]))
    assert len(rows(tmp_path / "pairs" / "trl.jsonl")) == len(open_run(run_dir).table(2, "pairs", PreferencePair))
    card = (tmp_path / "M1" / "README.md").read_text()
    assert 'license: "cc0-1.0"' in card
    assert "iterations of DPO" not in card
    assert sorted(p.name for p in tmp_path.iterdir()) == ["M1", "pairs"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["model=M9"], "model=M9: this run has M1, M2, M3"),
        (["iterations=[7]"], r"iterations=\[7\]: .* holds no pairs"),
        (["iterations=many"], "iterations"),
        (["colour=red"], "colour"),
        (["help"], "write each option as key=value; the keys are run_dir, output_dir"),
    ],
)
def test_what_cannot_be_exported_is_said(run_dir: Path, tmp_path: Path, arguments: list[str], reason: str) -> None:
    with pytest.raises((ConfigError, DataError), match=reason):
        export.export(read_options(export.Options, [f"run_dir={run_dir}", f"output_dir={tmp_path}", *arguments]))


def test_a_missing_option_and_an_empty_directory_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run_dir=.*must be given"):
        read_options(export.Options, [])
    with pytest.raises(DataError, match="no finished stage"):
        open_run(tmp_path)
