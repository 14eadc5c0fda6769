"""NeMo-Aligner behind `nemo_srl.protocols.Trainer`.

A work directory holds `plan.yaml` (the whole configuration), `data.json` (counts), `train.jsonl` (token ids), `start/`
(the weights to start from), `reference/` (DPO: the reference's log-probabilities), `nemo/` (NeMo's logs and
checkpoints) and `metrics.jsonl` (one line per step). On a CPU, `products-*.json` says which library multiplies.
`export` removes `start/`, `reference/` and the checkpoints.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from nemo_srl import jsonio
from nemo_srl.errors import ConfigError, DataError
from nemo_srl.lineage import read_json
from nemo_srl.models import hf
from nemo_srl.models.tokenizer import load_tokenizer
from nemo_srl.protocols import DPORow, SFTRow, TrainingTask, checkpoint_dir
from nemo_srl.trainers.nemo_aligner import checkpoints
from nemo_srl.trainers.nemo_aligner import training_plan as planning
from nemo_srl.trainers.nemo_aligner.data import TRAIN_FILE, Encode, tokenize_rows, write_rows
from nemo_srl.trainers.nemo_aligner.metrics import METRICS_FILE, read_metrics
from nemo_srl.trainers.nemo_aligner.settings import NemoAlignerSettings

VERSION = 2
"""Raise it when the same task trains another model than before. Then models of older versions are refused, and
trainings that an older version began start again."""
DATA_FILE = "data.json"
_TASK_FILE = "task.json"
"""What was prepared. `prepare` writes it last, and does nothing when it finds the same again."""


class NemoAlignerTrainer:
    """Implements `nemo_srl.protocols.Trainer`."""

    def __init__(self, settings: NemoAlignerSettings) -> None:
        self._settings = settings

    def prepare(self, task: TrainingTask, work_dir: Path) -> None:
        """Check everything, then write the work directory.

        When the same task was prepared before, this does nothing, and a started training goes on. When settings or
        data differ, it discards the earlier training in `work_dir`.
        """
        expected = SFTRow if task.algorithm == "sft" else DPORow
        if wrong := [type(row).__name__ for row in task.rows if not isinstance(row, expected)]:
            raise DataError(
                f"algorithm={task.algorithm}: needs rows of {expected.__name__}, found {wrong[0]}. Give only those."
            )
        spec = hf.read_spec(task.model_dir)
        encode, eos_token_id = _load_tokenizer(task.model_dir, spec)
        rows, statistics = tokenize_rows(
            task.rows, encode=encode, eos_token_id=eos_token_id, max_seq_length=task.optim.max_seq_length
        )
        plan = planning.make_plan(task.optim, self._settings, seed=task.seed, spec=spec, train=statistics)
        if task.keep_checkpoints:
            plan["keep_checkpoints"] = True
        identity = {
            "version": VERSION,
            "algorithm": task.algorithm,
            "model_dir": str(task.model_dir.resolve()),
            "model_digest": hf.digest(task.model_dir),
            "plan": plan,
            "rows": rows,
        }
        text = jsonio.dumps(identity)
        task_file = work_dir / _TASK_FILE
        if task_file.exists() and task_file.read_text() == text:
            _keep_newest_checkpoint(work_dir)
            return
        task_file.unlink(missing_ok=True)
        for name in (planning.START_DIR, planning.NEMO_DIR, planning.REFERENCE_DIR, checkpoints.KEPT_DIR):
            shutil.rmtree(work_dir / name, ignore_errors=True)
        (work_dir / METRICS_FILE).unlink(missing_ok=True)
        work_dir.mkdir(parents=True, exist_ok=True)
        write_rows(rows, work_dir / TRAIN_FILE)
        (work_dir / DATA_FILE).write_text(jsonio.dumps(asdict(statistics), indent=2) + "\n")
        OmegaConf.save(OmegaConf.create(plan), work_dir / planning.PLAN_FILE)
        _write_start(task.model_dir, work_dir, plan["model"])
        task_file.write_text(text)

    def train(self, work_dir: Path) -> None:
        """Train to the end, from the last checkpoint if there is one. Every rank calls it."""
        from nemo_srl.trainers.nemo_aligner import run

        run.train(work_dir, self._settings)

    def export(self, work_dir: Path, model_dir: Path) -> Mapping[str, float]:
        """Write the trained weights as `model_dir`, remove the checkpoints, and return a summary of the training.

        It may be called again after an interruption. Raises `ConfigError` when the training has not ended.
        """
        started_from = Path(read_json(work_dir / _TASK_FILE)["model_dir"])
        for step, kept in checkpoints.kept(work_dir).items():
            if not (target := checkpoint_dir(model_dir, step)).exists():
                _export(kept, work_dir, target, started_from=started_from)
        if not model_dir.exists():
            _export(last_checkpoint(work_dir), work_dir, model_dir, started_from=started_from)
        made = (planning.START_DIR, f"{planning.NEMO_DIR}/checkpoints", planning.REFERENCE_DIR, checkpoints.KEPT_DIR)
        for name in made:
            directory = work_dir / name
            shutil.rmtree(directory, ignore_errors=True)
        return _summary(work_dir)

    def metrics(self, work_dir: Path) -> list[dict[str, Any]]:
        """One mapping per step that was made so far; `metrics.step_record` says what its values are."""
        return read_metrics(work_dir / METRICS_FILE)


def _write_start(model_dir: Path, work_dir: Path, plan: dict[str, Any]) -> None:
    """The weights, configuration and tokenizer that the training starts from; `plan` is the plan's model section."""
    import torch

    from nemo_srl.models.convert import hf_to_nemo

    hf_to_nemo(
        model_dir,
        work_dir / planning.START_DIR / "model_weights",
        # Without O2 the trained weights are float32, whatever type the directory's weights have.
        dtype=torch.bfloat16 if plan["megatron_amp_O2"] else torch.float32,
        tensor_model_parallel_size=plan["tensor_model_parallel_size"],
        make_vocab_size_divisible_by=plan["make_vocab_size_divisible_by"],
    )
    OmegaConf.save(OmegaConf.create(plan), work_dir / planning.START_DIR / "model_config.yaml")
    (work_dir / planning.TOKENIZER_DIR).mkdir()
    for path in hf.companions(model_dir):
        shutil.copy(path, work_dir / planning.TOKENIZER_DIR)


def _export(checkpoint: Path, work_dir: Path, model_dir: Path, *, started_from: Path) -> None:
    from nemo_srl.models.convert import nemo_to_hf
    from nemo_srl.models.lora import Adapters

    peft = OmegaConf.load(work_dir / planning.PLAN_FILE).model.peft
    if peft.peft_scheme == "none":
        nemo_to_hf(checkpoint, model_dir, template_hf_dir=started_from)
        return
    # The checkpoint holds the adapters. The weights below them are those of the start.
    weights = work_dir / planning.START_DIR / "model_weights"
    adapters = Adapters(checkpoint, alpha=peft.lora_tuning.alpha)
    nemo_to_hf(weights, model_dir, template_hf_dir=started_from, adapters=adapters)


def last_checkpoint(work_dir: Path) -> Path:
    """The checkpoint of the last step. Raises `ConfigError` if the training has not reached that step."""
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
    """Remove all checkpoints but the newest complete one.

    A training leaves two when it is killed after it wrote the new one and before it removed the old one. NeMo's
    exp_manager then refuses to choose. It refuses an unfinished one, too, when there is no other. A checkpoint is
    marked as unfinished before it is removed, as NeMo does, so that one that is half removed is never taken for a
    complete one.
    """

    def rank(path: Path) -> tuple[bool, int]:
        return not marker(path).exists(), int(path.name.split("-step=")[1].split("-")[0])

    def marker(path: Path) -> Path:
        return path.with_name(f"{path.name}-unfinished")

    found = sorted((work_dir / planning.NEMO_DIR / "checkpoints").glob("*-step=*-last"), key=rank)
    is_complete = bool(found) and rank(found[-1])[0]
    for path in found[:-1] if is_complete else found:
        marker(path).touch()
        shutil.rmtree(path)
        marker(path).unlink()


def _load_tokenizer(model_dir: Path, spec: hf.ModelSpec) -> tuple[Encode, int]:
    tokenizer = load_tokenizer(model_dir)
    eos_token_id = tokenizer.eos_token_id
    hf.check_end(model_dir, spec, eos_token_id, "in the tokenizer")

    def encode(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    return encode, int(eos_token_id)


def _summary(work_dir: Path) -> dict[str, float]:
    """First and last training losses, and the counts of `data.json`, as one flat mapping."""
    steps = read_metrics(work_dir / METRICS_FILE)
    data = read_json(work_dir / DATA_FILE)
    plan = OmegaConf.load(work_dir / planning.PLAN_FILE)
    num_used = plan.num_steps * plan.model.global_batch_size // plan.trainer.max_epochs
    summary: dict[str, float] = {
        "num_steps": len(steps),
        "train_loss_first": steps[0]["loss"],
        "train_loss_last": steps[-1]["loss"],
        "grad_norm_max": max(record["grad_norm"] for record in steps),
        "num_rows": data["num_rows"],
        "num_rows_too_long": data["num_rows_too_long"],
        "num_rows_not_in_a_batch": data["num_rows"] - num_used,
        "num_boundary_merges": data["num_boundary_merges"],
        "num_tokens": data["num_tokens"] * plan.trainer.max_epochs,
        "padding": sum(record["padding"] for record in steps) / len(steps),
        "seconds_per_step": sum(record["step_time"] for record in steps) / len(steps),
    }
    if "rewards_margin" in steps[-1]:
        summary |= {"rewards_margin_last": steps[-1]["rewards_margin"], "acc_last": steps[-1]["acc"]}
    return summary
