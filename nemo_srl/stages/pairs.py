"""Preference pairs: from the scored answers to each prompt, a chosen and a rejected one (paper section 2.3).

`nemo_srl/pairing/` has the rules. Prompts without a pair are counted by their reasons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_srl import lineage
from nemo_srl.config import Config
from nemo_srl.errors import NoPairsError
from nemo_srl.judging import mean_scores
from nemo_srl.pairing import LABELS, build_pairs
from nemo_srl.records import Candidate, Judgement, PreferencePair
from nemo_srl.stages.base import Context, Made, table_stage

# By the reason why a prompt has no pair: what may help, and the settings for it.
_REMEDIES: Mapping[str, Sequence[tuple[str, Sequence[str]]]] = {
    "tied": (
        ("More verdicts or answers: raise", ("judge.num_judgements", "candidates.num_samples")),
        ("More different answers: raise", ("candidates.temperature",)),
    ),
    "unscored": (("Verdicts are cut off or have no score: raise", ("judge.max_tokens",)),),
    "truncated": (("Longer answers: raise", ("candidates.max_tokens",)),),
    "identical": (("More different answers: raise", ("candidates.temperature",)),),
}


def run(ctx: Context) -> Made[PreferencePair]:
    judgements = ctx.read("judgements", Judgement)
    pairs, dropped = build_pairs(ctx.read("candidates", Candidate), mean_scores(judgements), ctx.cfg.pairs)
    if not pairs:
        raise NoPairsError(
            f"{_why_none(ctx.cfg, dropped, judgements)}\n{_remedies(ctx.cfg, dropped, ctx.output.path.parent.parent)}"
        )
    counts = {f"num_{reason}": dropped[reason] for reason in (*LABELS, *sorted(dropped.keys() - LABELS.keys()))}
    per_100 = 100 * len(pairs) / (len(pairs) + dropped.total())
    return Made(pairs, {"num_pairs": len(pairs), "pairs_per_100_prompts": per_100, **counts})


def _why_none(cfg: Config, dropped: Counter[str], judgements: Sequence[Judgement]) -> str:
    invalid = sum(j.score is None for j in judgements)
    named = LABELS.keys() - {"unanswered"}
    others = "".join(
        f", {n} {LABELS.get(reason, reason)}" for reason, n in sorted(dropped.items()) if reason not in named
    )
    return (
        f"no preference pair in {dropped.total()} prompts, so there is nothing to train on: {dropped['tied']} tied "
        f"(margin at most pairs.min_margin={cfg.pairs.min_margin}), {dropped['unscored']} with fewer than two "
        f"scored answers, {dropped['truncated']} with no answer that ended before candidates.max_tokens="
        f"{cfg.candidates.max_tokens}, {dropped['identical']} with equal texts{others}; {invalid} of "
        f"{len(judgements)} verdicts had no score."
    )


def _remedies(cfg: Config, dropped: Counter[str], run_dir: Path) -> str:
    """What may help, the most frequent reason first, and what to delete in this run directory before it is set."""
    found = dict.fromkeys(remedy for reason, _ in dropped.most_common() for remedy in _REMEDIES.get(reason, ()))
    if dropped["tied"] and cfg.pairs.min_margin:
        found = {("Smaller differences count, too: lower", ("pairs.min_margin",)): None, **found}
    lines = [
        "Nothing was changed. A new run_dir takes any settings. In this one, delete what was made with the old value "
        "before you change a setting; the next start makes it again, and all other stages stay:"
    ]
    for what, settings in found:
        names = " or ".join(f"{key} (now {_value(cfg, key)})" for key in settings)
        old = lineage.with_settings(run_dir, settings)
        lines.append(f"  {what} {names}.{f' First: {lineage.removal(old)}' if old else ''}")
    lines.append(
        "If the judge gives no usable scores whatever you set, train it on more EFT data (data.eft_path, or more "
        "sft.max_epochs). This changes M1, and so everything: use a new run_dir."
    )
    return "\n".join(lines)


def _value(cfg: Config, key: str) -> object:
    section, name = key.split(".")
    return getattr(getattr(cfg, section), name)


def summary(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    # Every prompt is counted once: by its pair, or by the reason why it has none.
    num_prompts = sum(value for name, value in metrics.items() if name.startswith("num_"))
    return [("pairs", f"{metrics['num_pairs']:.0f} of {num_prompts:.0f} prompts")]


STAGE = table_stage(
    "pairs",
    PreferencePair,
    run,
    needs={"candidates": Candidate, "judgements": Judgement},
    settings=("pairs",),
    version=2,  # a pair says whether its answers were cut off
    summary=summary,
)
