"""Token ids are what the model will see, and every row that is dropped or handled is counted."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nemo_srl.config import DPOConfig
from nemo_srl.errors import ConfigError, DataError
from nemo_srl.protocols import DPORow, SFTRow, TrainingTask
from nemo_srl.records import FinishReason
from nemo_srl.trainers import open_trainer
from nemo_srl.trainers.nemo_aligner.batches import collate_dpo, collate_sft
from nemo_srl.trainers.nemo_aligner.data import read_rows, tokenize_rows, write_rows
from nemo_srl.trainers.nemo_aligner.settings import NemoAlignerSettings
from tests.tiny import make_model

EOS = 0


def encode(text: str) -> list[int]:
    """A character is a token, except that "th" is one."""
    ids: list[int] = []
    for character in text:
        if character == "h" and ids and ids[-1] == ord("t"):
            ids[-1] = 1000
        else:
            ids.append(ord(character))
    return ids


def dpo_row(prompt: str = "ab", chosen: str = "cd", rejected: str = "efg", **more: FinishReason) -> DPORow:
    return DPORow(prompt=prompt, chosen=chosen, rejected=rejected, chosen_reward=4.0, rejected_reward=1.0, **more)


def test_responses_end_with_end_of_sequence() -> None:
    (row,), _ = tokenize_rows([SFTRow(prompt="ab", response=" cd ")], encode=encode, eos_token_id=EOS, max_seq_length=9)
    assert row == {"prompt_ids": encode("ab"), "response_ids": [*encode(" cd "), EOS]}
    (pair,), _ = tokenize_rows([dpo_row()], encode=encode, eos_token_id=EOS, max_seq_length=9)
    assert pair["chosen_ids"] == [*encode("cd"), EOS]
    assert pair["rejected_ids"] == [*encode("efg"), EOS]
    assert (pair["chosen_reward"], pair["rejected_reward"], pair["confidence"]) == (4.0, 1.0, 1.0)


@pytest.mark.parametrize("cut", ["chosen", "rejected"])
def test_a_response_that_was_cut_off_has_no_end(cut: str) -> None:
    row = dpo_row(**{f"{cut}_finish_reason": "length"})  # type: ignore[arg-type]
    (pair,), statistics = tokenize_rows([row], encode=encode, eos_token_id=EOS, max_seq_length=9)
    assert pair["chosen_ids"] == encode("cd") + [EOS] * (cut == "rejected")
    assert pair["rejected_ids"] == encode("efg") + [EOS] * (cut == "chosen")
    assert statistics.num_tokens == (2 + 2) + (2 + 3) + 1
    (item,) = collate_dpo([{"row": 0, **pair}], pad_id=EOS)
    learnt = {side: [x for x in item[f"{side}_labels"].tolist() if x != -100] for side in ("chosen", "rejected")}
    assert learnt == {"chosen": pair["chosen_ids"], "rejected": pair["rejected_ids"]}


def test_rows_that_are_too_long_are_dropped_and_counted() -> None:
    rows = [dpo_row(), dpo_row(rejected="e" * 5), dpo_row(chosen="c" * 5), dpo_row(chosen="c" * 4)]
    kept, statistics = tokenize_rows(rows, encode=encode, eos_token_id=EOS, max_seq_length=7)
    assert len(kept) == statistics.num_rows == 2
    assert statistics.num_rows_too_long == 2
    assert statistics.max_length == 7  # exactly the limit is not too long
    assert statistics.num_tokens == (5 + 6) + (7 + 6)


def test_a_merge_across_the_prompts_end_is_undone_and_counted() -> None:
    rows = [SFTRow(prompt="at", response="he"), SFTRow(prompt="a", response="the")]
    kept, statistics = tokenize_rows(rows, encode=encode, eos_token_id=EOS, max_seq_length=9)
    assert statistics.num_boundary_merges == 1
    assert kept[0] == {"prompt_ids": encode("at"), "response_ids": [*encode("he"), EOS]}
    assert kept[1]["response_ids"] == [1000, ord("e"), EOS]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(DataError, match="row 1: the prompt is empty"):
        tokenize_rows([dpo_row(), dpo_row(prompt="")], encode=encode, eos_token_id=EOS, max_seq_length=9)


def test_sft_loss_is_on_the_response_and_its_end_only() -> None:
    rows = [
        {"row": 0, "prompt_ids": [5, 6, 7], "response_ids": [8, 2]},
        {"row": 1, "prompt_ids": [5], "response_ids": [2]},
    ]
    batch = collate_sft(rows, pad_id=2, multiple=8)
    assert batch["tokens"].tolist() == [[5, 6, 7, 8, 2, 2, 2, 2], [5, 2, 2, 2, 2, 2, 2, 2]]
    learnt = [batch["labels"][i][batch["loss_mask"][i] == 1].tolist() for i in range(2)]
    assert learnt == [[8, 2], [2]]  # padding is the same token as the end, and is not learnt
    assert batch["labels"].tolist() == [[-100, -100, 8, 2, *[-100] * 4], [2, *[-100] * 7]]
    assert batch["length"].tolist() == [4, 1]


def test_a_row_has_the_weight_of_its_tokens_in_the_mask() -> None:
    rows = [SFTRow(prompt="at", response="he", weight=2.5), SFTRow(prompt="at", response="me")]
    kept, _ = tokenize_rows(rows, encode=lambda text: [ord(c) for c in text], eos_token_id=EOS, max_seq_length=9)
    batch = collate_sft([{"row": i, **ids} for i, ids in enumerate(kept)], pad_id=EOS, multiple=8)
    assert batch["loss_mask"].tolist() == [[0, 2.5, 2.5, 2.5, *[0] * 4], [0, 1, 1, 1, *[0] * 4]]


def test_dpo_labels_are_the_responses() -> None:
    row = {
        "row": 0,
        "prompt_ids": [5, 6],
        "chosen_ids": [8, 2],
        "rejected_ids": [9, 9, 9, 2],
        "chosen_reward": 4.0,
        "rejected_reward": 1.0,
        "confidence": 0.8,
    }
    (item,) = collate_dpo([row], pad_id=2)
    assert item["chosen"].tolist() == [5, 6, 8, 2, 2]
    assert item["chosen_labels"].tolist() == [-100, 8, 2, -100, -100]
    assert item["rejected"].tolist() == [5, 6, 9, 9, 9]
    assert item["rejected_labels"].tolist() == [-100, 9, 9, 9, 2]
    assert (item["chosen_length"], item["rejected_length"]) == (3, 5)
    assert item["confidence"] == 0.8
    assert item["chosen"].dtype == torch.int64


def test_written_rows_are_read_back(tmp_path: Path) -> None:
    rows = [{"prompt_ids": [1], "response_ids": [2]}]
    write_rows(rows, tmp_path / "rows.jsonl")
    assert list(read_rows(tmp_path / "rows.jsonl")) == [{"row": 0, **rows[0]}]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), ["name a prime"], vocab_size=300, num_layers=1, hidden_size=32)


def prepare(model_dir: Path, work_dir: Path, rows: list[DPORow], **dpo: object) -> None:
    optim = DPOConfig(**{"global_batch_size": 2, **dpo})  # type: ignore[arg-type]
    task = TrainingTask(algorithm="dpo", model_dir=model_dir, rows=rows, optim=optim, seed=1234)
    open_trainer(NemoAlignerSettings()).prepare(task, work_dir)


def test_preparing_the_same_task_again_keeps_a_started_training(model_dir: Path, tmp_path: Path) -> None:
    prepare(model_dir, tmp_path, [dpo_row()] * 2)
    checkpoint = tmp_path / "nemo" / "checkpoints" / "dpo--step=1-last"
    checkpoint.mkdir(parents=True)
    prepare(model_dir, tmp_path, [dpo_row()] * 2)
    assert checkpoint.exists()
    prepare(model_dir, tmp_path, [dpo_row()] * 2, beta=0.7)
    assert not checkpoint.exists()


def test_an_interrupted_preparation_is_done_again(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "start" / "model_weights").mkdir(parents=True)
    (tmp_path / "train.jsonl").write_text("half a li")
    prepare(model_dir, tmp_path, [dpo_row()] * 2)
    assert len(list(read_rows(tmp_path / "train.jsonl"))) == 2
    assert (tmp_path / "start" / "model_weights" / ".metadata").exists()


def test_rows_of_the_other_algorithm_are_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="algorithm=dpo: needs rows of DPORow, found SFTRow"):
        prepare(model_dir, tmp_path, [SFTRow(prompt="a", response="b")] * 2)  # type: ignore[list-item]


def test_a_tokenizer_that_ends_otherwise_than_generation_is_refused(model_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for file in model_dir.iterdir():
        (other / file.name).symlink_to(file)
    (other / "generation_config.json").unlink()
    (other / "generation_config.json").write_text('{"eos_token_id": 1}')
    with pytest.raises(ConfigError, match=r"eos_token_id=2 .*\(1,\).*never stop"):
        prepare(other, tmp_path / "work", [dpo_row()] * 2)


def test_nothing_is_written_for_what_is_refused(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="only 1 training rows"):
        prepare(model_dir, tmp_path / "work", [dpo_row()])
    assert not (tmp_path / "work").exists()
