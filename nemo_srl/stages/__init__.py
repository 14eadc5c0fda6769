"""The stages of the loop, one module each. A stage reads published artifacts and writes exactly one.

sft          M0, IFT and EFT seed              -> M1
prompts      M_t, IFT seed                     -> new instructions
candidates   M_t, prompts                      -> N responses each
judgements   M_t, candidates                   -> K verdicts each
pairs        candidates, judgements            -> chosen and rejected
verdict_pairs  candidates, judgements, EFT seed -> verdicts on damaged answers         optional
taught_verdicts, meta_judge: other pairs of verdicts, by M_t itself                  optional
anchor       M1, candidates, judgements, pairs -> figures for the alarms
policy       M_t, pairs                        -> M_{t+1}
eft          M_{t+1}, ranked answers           -> verdicts that agree with people        optional
refresh      M_{t+1}, verdicts, own answers    -> M_{t+1} with its judging refreshed     optional
evaluation   M_t, held-out EFT                 -> metrics

answers, head_to_head and ifeval compare models (`recipes/evaluate.py`). With answers and head_to_head, early stopping
also compares the checkpoints of a training, of which `chosen` publishes one.
"""

from __future__ import annotations

from typing import Any

from nemo_srl import registry
from nemo_srl.stages.base import MODEL, Context, Input, Made, Need, Result, Stage, Step, settings_of, table_stage

__all__ = [
    "LOOP", "MODEL", "Context", "Input", "Made", "Need", "Result", "Stage", "Step", "settings_of", "stage_at",
    "stage_named", "table_stage",
]  # fmt: skip

LOOP = (
    "sft", "prompts", "candidates", "judgements", "pairs", "verdict_pairs", "taught_verdicts", "meta_judge", "anchor",
    "policy", "chosen", "eft", "refresh", "evaluation", "answers", "head_to_head", "ifeval",
)  # fmt: skip
"""All stages, in the order in which they run. Reports and plans use this order."""


def stage_named(name: str) -> Stage[Any]:
    """A stage of this package, by the name of its module."""
    return stage_at(f"{__name__}.{name}")


def stage_at(module: str) -> Stage[Any]:
    """The stage that a module exports as `STAGE`."""
    found: Stage[Any] = registry.imported(module, key="stage", attribute="STAGE")
    return found
