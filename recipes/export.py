"""Export what other programs read from a run: its preference pairs, and a model with its card.

    python recipes/export.py run_dir=runs/srl-smollm2-135m-checked
    python recipes/export.py run_dir=runs/x output_dir=out 'formats=[trl,parquet]' iterations=[2] model=M2
    python recipes/export.py run_dir=runs/x model=none                         # only the pairs

The files go to `output_dir`, which is `<run_dir>/export` by default. `pairs/` has the pairs, in the formats that
nemo_srl/data/interchange.py describes. The model is a Hugging Face directory with the model's name, e.g. `M3/`.
Existing pairs are replaced. An existing model is never overwritten: the export stops with an error.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from nemo_srl import cli
from nemo_srl.chat import ChatTemplate
from nemo_srl.data.interchange import FORMATS, write_pairs
from nemo_srl.errors import ConfigError, DataError
from nemo_srl.models.license import license_of
from nemo_srl.models.publication import publish_model
from nemo_srl.records import PreferencePair
from nemo_srl.report import model_card
from nemo_srl.runs import Run, StageRun, open_run, read_spec

log = logging.getLogger(__name__)


@dataclass
class Options:
    run_dir: str = MISSING
    output_dir: str = ""
    """Empty: `<run_dir>/export`."""
    formats: list[str] = field(default_factory=lambda: list(FORMATS))
    iterations: list[int] = field(default_factory=list)
    """The iterations whose pairs are exported. Empty: all of them."""
    model: str = "last"
    """M1, M2, ..., or `last`, or `none`."""
    license: str = ""
    """The license of the base model by its name on the Hub, e.g. apache-2.0. Empty: what the base model's card says."""


def chosen_pairs(run: Run, iterations: list[int]) -> list[tuple[int, PreferencePair]]:
    """The pairs of the given iterations, or of all."""
    wanted = iterations or run.iterations
    pairs = [(t, p) for t in wanted for p in run.table(t, "pairs", PreferencePair)]
    if not pairs:
        raise DataError(
            f"iterations={wanted}: {run.run_dir} holds no pairs of these iterations. It has the iterations "
            f"{run.iterations}."
        )
    return pairs


def chosen_model(run: Run, name: str) -> tuple[str, StageRun]:
    """The model's name, and the stage that made it."""
    models = run.models()
    if not models:
        raise DataError(f"run_dir={run.run_dir}: no model is finished yet. Export after the first training has ended.")
    name = list(models)[-1] if name == "last" else name
    if name not in models:
        raise ConfigError(f"model={name}: this run has {', '.join(models)}. Give one of them, or last, or none.")
    return name, models[name]


def base_license(run: Run) -> str | None:
    """The license of the base model; None when its directory does not name one."""
    sft = run.find(0, "sft")
    base = Path(read_spec(sft.path)["inputs"]["policy"]["path"]) if sft else Path()
    return license_of(run.config()["model"]["path"], base)


def export(options: Options) -> None:
    run = open_run(Path(options.run_dir))
    output = Path(options.output_dir) if options.output_dir else run.run_dir / "export"
    model = run.config()["model"]
    template, tags, variables = (model.get(key) for key in ("chat_template", "thinking_tags", "chat_template_kwargs"))
    name, stage = chosen_model(run, "last" if options.model == "none" else options.model)
    chat = ChatTemplate(stage.path / "hf", chat_template=template, thinking_tags=tags, variables=variables)
    template = chat.template if variables else template
    if run.iterations and options.formats:
        pairs = chosen_pairs(run, options.iterations)
        for path in write_pairs(pairs, output / "pairs", formats=options.formats, chat=chat):
            log.info("%6d pairs  %s", len(pairs), path)
    if options.model != "none":
        card = model_card(run, name, license=options.license or base_license(run))
        publish_model(stage.path / "hf", output / name, card=card, chat_template=template)
        log.info("%12s  %s", name, output / name)


if __name__ == "__main__":
    cli.run_program(Options, export)
