"""Preference pairs: per prompt the best answer against the worst, by mean score (paper section 2.3).

Ties make no pair. Answers cut off at `max_tokens` are never chosen: training on one would teach the
policy to stop in mid-sentence. Each prompt without a pair is counted under its reason.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from nemo_srl.artifacts import Table
from nemo_srl.errors import NoPairsError
from nemo_srl.judging.verdicts import mean_score
from nemo_srl.records import Candidate, Judgement, PreferencePair
from nemo_srl.stages import Context, Lines, Result, Stage, Step

Reason = Literal["tied", "identical", "unscored", "truncated"]


@dataclass(frozen=True)
class Scored:
    """A candidate with the mean of its valid scores."""

    candidate: Candidate
    score: float


def build_pairs(
    candidates: Iterable[Candidate], judgements: Iterable[Judgement], *, min_margin: float
) -> tuple[list[PreferencePair], Counter[Reason]]:
    """Pairs, and how many prompts gave none for which reason."""
    scores: dict[str, list[float | None]] = defaultdict(list)
    for j in judgements:
        scores[j.candidate_key].append(j.score)
    by_prompt: dict[str, list[Candidate]] = defaultdict(list)
    for c in candidates:
        by_prompt[c.prompt_id].append(c)
    pairs: list[PreferencePair] = []
    dropped: Counter[Reason] = Counter()
    for group in by_prompt.values():
        scored = [Scored(c, s) for c in group if (s := mean_score(scores[c.key])) is not None]
        pair = _best_against_worst(scored, min_margin=min_margin)
        if isinstance(pair, PreferencePair):
            pairs.append(pair)
        else:
            dropped[pair] += 1
    return pairs, dropped


def _best_against_worst(scored: list[Scored], *, min_margin: float) -> PreferencePair | Reason:
    if len(scored) < 2:
        return "unscored"
    complete = [s for s in scored if s.candidate.finish_reason == "stop" and s.candidate.response]
    if not complete:
        return "truncated"
    best = min(complete, key=lambda s: (-s.score, s.candidate.sample_index))
    worst = min(scored, key=lambda s: (s.score, s.candidate.sample_index))
    if best.score - worst.score <= min_margin:
        return "tied"
    if best.candidate.response == worst.candidate.response:
        return "identical"
    return PreferencePair(
        prompt_id=best.candidate.prompt_id,
        prompt=best.candidate.prompt,
        chosen=best.candidate.response,
        rejected=worst.candidate.response,
        chosen_score=best.score,
        rejected_score=worst.score,
    )


def run(ctx: Context) -> Result:
    candidates: list[Candidate] = ctx.inputs["candidates"].read()
    judgements: list[Judgement] = ctx.inputs["judgements"].read()
    pairs, dropped = build_pairs(candidates, judgements, min_margin=ctx.cfg.pairs.min_margin)
    num_prompts = len(pairs) + dropped.total()
    if not pairs:
        invalid = sum(j.score is None for j in judgements)
        raise NoPairsError(
            f"no preference pair in {num_prompts} prompts, so there is nothing to train on: {dropped['tied']} tied "
            f"(margin at most pairs.min_margin={ctx.cfg.pairs.min_margin}), {dropped['unscored']} with fewer than two "
            f"scored answers, {dropped['truncated']} with no answer that ended before candidates.max_tokens="
            f"{ctx.cfg.candidates.max_tokens}, {dropped['identical']} with equal texts; {invalid} of "
            f"{len(judgements)} verdicts had no score.\n"
            "Many ties: raise judge.num_judgements or candidates.num_samples, or candidates.temperature. "
            "Many verdicts without a score: the judge was not taught the format, train M1 on more EFT data "
            "(sft.max_epochs) or raise judge.max_tokens. Judgements are kept; pairs are made anew at the next start."
        )
    return Result(
        ctx.output.write(pairs),
        {
            "num_pairs": len(pairs),
            "pairs_per_100_prompts": 100 * len(pairs) / num_prompts,
            **{f"num_{reason}": dropped[reason] for reason in ("tied", "identical", "unscored", "truncated")},
        },
    )


def summary(metrics: Mapping[str, float]) -> Lines:
    num_prompts = sum(n for name, n in metrics.items() if name.startswith("num_"))
    return [("pairs", f"{metrics['num_pairs']:.0f} of {num_prompts:.0f} prompts")]


STAGE = Stage(
    name="pairs",
    output=lambda path, identity: Table(path, identity, PreferencePair),
    settings=("pairs",),
    steps=(Step("run", run),),
    summary=summary,
)
