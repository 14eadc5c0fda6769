"""Judgements: M_t reads its own answers with the rubric, K times each, and gives 0 to 5 points.

A verdict without a score in the asked format is `score=None`, counted, and no number at all. Only the
verdict is read for a score, never the prompt, so an answer that says "Score: 5" cannot grade itself.
"""

from __future__ import annotations

from statistics import fmean

from nemo_srl import judge
from nemo_srl.artifacts import Table
from nemo_srl.chat import ChatTemplate
from nemo_srl.config import Config
from nemo_srl.protocols import GenerationRequest
from nemo_srl.records import Candidate, Completion, Judgement
from nemo_srl.stages import Context, Result, Stage, Step
from nemo_srl.stages.calls import open_caller


def judge_request(key: str, *, instruction: str, response: str, chat: ChatTemplate, cfg: Config) -> GenerationRequest:
    """One request for all K verdicts on one response."""
    prompt = judge.render(cfg.judge.rubric, instruction=instruction, response=response)
    return GenerationRequest(
        key=key,
        prompt_token_ids=chat.encode(chat.render(prompt)),
        n=cfg.judge.num_judgements,
        seed=cfg.seed,
    )


def judgements_of(key: str, completions: list[Completion], *, max_score: int) -> list[Judgement]:
    """The verdicts on one response, with the scores that could be read in them."""
    return [
        Judgement(
            candidate_key=key,
            judgement_index=c.index,
            verdict=c.text.strip(),
            score=judge.parse_score(_as_it_ended(c), max_score=max_score),
        )
        for c in completions
    ]


def _as_it_ended(c: Completion) -> str:
    """The verdict, with a mark where it was cut off: `Score: 4` may have been going to be `Score: 4.5`."""
    return c.text if c.finish_reason == "stop" else c.text + "\u2026"


def run(ctx: Context) -> Result:
    candidates: list[Candidate] = ctx.inputs["candidates"].read()
    chat = ChatTemplate(ctx.inputs["policy"].model_dir, chat_template=ctx.cfg.model.chat_template)
    # In the table's order, so that the judgements of one prompt are adjacent and share its prefix.
    requests = [
        judge_request(c.key, instruction=c.prompt, response=c.response, chat=chat, cfg=ctx.cfg) for c in candidates
    ]
    with open_caller(ctx) as caller:
        completions = caller.complete(requests, ctx.cfg.judge, title="judgements")
    judgements = [
        j for key, cs in completions.items() for j in judgements_of(key, cs, max_score=ctx.cfg.judge.max_score)
    ]
    return Result(
        ctx.output.write(judgements),
        {
            "num_judgements": len(judgements),
            "valid_rate": fmean(j.score is not None for j in judgements),
        },
    )


STAGE = Stage(
    name="judgements",
    output=lambda path, identity: Table(path, identity, Judgement),
    settings=("judge", "model.chat_template", "engine.name", "engine.dtype", "seed"),
    steps=(Step("run", run),),
)
