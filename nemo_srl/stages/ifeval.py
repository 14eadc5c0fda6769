"""IFEval: how many instructions a model's answers follow. Code checks each instruction.

    ifeval_prompt_strict, ifeval_prompt_loose             share of prompts with every instruction followed
    ifeval_instruction_strict, ifeval_instruction_loose   share of instructions that are followed
    ifeval_unanswered_rate                                share of prompts without an answer, if there are any

These are the four figures of the benchmark (`nemo_srl/data/verifiable.py` says what strict and loose are). The 95%
intervals are over prompts, because one text answers all instructions of a prompt. A prompt without an answer is
missing: it counts in the last figure only. No model is called.
"""

from __future__ import annotations

from collections.abc import Mapping

from nemo_srl.data import verifiable
from nemo_srl.data.verifiable import Followed
from nemo_srl.errors import DataError
from nemo_srl.judging.intervals import SHARE, Sums, ratio, rows_of, sums_of
from nemo_srl.records import Candidate, Metric, VerifiablePrompt
from nemo_srl.stages.base import Context, Made, figures, table_stage
from nemo_srl.stages.unanswered import missing_rate


def sums_in_prompts(followed: Mapping[str, Followed]) -> dict[str, Sums]:
    """What each prompt adds to the four figures. `followed` is by the prompt's key."""
    return {
        "ifeval_prompt_strict": sums_of({key: [all(x.strict)] for key, x in followed.items()}),
        "ifeval_instruction_strict": sums_of({key: x.strict for key, x in followed.items()}),
        "ifeval_prompt_loose": sums_of({key: [all(x.loose)] for key, x in followed.items()}),
        "ifeval_instruction_loose": sums_of({key: x.loose for key, x in followed.items()}),
    }


def metrics_of(sums: Mapping[str, Sums]) -> list[Metric]:
    """The four figures."""
    return [ratio(found, SHARE).named(name) for name, found in sums.items()]


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
    followed = {p.key: verifier.followed(p, answer.response) for p, answer in found if answer.is_answered}
    sums = sums_in_prompts(followed)
    metrics = metrics_of(sums)
    metrics += missing_rate("ifeval_unanswered_rate", len(prompts) - len(followed), len(prompts))
    num_errors = sum(x.num_errors for x in followed.values())
    return Made(metrics, {**figures(metrics), "num_check_errors": num_errors}, {"groups": rows_of(sums)})


STAGE = table_stage(
    "ifeval",
    Metric,
    run,
    version=2,  # intervals (nemo_srl/judging/intervals.py)
    needs={"prompts": VerifiablePrompt, "answers": Candidate},
    settings=(),
)
