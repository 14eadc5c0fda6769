"""IFEval: how many instructions a model's answers follow. Code checks each instruction.

    ifeval_prompt_strict, ifeval_prompt_loose             share of prompts with every instruction followed
    ifeval_instruction_strict, ifeval_instruction_loose   share of instructions that are followed
    ifeval_unanswered_rate                                share of prompts without an answer, if there are any

These are the four figures of the benchmark (`nemo_srl/data/verifiable.py` says what strict and loose are). The 95%
intervals resample prompts, because one text answers all instructions of a prompt. A prompt without an answer is
missing: it counts in the last figure only. No model is called.
"""

from __future__ import annotations

from collections.abc import Sequence

from nemo_srl.data import verifiable
from nemo_srl.data.verifiable import Followed
from nemo_srl.errors import DataError
from nemo_srl.judging import agreement
from nemo_srl.records import Candidate, Metric, VerifiablePrompt
from nemo_srl.stages.base import Context, Made, figures, table_stage
from nemo_srl.stages.unanswered import missing_rate


def metrics_of(followed: Sequence[Followed], *, num_bootstrap: int, seed: int) -> list[Metric]:
    """The metrics that the module's docstring lists."""
    groups: dict[str, list[Sequence[float]]] = {
        "prompt_strict": [[all(x.strict)] for x in followed],
        "instruction_strict": [x.strict for x in followed],
        "prompt_loose": [[all(x.loose)] for x in followed],
        "instruction_loose": [x.loose for x in followed],
    }
    estimates = {k: agreement.mean_estimate(g, num_bootstrap=num_bootstrap, seed=seed) for k, g in groups.items()}
    return [e.named(f"ifeval_{k}") for k, e in estimates.items()]


def run(ctx: Context) -> Made[Metric]:
    prompts = ctx.read("prompts", VerifiablePrompt)
    answers = {c.prompt_id: c for c in ctx.read("answers", Candidate)}
    if missing := [p.key for p in prompts if p.key not in answers]:
        raise DataError(
            f"{len(missing)} of {len(prompts)} prompts have no answer, the first is {missing[0]!r}. Give "
            "the answers to these prompts."
        )
    verifier = verifiable.Verifier()
    found = [(p, answers[p.key]) for p in prompts]
    followed = [verifier.followed(p, answer.response) for p, answer in found if answer.is_answered]
    metrics = metrics_of(followed, num_bootstrap=ctx.cfg.evaluation.num_bootstrap, seed=ctx.cfg.seed)
    metrics += missing_rate("ifeval_unanswered_rate", len(prompts) - len(followed), len(prompts))
    return Made(metrics, {**figures(metrics), "num_check_errors": sum(x.num_errors for x in followed)})


STAGE = table_stage(
    "ifeval",
    Metric,
    run,
    needs={"prompts": VerifiablePrompt, "answers": Candidate},
    settings=("evaluation.num_bootstrap", "seed"),
)
