"""The data of the page's browser: every candidate with its prompt, its verdicts and its role in a pair.

The page holds the data as JSON in a `<script type="application/json">`. `island` escapes the characters that HTML and
JavaScript could read, so text of a model can neither end that element nor start another one. A run with more than
`max_candidates` loses whole prompts, the same number of candidates in each iteration. They are counted.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Sequence
from typing import Any

from markupsafe import Markup

from nemo_srl import jsonio
from nemo_srl.judging import mean_scores
from nemo_srl.records import Candidate, Comparison, Judgement, PreferencePair
from nemo_srl.runs import Run

MAX_CANDIDATES = 20_000
"""Browsers open a page with more candidates slowly."""

NEITHER, CHOSEN, REJECTED = 0, 1, 2

_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


Verdict = list[float | str | None]
"""Score and text."""
Group = tuple[list[Any], list[list[Any]]]
"""A row of `prompts`, and the rows of its candidates without their first field."""


def browser_data(run: Run, *, max_candidates: int = MAX_CANDIDATES) -> dict[str, Any]:
    """The data as a JSON object.

    prompts      [iteration, id, text] for each prompt
    candidates   [index of the prompt, index of the sample, response, number of tokens, 1 if it was cut off else 0,
                 mean score or null, CHOSEN or REJECTED or NEITHER, [[score or null, verdict], ...]] for each candidate
    num_omitted  how many candidates were left out
    """
    return packed([_groups(run, t) for t in run.iterations], max_candidates)


def packed(parts: Sequence[Collection[Group]], max_candidates: int) -> dict[str, Any]:
    """The JSON object of the groups that fit. Each part has room for the same number of candidates."""
    prompts: list[list[Any]] = []
    candidates: list[list[Any]] = []
    num_omitted = 0
    for groups in parts:
        room = max_candidates // len(parts)
        for prompt, rows in groups:
            if len(rows) > room:
                num_omitted += len(rows)
                continue
            room -= len(rows)
            candidates += [[len(prompts), *row] for row in rows]
            prompts.append(prompt)
    return {"prompts": prompts, "candidates": candidates, "num_omitted": num_omitted}


def candidate_row(c: Candidate, sample: int, score: float | None, role: int, verdicts: Sequence[Verdict]) -> list[Any]:
    """A row of `candidates` without its first field. Without an answer, the reason stands in its place."""
    text = c.response if c.is_answered else f"(no answer: {c.reason})"
    return [sample, text, c.num_tokens, int(c.finish_reason == "length"), score, role, verdicts]


def verdict_text(verdict: Judgement | Comparison) -> str:
    """The verdict, or the reason why there is none."""
    return f"(no verdict: {verdict.reason})" if verdict.reason else verdict.verdict


def _groups(run: Run, t: int) -> Collection[Group]:
    judgements = run.table(t, "judgements", Judgement)
    scores = mean_scores(judgements)
    verdicts: dict[str, list[Verdict]] = defaultdict(list)
    for j in judgements:
        verdicts[j.candidate_key].append([j.score, verdict_text(j)])
    roles: dict[tuple[str, str, float | None], int] = {}
    for p in run.table(t, "pairs", PreferencePair):
        roles[p.prompt_id, p.chosen, p.chosen_score] = CHOSEN
        roles[p.prompt_id, p.rejected, p.rejected_score] = REJECTED
    groups: dict[str, Group] = {}
    for c in run.table(t, "candidates", Candidate):
        score = scores.get(c.key)
        # Two candidates may have the same text and score. The first one is marked as the pair's.
        role = roles.pop((c.prompt_id, c.response, score), NEITHER)
        _, rows = groups.setdefault(c.prompt_id, ([t, c.prompt_id, c.prompt], []))
        rows.append(candidate_row(c, c.sample_index, score, role, verdicts[c.key]))
    return groups.values()


def island(data: object) -> Markup:
    """JSON that is safe inside a script element, whatever text it contains."""
    text = jsonio.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return Markup(text)
