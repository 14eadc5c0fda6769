"""Answers: a model answers each question once, turn by turn, for benchmarks and for comparing models.

`sample_index` of the published candidates is the number of the turn. The sampling settings are those of `candidates`.
After a turn without an answer, the question's other turns are not asked, and have none either.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import fmean

from nemo_srl.protocols import GenerationRequest
from nemo_srl.records import Candidate, Question
from nemo_srl.stages.base import CHAT, MODEL, Context, Made, table_stage
from nemo_srl.stages.calls import open_caller
from nemo_srl.stages.candidates import answered, candidate, length_figures


def _request(q: Question, given: list[tuple[str, str]], ctx: Context) -> GenerationRequest:
    """Asks for the answer to the first turn that is not yet `given`."""
    turn, text = len(given), q.turns[len(given)]
    ids = ctx.chat.encode(ctx.chat.render(text, after=given))
    key, earlier, seed = f"{q.key}/turn{turn}", tuple(given), ctx.cfg.seed
    return GenerationRequest(key=key, prompt_token_ids=ids, text=text, earlier_turns=earlier, n=1, seed=seed)


def run(ctx: Context) -> Made[Candidate]:
    questions = ctx.read("questions", Question)
    given: dict[str, list[tuple[str, str]]] = {q.key: [] for q in questions}
    answers: list[Candidate] = []
    with open_caller(ctx) as caller:
        for turn in range(max(len(q.turns) for q in questions)):
            asked = [q for q in questions if turn < len(q.turns) and len(given[q.key]) == turn]
            requests = {q.key: _request(q, given[q.key], ctx) for q in asked}
            found = caller.complete(list(requests.values()), "candidates", title=f"answers, turn {turn + 1}")
            for q in asked:
                r = requests[q.key]
                answers.append(candidate(q.key, turn, r.text, found[r.key][0]))
                if answers[-1].is_answered:
                    given[q.key].append((r.text, answers[-1].response))
                else:
                    answers += _not_asked(q, answers[-1])
    characters = fmean(len(a.response) for a in answered(answers))
    figures = {"num_answers": len(answers), "mean_characters": characters, **length_figures(answers)}
    return Made(answers, {**figures, **caller.figures()})


def _not_asked(q: Question, last: Candidate) -> list[Candidate]:
    """The turns after `last`, which has no answer."""
    reason = f"turn {last.sample_index + 1} has no answer: {last.reason}"
    numbers = range(last.sample_index + 1, len(q.turns))
    return [replace(last, sample_index=i, prompt=q.turns[i], reason=reason) for i in numbers]


STAGE = table_stage(
    "answers",
    Candidate,
    run,
    version=2,  # thoughts are no part of a response
    needs={"policy": MODEL, "questions": Question},
    settings=(
        "candidates.temperature",
        "candidates.top_p",
        "candidates.max_tokens",
        *CHAT,
        "seed",
    ),
    engines=("candidates",),
)
