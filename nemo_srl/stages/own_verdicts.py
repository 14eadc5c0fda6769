"""Pairs of M_t's own verdicts: what `meta_judge.py` and `taught_verdicts.py` share as stages.

Both read an iteration's answers and M_t's verdicts on them, and ask M_t again. They differ in how they find out which
verdict is the better one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from nemo_srl.artifacts import Table
from nemo_srl.records import Candidate, Judgement, PreferencePair
from nemo_srl.stages.base import CHAT, Context, Made, Need, Stage, settings_of, table_stage

log = logging.getLogger(__name__)


def made(pairs: Sequence[PreferencePair], num_answers: int, figures: Mapping[str, float]) -> Made[PreferencePair]:
    """The result of such a stage, which looked at the verdicts on `num_answers` answers. No pair is no error."""
    if not pairs:
        log.warning("no pair of verdicts from %d answers; DPO trains on answers alone", num_answers)
    return Made(pairs, {"num_pairs": len(pairs), "num_answers": num_answers, **figures})


def stage(name: str, run: Callable[[Context], Made[PreferencePair]], **more: Any) -> Stage[Table[PreferencePair]]:
    """The stage `name`. `more` are further fields of `Stage`."""
    return table_stage(
        name,
        PreferencePair,
        run,
        needs={"judge": Need(None), "candidates": Candidate, "judgements": Judgement},
        settings=("verdict_pairs", *settings_of("judge"), *CHAT, "seed"),
        engines=("judge",),
        model="judge",
        **more,
    )
