"""The table and the plot of `axes.py`: what code says of every model's answers and judging.

    python examples/axes/axes_figures.py runs/axes

Both axes are measured on the held-out instructions of the checked data. A value of a model is the mean over seeds. Its
95% interval is over instructions, each together in all seeds. The gain M_last - M1 is paired: the same
instruction, or the same pair of answers, of the same seed.

The table has a second opinion on the answers: how many of an instruction's rules they keep, by IFEval's own checks. It
needs the sentence splitter that `nemo_srl/data/verifiable.py` names. Without it, the table says why it is missing.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from nemo_srl.artifacts import file_of, read_jsonl
from nemo_srl.checked import true_scores
from nemo_srl.data.checked import ifeval
from nemo_srl.data.checked.truth import CheckedInstruction
from nemo_srl.data.verifiable import Verifier
from nemo_srl.errors import ConfigError, DataError
from nemo_srl.judging import mean_scores
from nemo_srl.judging.intervals import Estimate, Limits, ratio, sums_of
from nemo_srl.judging.verifier import share_followed
from nemo_srl.records import Candidate, EFTExample, Judgement, Metric, VerifiablePrompt
from nemo_srl.report.text import markdown

Values = Mapping[str, Sequence[float]]
"""By instruction: a value for each answer, or for each pair of held-out answers."""

AXES = {"answering": "True score of held-out answers, 0 to 5", "judging": "Pairwise accuracy of the judge"}
COLOURS = {"self": "#0072b2", "no_verdict_pairs": "#009e73", "random": "#d55e00"}
LIMITS: Mapping[str, Limits] = {"answering": (0.0, 5.0), "judging": (0.0, 1.0), "rules (IFEval)": (0.0, 1.0)}


def run_dir_of(root: Path, seed: int, name: str) -> Path:
    """The run directory of an arm, or of `m1`."""
    return root.absolute() / f"seed_{seed}" / name


def evaluation_of(root: Path, seed: int, arm: str, model: int) -> Path:
    """The directory with what M_`model` answered and judged. Arms share M1."""
    run = run_dir_of(root, seed, "m1" if model == 1 else arm)
    return run / f"iter_{model - 1:02d}" / "evaluation"


def source(evaluation: Path, name: str) -> Path:
    """The file that the stage `checked` beside the evaluation read as this input."""
    spec = json.loads((evaluation.with_name("checked") / "stage.json").read_text())
    return Path(spec["inputs"][name]["path"])


def answering(evaluation: Path) -> Values:
    """The true score of each answer."""
    instructions = read_jsonl(source(evaluation, "instructions"), CheckedInstruction)
    found = true_scores(read_jsonl(file_of(evaluation, "answers"), Candidate), instructions)
    return {instruction: [float(s.score) for s in scores] for instruction, scores in found.items()}


def judging(evaluation: Path) -> Values:
    """1 for each pair of held-out answers that the judge orders rightly, 0 for a wrong order, and 0.5 for a tie."""
    scores = mean_scores(read_jsonl(file_of(evaluation, "judgements"), Judgement))
    by_instruction: dict[str, list[EFTExample]] = defaultdict(list)
    for x in read_jsonl(source(evaluation, "eft_eval"), EFTExample):
        by_instruction[x.instruction].append(x)
    return {instruction: list(_orders(group, scores)) for instruction, group in by_instruction.items()}


def _orders(examples: Sequence[EFTExample], scores: Mapping[str, float]) -> Iterator[float]:
    for a, b in itertools.combinations(examples, 2):
        if a.score != b.score:
            # A verdict without a score cannot order a pair, so the pair counts as tied.
            margin = scores[a.key] - scores[b.key] if a.key in scores and b.key in scores else 0.0
            yield 0.5 if margin == 0 else float((margin > 0) == (a.score > b.score))


def rules(evaluation: Path, verifier: Verifier) -> Values:
    """The share of the instruction's rules that each answer keeps, by IFEval's own strict checks. Instructions without
    a rule that IFEval can check are left out."""
    instructions = read_jsonl(source(evaluation, "instructions"), CheckedInstruction)
    prompts = [
        VerifiablePrompt(
            prompt_id=row.key, text=row.prompt, instruction_ids=row.instruction_id_list, arguments=row.kwargs
        )
        for row in ifeval.prompts(instructions)
    ]
    share, found = share_followed(prompts, verifier), defaultdict(list)
    for answer in read_jsonl(file_of(evaluation, "answers"), Candidate):
        if answer.is_answered and (kept := share(answer.prompt, answer.response)) is not None:
            found[answer.prompt].append(kept)
    return found


def measures() -> tuple[dict[str, Callable[[Path], Values]], str]:
    """What is measured of a model's evaluation, and why the rules are not, if so."""
    both: dict[str, Callable[[Path], Values]] = {"answering": answering, "judging": judging}
    try:
        return {**both, "rules (IFEval)": functools.partial(rules, verifier=Verifier())}, ""
    except ConfigError as e:
        return both, f" Rules by IFEval's checks are not in the table: {e}."


def mean_of(runs: Sequence[Values], limits: Limits) -> Estimate:
    """The mean over seeds of values in `limits`."""
    return ratio(sums_of({text: [x for run in runs for x in run.get(text, ())] for text in runs[0]}), limits)


def gain(before: Sequence[Values], after: Sequence[Values], limits: Limits) -> Estimate:
    """The paired difference. Samples of an instruction have no order, so their means are compared."""
    span = limits[1] - limits[0]
    differences = [
        {k: [sum(b[k]) / len(b[k]) - sum(a[k]) / len(a[k])] * len(a[k]) for k in a if a[k]}
        for a, b in zip(before, after, strict=True)
    ]
    shared = [k for k in differences[0] if all(k in d for d in differences)]
    return ratio(sums_of({k: [x for d in differences for x in d[k]] for k in shared}), (-span, span))


def shown(x: Estimate, form: str) -> str:
    assert x.value is not None
    text = form.format(x.value)
    return text if x.low is None or x.high is None else f"{text} [{form.format(x.low)}, {form.format(x.high)}]"


def write(root: Path, seeds: Sequence[int], arms: Sequence[str], num_iterations: int) -> str:
    """Write `results.md` and `axes.png`, and return the table."""
    last = num_iterations + 1
    measured, missing = measures()
    found = {
        (axis, arm, model): [measure(evaluation_of(root, seed, arm, model)) for seed in seeds]
        for axis, measure in measured.items()
        for arm in arms
        for model in range(1, last + 1)
    }
    estimates = {key: mean_of(runs, LIMITS[key[0]]) for key, runs in found.items()}
    lines = [["axis", "arm", *(f"M{m}" for m in range(1, last + 1)), f"M{last} - M1, paired", "by seed"]]
    for axis, arm in itertools.product(measured, arms):
        form = "{:.2f}" if axis == "answering" else "{:.3f}"
        signed = form.replace(":", ":+")
        first, final = found[axis, arm, 1], found[axis, arm, last]
        limits = LIMITS[axis]
        by_seed = [signed.format(gain([a], [b], limits).value) for a, b in zip(first, final, strict=True)]
        models = [shown(estimates[axis, arm, m], form) for m in range(1, last + 1)]
        lines.append([axis, arm, *models, shown(gain(first, final, limits), signed), " ".join(by_seed)])
    surface = surface_of(root, seeds[0])
    about = f"Surface baseline of judging: {surface:.3f}. Seeds: {', '.join(map(str, seeds))}.{missing}"
    text = f"{markdown(lines)}\n\n{about}"
    (root / "results.md").write_text(text + "\n")
    plot(estimates, surface, root / "axes.png", num_seeds=len(seeds))
    return text


def surface_of(root: Path, seed: int) -> float:
    """The pairwise accuracy that the look of an answer gives, without its instruction."""
    path = file_of(evaluation_of(root, seed, "m1", 1).with_name("checked"))
    found = next((m.value for m in read_jsonl(path, Metric) if m.name == "surface_accuracy"), None)
    if found is None:
        raise DataError(f"{path}: it has no surface_accuracy, because the run had no data.eft_path. Give it one.")
    return found


def plot(estimates: Mapping[tuple[str, str, int], Estimate], surface: float, path: Path, *, num_seeds: int) -> None:
    """One panel for each axis, one line for each arm, with 95% intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    models = sorted({model for _, _, model in estimates})
    arms = list(dict.fromkeys(arm for _, arm, _ in estimates))
    for panel, (axis, title) in zip(panels, AXES.items(), strict=True):
        for position, arm in enumerate(arms):
            values = [estimates[axis, arm, m] for m in models]
            x = [m + 0.04 * (position - (len(arms) - 1) / 2) for m in models]
            y = [v.value or 0.0 for v in values]
            errors = [[a - (v.low or a) for a, v in zip(y, values, strict=True)],
                      [(v.high or a) - a for a, v in zip(y, values, strict=True)]]  # fmt: skip
            label, colour = arm.replace("_", " "), COLOURS.get(arm)
            panel.errorbar(x, y, yerr=errors, label=label, color=colour, marker="o", markersize=4, capsize=2)
        if axis == "judging":
            panel.axhline(surface, color="#888888", linestyle=":", linewidth=1)
            panel.annotate("surface of the answers", (models[0], surface), va="bottom", fontsize=8, color="#666666")
        panel.set_title(title, loc="left", fontsize=10)
        panel.set_xticks(models, [f"M{m}" for m in models])
        panel.grid(axis="y", alpha=0.3)
    panels[0].legend(frameon=False)
    figure.suptitle(f"Mean of {num_seeds} seed(s), 95% intervals over instructions", x=0.01, ha="left", fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(root: Path) -> None:
    seeds = sorted(int(p.name.removeprefix("seed_")) for p in root.glob("seed_*"))
    if not seeds:
        raise SystemExit(f"error: {root} has no directory seed_*. Run examples/axes/axes.py run_dir={root} first.")
    first = root / f"seed_{seeds[0]}"
    arms = [arm for arm in COLOURS if (first / arm).is_dir()]
    last = max(int(p.name.removeprefix("iter_")) for p in (first / arms[0]).glob("iter_*"))
    print(write(root, seeds, arms, last))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
