"""Judging (paper section 2.2: LLM-as-a-Judge): a model reads answers and says in words how good they are.

Stages ask a `Judge`. How it asks, and how its verdicts become scores, is up to a `VerdictReader`; the setting
`judge.mode` chooses one. Model output is untrusted: a verdict that cannot be read is `score=None`. Callers count it
and never make a number of it. Only the verdict is read, never the prompt, so an answer that says "Score: 5" cannot
grade itself.
"""

from nemo_srl.judging.beginning import beginning
from nemo_srl.judging.judge import Complete, Judge
from nemo_srl.judging.points import Material
from nemo_srl.judging.readers import READERS, VerdictReader, asks_models, reader
from nemo_srl.judging.scores import mean_score, mean_scores

__all__ = [
    "READERS", "Complete", "Judge", "Material", "VerdictReader", "asks_models", "beginning", "mean_score",
    "mean_scores", "reader",
]  # fmt: skip
