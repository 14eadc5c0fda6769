"""The model card of a trained model: the `README.md` of its Hugging Face directory, with the Hub's metadata.

It names the data and the settings of the training, and the run's own measurements. It claims nothing that is not in
the run directory. Not covered: what the model is good for, and its risks. People have to write those.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import indent
from typing import Any

from nemo_srl.report.text import table
from nemo_srl.runs import Run, read_spec

_RECIPE = (
    "seed", "num_iterations",
    "sft.learning_rate", "sft.min_learning_rate", "sft.global_batch_size", "sft.max_epochs",
    "candidates.num_samples", "candidates.temperature", "candidates.top_p", "candidates.max_tokens",
    "judge.num_judgements", "judge.mode", "judge.max_score",
    "dpo.learning_rate", "dpo.min_learning_rate", "dpo.global_batch_size", "dpo.max_epochs", "dpo.beta",
    "dpo.preference_loss", "dpo.sft_loss_weight", "trainer.precision",
)  # fmt: skip
"""The settings that the card shows, if the run has them."""

_MEASURED = (
    "The run measured these figures on held-out data that no stage trained on. The self-score is the model's own "
    "opinion of its answers. It does not prove their quality. Intervals are 95%."
)


def model_card(run: Run, model: str, *, license: str | None) -> str:
    """The card of `model` ("M1", "M2", ...). `license` is the base model's; None when it is not known."""
    config = run.config()
    base = str(config["model"]["path"])
    name = f"{run.run_dir.resolve().name}-{model}"
    sections = [
        _metadata(base=base, license=license, name=name),
        f"# {name}",
        _introduction(model, base=base, license=license),
        "## Data\n\n" + "\n".join(_data(run)),
        "## Recipe\n\n" + "\n".join(_recipe(config)),
        f"## Measured\n\n{_MEASURED}\n\n{table(run.evaluations())}",
        "The judge's prompt, which the model was taught to follow:\n\n"
        + indent(config["judge"]["rubric"].rstrip(), "    "),
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(*, base: str, license: str | None, name: str) -> str:
    # JSON strings are YAML strings. The Hub accepts `unknown` as a license.
    license, base, name = map(json.dumps, (license or "unknown", Path(base).name if "/" in base else base, name))
    return (
        f"---\nlicense: {license}\nlibrary_name: transformers\nbase_model: {base}\npipeline_tag: text-generation\n"
        f"tags:\n- self-rewarding\n- dpo\n- nemo-aligner\nmodel_name: {name}\n---"
    )


def _introduction(model: str, *, base: str, license: str | None) -> str:
    number = int(model.removeprefix("M"))
    made = "supervised fine-tuning on seed data"
    if number > 1:
        plural = "s" if number > 2 else ""
        made += f" and {number - 1} iteration{plural} of DPO on pairs that the model made and judged itself"
    terms = f"its license ({license}) applies" if license else "**its license applies, which this run does not know**"
    return (
        f"{model} of a self-rewarding training ([Yuan et al. 2024](https://arxiv.org/abs/2401.10020)) of "
        f"`{Path(base).name}`: {made}. The model is derived from this base model, so {terms}."
    )


def _data(run: Run) -> list[str]:
    """One line for each source. A published card must not show paths of the machine, so only file names are given."""
    lines = []
    if sft := run.find(0, "sft"):
        for name, row in read_spec(sft.path)["inputs"].items():
            if row["kind"] == "file":
                digest = sft.manifest.identity.get(f"input {name}", "?")
                lines.append(f"- {name.upper()} seed: `{Path(row['path']).name}` (digest {digest})")
    for t in run.iterations:
        prompts, pairs = run.find(t, "prompts"), run.find(t, "pairs")
        if pairs:
            kept = prompts.manifest.metrics.get("num_kept") if prompts else None
            made = "given instructions" if kept is None else f"{kept:.0f} generated instructions"
            lines.append(f"- iteration {t}: {pairs.manifest.metrics['num_pairs']:.0f} preference pairs from {made}")
    return lines or ["- not recorded"]


def _recipe(config: Mapping[str, Any]) -> Sequence[str]:
    found: dict[str, Any] = {}
    for key in _RECIPE:
        section, _, name = key.rpartition(".")
        found[key] = (config.get(section, {}) if section else config).get(name)
    return [f"- `{key}={value}`" for key, value in found.items() if value is not None]
