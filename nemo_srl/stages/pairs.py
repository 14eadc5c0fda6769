"""Preference pairs: from the scored answers to each prompt, a chosen and a rejected one (paper section 2.3).

`nemo_srl/pairing/` has the rules. Prompts without a pair are counted by their reasons. `anchor_candidates` are answers
of an earlier model to the same prompts (`pairs.anchor`), and `anchor_judgements` the judge's verdicts on them.
`second_judgements` are the verdicts of another judge on the candidates (`pairs.second_judge`). The agreement of the two
judges is the confidence in every pair.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from nemo_srl import lineage
from nemo_srl.config import Config
from nemo_srl.errors import NoPairsError
from nemo_srl.judging import mean_scores
from nemo_srl.pairing import LABELS, build_pairs, consistency
from nemo_srl.records import Candidate, Judgement, PreferencePair
from nemo_srl.stages.base import Context, Made, Need, settings_of, table_stage

log = logging.getLogger(__name__)

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
    candidates, scores = ctx.read("candidates", Candidate), mean_scores(judgements)
    anchor = ctx.read("anchor_candidates", Candidate) if ctx.has("anchor_candidates") else []
    on_anchor = ctx.read("anchor_judgements", Judgement) if ctx.has("anchor_judgements") else []
    pairs, dropped = build_pairs(
        candidates, scores, ctx.cfg.pairs, anchor=anchor, anchor_scores=mean_scores(on_anchor)
    )  # fmt: skip
    if not pairs:
        raise NoPairsError(
            f"{_why_none(ctx.cfg, dropped, judgements)}\n{_remedies(ctx.cfg, dropped, ctx.output.path.parent.parent)}"
        )
    counts = {f"num_{reason}": dropped[reason] for reason in (*LABELS, *sorted(dropped.keys() - LABELS.keys()))}
    with_pairs = len({p.prompt_id for p in pairs})
    per_100 = 100 * len(pairs) / (with_pairs + dropped.total())
    # Little of it warns before DPO: a judge that hardly tells the answers apart chooses by something else, e.g. length.
    margin = fmean(p.chosen_score - p.rejected_score for p in pairs)
    figures = {"num_pairs": len(pairs), "pairs_per_100_prompts": per_100, "margin": margin, **counts}
    if with_pairs < len(pairs):
        figures["prompts_with_pairs"] = with_pairs
    if ctx.has("second_judgements"):
        figures["confidence"] = confidence = _confidence(ctx, candidates, scores)
        pairs = [replace(p, confidence=confidence) for p in pairs]
    return Made(pairs, figures)


def _confidence(ctx: Context, candidates: Sequence[Candidate], scores: Mapping[str, float]) -> float:
    """The agreement of the two judges. 1 where nothing can be compared."""
    found = consistency(candidates, scores, mean_scores(ctx.read("second_judgements", Judgement)))
    if found is None:
        log.warning(
            "pairs.second_judge=%r: in no prompt do both judges order two answers, so the confidence in the pairs is 1",
            ctx.cfg.pairs.second_judge,
        )
    return 1.0 if found is None else found


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
    # Every prompt is counted once: by its pairs, or by the reason why it has none.
    num_pairs = metrics["num_pairs"]
    num_prompts = sum(value for name, value in metrics.items() if name.startswith("num_") and name != "num_pairs")
    lines = [("pairs", f"{num_pairs:.0f} of {num_prompts + metrics.get('prompts_with_pairs', num_pairs):.0f} prompts")]
    if (margin := metrics.get("margin")) is not None:
        lines.append(("chosen minus rejected score, mean", f"{margin:.2f}"))
    if (confidence := metrics.get("confidence")) is not None:
        lines.append(("agreement of the two judges", f"{confidence:.2f}"))
    return lines


STAGE = table_stage(
    "pairs",
    PreferencePair,
    run,
    needs={
        "candidates": Candidate,
        "judgements": Judgement,
        "anchor_candidates": Need(Candidate, optional=True),
        "anchor_judgements": Need(Judgement, optional=True),
        "second_judgements": Need(Judgement, optional=True),
    },
    settings=settings_of("pairs"),
    version=2,  # a pair says whether its answers were cut off
    summary=summary,
)
