"""Taught verdicts: M_t's own verdicts on two answers whose order is known, the right ones against the wrong ones.

Code damages an answer of M_t (`nemo_srl/data/damage.py`), so the damaged copy is worse. M_t judges it, too. A verdict
on the answer is right if its score is above the mean score of the copy, and a verdict on the copy is right if its score
is below the mean score of the answer. The others are wrong. Each of the two answers with verdicts of both kinds makes a
pair: the clearest right verdict against the clearest wrong one.

This follows Self-Taught Evaluators (Wang et al. 2024, arXiv 2408.02666): there, too, the order of two answers is known
by their making, and verdicts are sampled and kept if they are right. There, a model makes the worse answer by answering
a changed instruction, the judge compares two answers, and SFT trains on right verdicts alone. (The authors' published
model was then trained by DPO on right verdicts against wrong ones.) Here, one kind of damage is an answer to another
instruction, a verdict is on one answer, and DPO trains on the right and the wrong ones.

Unlike `stages/verdict_pairs.py`, this keeps the reasons in the verdicts. An iteration without any such pair is no
error: a judge that is always right has no wrong verdict.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from nemo_srl.config import Config
from nemo_srl.judging import mean_score, mean_scores, reader
from nemo_srl.records import Candidate, Judgement, PreferencePair
from nemo_srl.stages import own_verdicts
from nemo_srl.stages.base import Context, Made
from nemo_srl.stages.calls import open_caller
from nemo_srl.stages.verdict_pairs import Damaged, damaged_answers
from nemo_srl.workload import Assumptions, Generated


def right_and_wrong(
    verdicts: Sequence[Judgement], other: float, *, is_better: bool
) -> tuple[Judgement, Judgement] | None:  # fmt: skip
    """The clearest right and the clearest wrong verdict on an answer, if there are both.

    `other` is the mean score of the other answer, and `is_better` says whether this one is the better of the two. Equal
    scores are wrong. The first of equals counts.
    """
    sign = 1 if is_better else -1
    scored = [(sign * (j.score - other), j) for j in verdicts if j.score is not None]
    right = max((x for x in scored if x[0] > 0), key=lambda x: x[0], default=None)
    wrong = min((x for x in scored if x[0] <= 0), key=lambda x: x[0], default=None)
    return (right[1], wrong[1]) if right and wrong and right[1].verdict != wrong[1].verdict else None


def pairs_of(
    x: Damaged, on_answer: Sequence[Judgement], on_worse: Sequence[Judgement], prompts: tuple[str, str]
) -> list[PreferencePair]:
    """Two pairs at most, of the verdicts on an answer and on its damaged copy, with the judge's prompts for the two."""
    answer_mean, worse_mean = (mean_score([j.score for j in found]) for found in (on_answer, on_worse))
    if answer_mean is None or worse_mean is None:
        return []
    found = {
        "answer": (right_and_wrong(on_answer, worse_mean, is_better=True), prompts[0]),
        "damaged": (right_and_wrong(on_worse, answer_mean, is_better=False), prompts[1]),
    }
    return [
        PreferencePair(
            prompt_id=f"{x.answer.prompt_id}/{name}",
            prompt=prompt,
            chosen=verdicts[0].verdict,
            rejected=verdicts[1].verdict,
            chosen_score=0.0,  # by how many points a verdict is wrong, below zero
            rejected_score=-abs((verdicts[0].score or 0.0) - (verdicts[1].score or 0.0)),
        )
        for name, (verdicts, prompt) in found.items()
        if verdicts
    ]


def run(ctx: Context) -> Made[PreferencePair]:
    cfg = ctx.cfg
    judgements = ctx.read("judgements", Judgement)
    rng = random.Random(f"{cfg.seed}:{ctx.iteration}:verdict_pairs")
    candidates, number = ctx.read("candidates", Candidate), cfg.verdict_pairs.num_prompts
    cases, counts = damaged_answers(
        candidates, mean_scores(judgements), number, rng, max_score=cfg.judge.max_score
    )  # fmt: skip
    on_answer: dict[str, list[Judgement]] = defaultdict(list)
    for j in judgements:
        on_answer[j.candidate_key].append(j)
    answers = {x.answer.key: (x.answer.prompt, x.answer.response) for x in cases}
    copies = {x.answer.key: (x.answer.prompt, x.worse) for x in cases}
    on_worse: dict[str, list[Judgement]] = defaultdict(list)
    with open_caller(ctx) as caller:
        for j in caller.judge.ask(copies, title="damaged answers") if copies else ():
            on_worse[j.candidate_key].append(j)
        figures = caller.figures()
    first, second = (reader(cfg.judge).questions(m, cfg.judge) for m in (answers, copies))
    pairs = [
        p
        for x in cases
        for p in pairs_of(
            x, on_answer[x.answer.key], on_worse[x.answer.key], (str(first[x.answer.key]), str(second[x.answer.key]))
        )
    ]
    return own_verdicts.made(pairs, len(cases), {**_figures(counts), **figures})


def _figures(counts: Counter[str]) -> dict[str, float]:
    return {f"damage_{kind}": number for kind, number in sorted(counts.items())}


def work(cfg: Config, a: Assumptions) -> Generated | None:
    if cfg.verdict_pairs.source != "sampled" or not cfg.verdict_pairs.num_prompts:
        return None
    num_judged = min(cfg.verdict_pairs.num_prompts, cfg.prompts.num_prompts)
    verdict = cfg.judge.num_generated(a.mean_verdict_tokens)
    prompt = a.mean_rubric_tokens + a.mean_prompt_tokens + min(a.mean_response_tokens, cfg.candidates.max_tokens)
    return Generated(num_tokens=num_judged * cfg.judge.num_judgements * verdict, num_prompt_tokens=num_judged * prompt)


def summary(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    return [("verdict pairs", f"{metrics['num_pairs']:.0f} from {metrics['num_answers']:.0f} answers and their copies")]


STAGE = own_verdicts.stage(
    "taught_verdicts",
    run,
    work=work,
    summary=summary,
    version=2,  # three more kinds of damage
)
