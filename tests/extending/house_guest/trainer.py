"""A trainer without gradients: each epoch, it makes the embeddings of the tokens of wanted responses longer.

With DPO, it also makes those of rejected responses shorter. This teaches little, but it is a whole trainer: it takes up
an interrupted training, and it writes a Hugging Face directory of any model family.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from nemo_srl.artifacts import write_atomic
from nemo_srl.config import OptimConfig
from nemo_srl.config.check import check
from nemo_srl.errors import ConfigError
from nemo_srl.models import families, hf
from nemo_srl.models.arithmetic import num_parameters
from nemo_srl.models.spec import ModelSpec
from nemo_srl.protocols import SFTRow, Trainer, TrainingTask
from nemo_srl.trainers import TrainerBackend, TrainingMemory


@dataclass
class StretchSettings:
    name: str = "house_guest.trainer"
    stretch: float = 0.1
    """How much longer a row becomes in one epoch, at a learning rate of 1."""

    num_nodes: ClassVar[int] = 1
    num_ranks_per_node: ClassVar[int] = 1
    world_size: ClassVar[int] = 1
    data_parallel_size: ClassVar[int] = 1

    def __post_init__(self) -> None:
        check(self.stretch > 0, "trainer.stretch", self.stretch, "must be above 0")

    def pipeline_efficiency(self, optim: OptimConfig) -> float:
        return 1.0


class StretchTrainer:
    def __init__(self, settings: StretchSettings) -> None:
        self._settings = settings

    def prepare(self, task: TrainingTask, work_dir: Path) -> None:
        weights = hf.shard_paths(task.model_dir)
        if len(weights) > 1:
            raise ConfigError(f"trainer.name={self._settings.name!r}: the weights of the model must be one file.")
        plan = {
            "model_dir": str(task.model_dir),
            "model_digest": hf.digest(task.model_dir),
            "embedding": families.of(hf.read_spec(task.model_dir)).embedding,
            "step": self._settings.stretch * task.optim.learning_rate,
            "num_steps": task.optim.max_epochs,
            "directions": _directions(task),
        }
        text = json.dumps(plan)
        if (work_dir / "plan.json").exists() and (work_dir / "plan.json").read_text() == text:
            return  # the same training was begun before, so it goes on
        shutil.rmtree(work_dir, ignore_errors=True)
        work_dir.mkdir(parents=True)
        shutil.copyfile(weights[0], work_dir / "0.safetensors")
        write_atomic(work_dir / "plan.json", text)

    def train(self, work_dir: Path) -> None:
        import torch
        from safetensors.torch import load_file, save_file

        plan = _plan(work_dir)
        wanted = torch.tensor(plan["directions"])
        for step in range(_last_checkpoint(work_dir) + 1, plan["num_steps"] + 1):
            tensors = load_file(work_dir / f"{step - 1}.safetensors")
            rows = tensors[plan["embedding"]]
            loss = -(wanted * rows.norm(dim=-1)).sum().item()
            tensors[plan["embedding"]] = rows * (1 + plan["step"] * wanted)[:, None]
            metrics = [*self.metrics(work_dir)[: step - 1], {"step": step, "loss": loss}]
            write_atomic(work_dir / "metrics.jsonl", "".join(json.dumps(m) + "\n" for m in metrics))
            save_file(tensors, work_dir / "partial", metadata={"format": "pt"})
            (work_dir / "partial").rename(work_dir / f"{step}.safetensors")  # there whole, or not at all

    def export(self, work_dir: Path, model_dir: Path) -> Mapping[str, float]:
        plan = _plan(work_dir)
        if not model_dir.exists():
            partial = model_dir.with_name("partial")
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            shutil.copyfile(work_dir / f"{plan['num_steps']}.safetensors", partial / hf.SINGLE_FILE)
            for name in hf.COMPANION_FILES:
                if (Path(plan["model_dir"]) / name).is_file():
                    shutil.copyfile(Path(plan["model_dir"]) / name, partial / name)
            partial.rename(model_dir)
        for checkpoint in work_dir.glob("*.safetensors"):
            checkpoint.unlink()
        return {"num_steps": plan["num_steps"], "loss": self.metrics(work_dir)[-1]["loss"]}

    def metrics(self, work_dir: Path) -> list[dict[str, Any]]:
        path = work_dir / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _directions(task: TrainingTask) -> list[float]:
    """For each token: its share of the wanted responses' tokens, minus its share of the rejected responses'."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(task.model_dir / "tokenizer.json"))

    def shares(texts: Sequence[str]) -> dict[int, float]:
        counts = Counter(i for text in texts for i in tokenizer.encode(text, add_special_tokens=False).ids)
        return {token: count / counts.total() for token, count in counts.items()}

    wanted = shares([row.response if isinstance(row, SFTRow) else row.chosen for row in task.rows])
    rejected = shares([row.rejected for row in task.rows if not isinstance(row, SFTRow)])
    return [wanted.get(i, 0) - rejected.get(i, 0) for i in range(hf.read_spec(task.model_dir).vocab_size)]


def _plan(work_dir: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((work_dir / "plan.json").read_text())
    return plan


def _last_checkpoint(work_dir: Path) -> int:
    return max(int(path.stem) for path in work_dir.glob("*.safetensors"))


def _check(settings: StretchSettings, trainings: Sequence[OptimConfig], spec: ModelSpec) -> None:
    for optim in trainings:
        check(optim.weight_decay == 0, f"{optim.section}.weight_decay", optim.weight_decay, "this trainer has none")


def _memory(optim: OptimConfig, settings: StretchSettings, spec: ModelSpec) -> TrainingMemory:
    return TrainingMemory(
        weights_and_gradients=4 * num_parameters(spec), optimizer=0, activations=0, logits=0, overhead=0
    )


def _checkpoint_bytes(settings: StretchSettings, spec: ModelSpec) -> float:
    return 4 * num_parameters(spec)


def _open(settings: StretchSettings) -> Trainer:
    return StretchTrainer(settings)


BACKEND = TrainerBackend(
    settings=StretchSettings,
    decisive=("stretch",),
    open=_open,
    check=_check,
    memory=_memory,
    checkpoint_bytes=_checkpoint_bytes,
)
