"""What many tests need: a composed configuration, a server's engine settings, and a stage run in this process."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from hydra import compose, initialize_config_dir

from nemo_srl import cli
from nemo_srl.artifacts import Artifact
from nemo_srl.config import Config, load
from nemo_srl.engines.openai.settings import OpenAISettings
from nemo_srl.stages import Context, Stage

ROOT = Path(__file__).resolve().parent.parent

A = TypeVar("A", bound=Artifact)


RECIPE = "srl-smollm2-135m-cpu"
"""The recipe of most tests: the model writes its prompts, and verdicts have reasons."""


def composed(*overrides: str, recipe: str = RECIPE) -> Config:
    """What `recipes/iterate.py` would be given with these arguments."""
    cli.register_schemas(overrides, schema=Config)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return load(compose("iterate", overrides=["run_dir=run", f"recipe={recipe}", *overrides]), Config)


def server(url: str, **settings: Any) -> OpenAISettings:
    """The engine that a loopback server is."""
    return OpenAISettings(base_url=url, **settings)


def made(
    stage: Stage[A], cfg: Config, directory: Path, *, iteration: int = 1, **inputs: Any
) -> tuple[A, Mapping[str, float]]:
    """Run a table's stage in this process: its artifact and its figures."""
    output = stage.output(directory, {})
    result = stage.steps[-1].run(Context(cfg, iteration, stage.inputs(inputs), output, stage.model))
    assert result is not None
    return output, result.metrics
