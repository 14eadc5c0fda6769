"""The trainer `nemo_aligner`: NVIDIA's NeMo-Aligner 0.7.0 (NeMo 2.2.1, megatron-core 0.11.0) as a library.

    data.py      text to token ids; what is dropped and why        no torch
    plan.py      settings + model + data -> NeMo-Aligner's config  no torch
    run.py       one rank: environment, platform                   torch, NeMo
    session.py   one rank: NeMo-Aligner's model, data and loop
    datasets.py, metrics.py   what session.py feeds and collects
    cpu.py       the platform where there is no CUDA; nobody else knows of it

A work directory: `plan.yaml` (the whole configuration), `data.json` (counts), `train.jsonl` and
`validation.jsonl` (token ids), `start/` (weights to start from), `nemo/` (NeMo's logs and checkpoints) and
`metrics.jsonl` (a line per step). After `export`, `start/` and the checkpoints are gone.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_srl.config import Config
from nemo_srl.errors import ConfigError, DataError
from nemo_srl.models import hf
from nemo_srl.protocols import DPORow, SFTRow, TrainingTask
from nemo_srl.trainers.nemo_aligner import training_plan as planning
from nemo_srl.trainers.nemo_aligner.data import (
    TRAIN_FILE,
    VALIDATION_FILE,
    DataStatistics,
    Encode,
    tokenize_rows,
    write_rows,
)
from nemo_srl.trainers.nemo_aligner.metrics import METRICS_FILE, read_metrics

DATA_FILE = "data.json"
_TASK_FILE = "task.json"
"""Written last by `prepare`: what was prepared, so that preparing it again does nothing."""


class NemoAlignerTrainer:
    """Implements `nemo_srl.protocols.Trainer`."""

    def __init__(self, cfg: Config) -> None:
        self._cfg = cfg

    def prepare(self, task: TrainingTask, work_dir: Path) -> None:
        """Check everything, then write the work directory.

        Does nothing when the same task was prepared before (a started training then goes on); when settings or
        data differ, an earlier training in `work_dir` is discarded.
        """
        optim = self._cfg.sft if task.algorithm == "sft" else self._cfg.dpo
        spec = hf.read_spec(task.model_dir)
        encode, eos_token_id = _load_tokenizer(task.model_dir, spec)
        splits: dict[str, tuple[list[dict[str, Any]], DataStatistics]] = {}
        for name, rows in ((TRAIN_FILE, task.train_rows), (VALIDATION_FILE, task.validation_rows)):
            _check_rows(task, rows)
            splits[name] = tokenize_rows(
                rows, encode=encode, eos_token_id=eos_token_id, max_seq_length=optim.max_seq_length
            )
        plan = planning.make_plan(
            optim,
            self._cfg.trainer,
            seed=self._cfg.seed,
            spec=spec,
            train=splits[TRAIN_FILE][1],
            validation=splits[VALIDATION_FILE][1],
        )
        self._write(task, work_dir, plan, splits)

    def train(self, work_dir: Path) -> None:
        """Train to the end, from the last checkpoint if there is one. Called on every rank."""
        from nemo_srl.trainers.nemo_aligner import run

        run.train(work_dir)

    def export(self, work_dir: Path, model_dir: Path) -> Mapping[str, float]:
        """Write the trained weights as `model_dir` and free the checkpoints; returns the run's metrics.

        May be called again after it was interrupted. Raises `ConfigError` when training has not ended.
        """
        from nemo_srl.models.convert import nemo_to_hf

        task = json.loads((work_dir / _TASK_FILE).read_text())
        if not model_dir.exists():
            checkpoint = last_checkpoint(work_dir)
            nemo_to_hf(checkpoint, model_dir, template_hf_dir=Path(task["model_dir"]))
        for directory in (work_dir / planning.START_DIR, work_dir / planning.NEMO_DIR / "checkpoints"):
            shutil.rmtree(directory, ignore_errors=True)
        return _summary(work_dir)

    def _write(
        self,
        task: TrainingTask,
        work_dir: Path,
        plan: dict[str, Any],
        splits: Mapping[str, tuple[list[dict[str, Any]], DataStatistics]],
    ) -> None:
        import torch

        from nemo_srl.models.convert import hf_to_nemo

        identity = {
            "algorithm": task.algorithm,
            "model_dir": str(task.model_dir.resolve()),
            "model_digest": hf.digest(task.model_dir),
            "plan": plan,
            "rows": {name: rows for name, (rows, _) in splits.items()},
        }
        task_file = work_dir / _TASK_FILE
        text = json.dumps(identity)
        if task_file.exists() and task_file.read_text() == text:
            _keep_newest_checkpoint(work_dir)
            return
        if work_dir.exists():
            _clear(work_dir)
        work_dir.mkdir(parents=True, exist_ok=True)
        for name, (rows, _) in splits.items():
            write_rows(rows, work_dir / name)
        counts = {Path(name).stem: asdict(statistics) for name, (_, statistics) in splits.items()}
        (work_dir / DATA_FILE).write_text(json.dumps(counts, indent=2) + "\n")
        OmegaConf.save(OmegaConf.create(plan), work_dir / planning.PLAN_FILE)
        start = work_dir / planning.START_DIR
        # Outside O2 the weights that are trained are float32, whatever the directory holds.
        hf_to_nemo(
            task.model_dir,
            start / "model_weights",
            dtype=torch.bfloat16 if plan["model"]["megatron_amp_O2"] else torch.float32,
            tensor_model_parallel_size=self._cfg.trainer.tensor_model_parallel_size,
            make_vocab_size_divisible_by=plan["model"]["make_vocab_size_divisible_by"],
        )
        OmegaConf.save(OmegaConf.create(plan["model"]), start / "model_config.yaml")
        (work_dir / planning.TOKENIZER_DIR).mkdir()
        for name in hf.COMPANION_FILES:
            if (task.model_dir / name).is_file():
                shutil.copy(task.model_dir / name, work_dir / planning.TOKENIZER_DIR / name)
        task_file.write_text(text)


def last_checkpoint(work_dir: Path) -> Path:
    """The checkpoint at the end of training. Raises `ConfigError` if training has not got there."""
    num_steps = OmegaConf.load(work_dir / planning.PLAN_FILE).num_steps
    found = sorted((work_dir / planning.NEMO_DIR / "checkpoints").glob(f"*-step={num_steps}-*-last"))
    unfinished = [path for path in found if path.with_name(f"{path.name}-unfinished").exists()]
    if not found or unfinished:
        raise ConfigError(
            f"{work_dir}: training has not reached step {num_steps}, so there is nothing to export. Run train "
            "again; it goes on from its last checkpoint."
        )
    return found[-1]


def _keep_newest_checkpoint(work_dir: Path) -> None:
    """Remove all whole checkpoints but the newest.

    A training killed between writing one and removing the one before leaves two, and NeMo's exp_manager refuses to
    choose. Marked first, as NeMo does: one that is half removed must not pass for a whole one.
    """
    found = (work_dir / planning.NEMO_DIR / "checkpoints").glob("*-step=*-last")
    whole = [path for path in found if not path.with_name(f"{path.name}-unfinished").exists()]
    for path in sorted(whole, key=lambda path: int(path.name.split("-step=")[1].split("-")[0]))[:-1]:
        marker = path.with_name(f"{path.name}-unfinished")
        marker.touch()
        shutil.rmtree(path)
        marker.unlink()


def _check_rows(task: TrainingTask, rows: Sequence[SFTRow] | Sequence[DPORow]) -> None:
    expected = SFTRow if task.algorithm == "sft" else DPORow
    for row in rows:
        if not isinstance(row, expected):
            raise DataError(
                f"algorithm={task.algorithm}: needs rows of {expected.__name__}, found {type(row).__name__}"
            )


def _load_tokenizer(model_dir: Path, spec: hf.ModelSpec) -> tuple[Encode, int]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    eos_token_id = tokenizer.eos_token_id
    if eos_token_id not in spec.eos_token_ids:
        raise ConfigError(
            f"eos_token_id={eos_token_id} in the tokenizer of {model_dir}: generation ends at "
            f"{spec.eos_token_ids} (generation_config.json, config.json), so a model trained to end its responses "
            "with the tokenizer's token would never stop. Make the two agree."
        )

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return encode, int(eos_token_id)


def _clear(work_dir: Path) -> None:
    (work_dir / _TASK_FILE).unlink(missing_ok=True)
    for name in (planning.START_DIR, planning.NEMO_DIR):
        shutil.rmtree(work_dir / name, ignore_errors=True)
    (work_dir / METRICS_FILE).unlink(missing_ok=True)


def _summary(work_dir: Path) -> dict[str, float]:
    """First and last training losses, and the counts of `data.json`, as one flat mapping."""
    steps = [record for record in read_metrics(work_dir / METRICS_FILE) if "loss" in record]
    validations = [record for record in read_metrics(work_dir / METRICS_FILE) if "val_loss" in record]
    train = json.loads((work_dir / DATA_FILE).read_text())["train"]
    plan = OmegaConf.load(work_dir / planning.PLAN_FILE)
    num_used = plan.num_steps * plan.model.global_batch_size // plan.trainer.max_epochs
    summary: dict[str, float] = {
        "num_steps": len(steps),
        "train_loss_first": steps[0]["loss"],
        "train_loss_last": steps[-1]["loss"],
        "grad_norm_max": max(record["grad_norm"] for record in steps),
        "num_rows": train["num_rows"],
        "num_rows_too_long": train["num_rows_too_long"],
        "num_rows_not_in_a_batch": train["num_rows"] - num_used,
        "num_boundary_merges": train["num_boundary_merges"],
        "num_tokens": train["num_tokens"] * plan.trainer.max_epochs,
        "seconds_per_step": sum(record["step_time"] for record in steps) / len(steps),
    }
    if "rewards_margin" in steps[-1]:
        summary |= {"rewards_margin_last": steps[-1]["rewards_margin"], "acc_last": steps[-1]["acc"]}
    if validations:
        summary["val_loss"] = validations[-1]["val_loss"]
    return summary
