"""What the tests of the guest package share: a model of its family, a seed, and programs that can import it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, fields
from pathlib import Path

from house_guest import family
from safetensors.torch import load_file, save_file

from nemo_srl.models.families import llama
from tests.support import RECIPE, ROOT
from tests.tiny import make_model, texts_of, write_seed

HERE = Path(__file__).resolve().parent
PACKAGE = HERE / "house_guest"
WORDS = "red blue green cat owl dog fig pear plum"
RUBRIC = "{instruction} {response} Grade:"


@dataclass(frozen=True)
class Guest:
    """A model of the guest's family, with its seed and prompts."""

    model: Path
    prompts: Path
    seed: dict[str, str]

    @property
    def overrides(self) -> dict[str, str]:
        """What every run in these tests sets."""
        return {
            **self.seed,
            "model.path": str(self.model),
            "model.family": "house_guest.family",
            "prompts.path": str(self.prompts),
            "engine": "house_guest.engine",
            "engine.words": f"'{WORDS}'",
            "judge.mode": "house_guest.reader:READER",
            "judge.rubric": f"'{RUBRIC}'",
            "judge.max_tokens": "12",
            "candidates.max_tokens": "24",
            "pairs.rule": "house_guest.rule:best_next",
            "num_iterations": "1",
            "anchor.num_prompts": "0",
            "tracking.tensorboard": "false",
        }


def make_guest(directory: Path) -> Guest:
    seed = write_seed(directory / "seed")
    model = make_model(directory / "model", texts_of(directory / "seed"))
    rename(model)
    prompts = directory / "prompts.jsonl"
    rows = [{"prompt_id": f"p{i}", "text": f"Name {kind}."} for i, kind in enumerate(("color", "animal", "fruit"))]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Guest(model, prompts, seed)


def rename(model: Path) -> None:
    """Give a Llama's config.json and tensors the names of the guest's family."""
    config = json.loads((model / "config.json").read_text())
    ours = {theirs: name for name, theirs in family.FIELDS.items()}
    names = {}
    for field in fields(llama.FAMILY):
        theirs = getattr(llama.FAMILY, field.name)
        if isinstance(theirs, str) and theirs.endswith(".weight"):
            for layer in range(config["num_hidden_layers"]):
                names[theirs.format(layer=layer)] = getattr(family.FAMILY, field.name).format(layer=layer)
    kind = {"model_type": "guest_llama", "architectures": ["GuestForCausalLM"]}
    (model / "config.json").write_text(json.dumps({ours.get(k, k): v for k, v in config.items()} | kind))
    tensors = {names[name]: tensor for name, tensor in load_file(model / "model.safetensors").items()}
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def program(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process that can import the guest package. Its output is in `stdout`."""
    path = os.pathsep.join([str(ROOT), str(HERE), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, cwd=ROOT, timeout=600,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip


def iterate(run_dir: Path, overrides: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """`recipes/iterate.py`, as a user starts it."""
    settings = [f"{k}={v}" for k, v in overrides.items()]
    return program("recipes/iterate.py", f"recipe={RECIPE}", f"run_dir={run_dir}", *settings)
