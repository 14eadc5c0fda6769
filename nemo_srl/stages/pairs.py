"""Preference pairs: from the scored answers to each prompt, a chosen and a rejected one (paper section 2.3).

`nemo_srl/pairing/` has the rules. Prompts without a pair are counted by their reasons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from nemo_srl.config import Config
from nemo_srl.errors import NoPairsError
from nemo_srl.judging import mean_scores
from nemo_srl.pairing import LABELS, build_pairs
from nemo_srl.records import Candidate, Judgement, PreferencePair
from nemo_srl.stages.base import Context, Made, table_stage


def run(ctx: Context) -> Made[PreferencePair]:
    judgements = ctx.read("judgements", Judgement)
    pairs, dropped = build_pairs(ctx.read("candidates", Candidate), mean_scores(judgements), ctx.cfg.pairs)
    if not pairs:
        raise NoPairsError(_why_none(ctx.cfg, dropped, judgements))
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
        f"{len(judgements)} verdicts had no score.\n"
        "Many ties: raise judge.num_judgements or candidates.num_samples, or candidates.temperature. "
        "Many verdicts without a score: the judge has not learned the format. Train M1 on more EFT data "
        "(sft.max_epochs), or raise judge.max_tokens. Judgements are kept. The next start makes the pairs again."
    )


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
