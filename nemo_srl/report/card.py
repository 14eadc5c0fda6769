"""The model card of a trained model: `README.md` of its Hugging Face directory, with the Hub's metadata.

It says what the model was made of and how, and what was measured, in the run's own figures; nothing is claimed that the
run directory does not hold. Not covered: what the model is good for, and its risks; those are for people to write.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_srl.report.text import table
from nemo_srl.runs import Run

_RECIPE = (
    "seed", "num_iterations",
    "sft.learning_rate", "sft.min_learning_rate", "sft.global_batch_size", "sft.max_epochs",
    "candidates.num_samples", "candidates.temperature", "candidates.top_p", "candidates.max_tokens",
    "judge.num_judgements", "judge.mode", "judge.max_score",
    "dpo.learning_rate", "dpo.min_learning_rate", "dpo.global_batch_size", "dpo.max_epochs", "dpo.beta",
    "dpo.preference_loss", "dpo.sft_loss_weight", "trainer.precision",
)  # fmt: skip


_MEASURED = (
    "On held-out data that no stage trained on, by the run itself. The self-score is the model's own opinion of its "
    "answers and no proof of their quality. Intervals are 95% bootstrap intervals."
)


def model_card(run: Run, model: str, *, licence: str | None) -> str:
    """The card of `model` ("M1", "M2", ...), with `licence` of the base model (None: not known)."""
    config = run.config()
    base = str(config["model"]["path"])
    name = f"{run.run_dir.resolve().name}-{model}"
    sections = [
        _metadata(base=base, licence=licence, name=name),
        f"# {name}",
        _introduction(model, base=base, licence=licence),
        "## Data\n\n" + "\n".join(_data(run)),
        "## Recipe\n\n" + "\n".join(_recipe(config)),
        f"## Measured\n\n{_MEASURED}\n\n{table(run.evaluations())}",
        "The judge's prompt, which the model was taught to follow:\n\n" + _indented(config["judge"]["rubric"]),
    ]
    return "\n\n".join(sections) + "\n"


def _metadata(*, base: str, licence: str | None, name: str) -> str:
    # JSON strings are YAML strings. A licence that is not known is `unknown`, which the Hub accepts.
    lines = [f"license: {json.dumps(licence or 'unknown')}", "library_name: transformers"]
    lines += [f"base_model: {json.dumps(Path(base).name if '/' in base else base)}"]
    lines += ["pipeline_tag: text-generation", "tags:", "- self-rewarding", "- dpo", "- nemo-aligner"]
    lines += [f"model_name: {json.dumps(name)}"]
    return "---\n" + "\n".join(lines) + "\n---"


def _introduction(model: str, *, base: str, licence: str | None) -> str:
    number = int(model.removeprefix("M"))
    made = "supervised fine-tuning on seed data"
    if number > 1:
        plural = "s" if number > 2 else ""
        made += f" and {number - 1} iteration{plural} of DPO on pairs that the model made and judged itself"
    terms = f"its licence, {licence}, applies" if licence else "**its licence, which we do not know, applies**"
    return (
        f"{model} of a self-rewarding training ([Yuan et al. 2024](https://arxiv.org/abs/2401.10020)) of "
        f"`{Path(base).name}`: {made}. The model is derived from that base model, so {terms}."
    )


def _data(run: Run) -> list[str]:
    """One line per source, by its file name; absolute paths stay out of what is published."""
    lines = []
    sft = run.find(0, "sft")
    if sft:
        for name, row in run.spec(sft)["inputs"].items():
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
    lines = []
    for key in _RECIPE:
        value: Any = config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            lines.append(f"- `{key}={value}`")
    return lines


def _indented(text: str) -> str:
    return "\n".join(f"    {line}".rstrip() for line in text.splitlines())
