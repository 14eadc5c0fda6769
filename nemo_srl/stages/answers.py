"""Answers: a model answers each question once, turn by turn, for benchmarks and for comparing models.

`sample_index` of the published candidates is the number of the turn. The sampling settings are those of `candidates`.
"""

from __future__ import annotations

from statistics import fmean

from nemo_srl.chat import ChatTemplate
from nemo_srl.protocols import GenerationRequest
from nemo_srl.records import Candidate, Question
from nemo_srl.stages.base import MODEL, Context, Made, table_stage
from nemo_srl.stages.calls import open_caller


def _request(q: Question, turn: int, given: list[tuple[str, str]], chat: ChatTemplate, seed: int) -> GenerationRequest:
    text = q.turns[turn]
    ids = chat.encode(chat.render_turns(given, text))
    key = f"{q.key}/turn{turn}"
    return GenerationRequest(key=key, prompt_token_ids=ids, text=text, earlier_turns=tuple(given), n=1, seed=seed)


def run(ctx: Context) -> Made[Candidate]:
    cfg, questions = ctx.cfg, ctx.read("questions", Question)
    num_turns = max(len(q.turns) for q in questions)
    given: dict[str, list[tuple[str, str]]] = {q.key: [] for q in questions}
    answers: list[Candidate] = []
    with open_caller(ctx) as caller:
        for turn in range(num_turns):
            asked = [q for q in questions if turn < len(q.turns)]
            requests = [_request(q, turn, given[q.key], ctx.chat, cfg.seed) for q in asked]
            completions = caller.complete(requests, "candidates", title=f"answers, turn {turn + 1}")
            for q, r in zip(asked, requests, strict=True):
                (c,) = completions[r.key]
                response = c.text.strip()
                given[q.key].append((q.turns[turn], response))
                answers.append(
                    Candidate(
                        prompt_id=q.key,
                        sample_index=turn,
                        prompt=q.turns[turn],
                        response=response,
                        num_tokens=c.num_tokens,
                        finish_reason=c.finish_reason,
                    )
                )
    return Made(
        answers,
        {
            "num_answers": len(answers),
            "mean_tokens": fmean(a.num_tokens for a in answers),
            "mean_characters": fmean(len(a.response) for a in answers),
            "truncated_rate": fmean(a.finish_reason == "length" for a in answers),
        },
    )


STAGE = table_stage(
    "answers",
    Candidate,
    run,
    needs={"policy": MODEL, "questions": Question},
    settings=("candidates.temperature", "candidates.top_p", "candidates.max_tokens", "model.chat_template", "seed"),
    engines=("candidates",),
)
