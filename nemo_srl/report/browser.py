"""The data of the page's browser: every candidate with its prompt, its verdicts and its role in a pair.

The page holds the data as JSON in a `<script type="application/json">`. `island` escapes the characters that HTML and
JavaScript could read, so text of a model can neither end that element nor start another one. A run with more than
`max_candidates` loses whole prompts, the same number of candidates in each iteration. They are counted.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from nemo_srl.judging import mean_scores
from nemo_srl.records import Candidate, Judgement, PreferencePair
from nemo_srl.runs import Run

MAX_CANDIDATES = 20_000
"""Browsers open a page with more candidates slowly."""

NEITHER, CHOSEN, REJECTED = 0, 1, 2

_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def browser_data(run: Run, *, max_candidates: int = MAX_CANDIDATES) -> dict[str, Any]:
    """The data as a JSON object.

    prompts      [iteration, id, text] for each prompt
    candidates   [index of the prompt, index of the sample, response, number of tokens, 1 if it was cut off else 0,
                 mean score or null, CHOSEN or REJECTED or NEITHER, [[score or null, verdict], ...]] for each candidate
    num_omitted  how many candidates were left out
    """
    prompts: list[list[Any]] = []
    candidates: list[list[Any]] = []
    num_omitted = 0
    for t in run.iterations:
        by_prompt = _by_prompt(run.table(t, "candidates", Candidate))
        judgements = run.table(t, "judgements", Judgement)
        scores = mean_scores(judgements)
        verdicts: dict[str, list[Judgement]] = defaultdict(list)
        for j in judgements:
            verdicts[j.candidate_key].append(j)
        pairs = {p.prompt_id: p for p in run.table(t, "pairs", PreferencePair)}
        room = max_candidates // len(run.iterations)
        for prompt_id, group in by_prompt.items():
            if len(group) > room:
                num_omitted += len(group)
                continue
            room -= len(group)
            prompts.append([t, prompt_id, group[0].prompt])
            candidates += _rows(len(prompts) - 1, group, scores, verdicts, pairs.get(prompt_id))
    return {"prompts": prompts, "candidates": candidates, "num_omitted": num_omitted}


def _by_prompt(candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    groups: dict[str, list[Candidate]] = defaultdict(list)
    for c in candidates:
        groups[c.prompt_id].append(c)
    return groups


def _rows(
    prompt: int,
    group: Sequence[Candidate],
    scores: Mapping[str, float],
    verdicts: Mapping[str, Sequence[Judgement]],
    pair: PreferencePair | None,
) -> list[list[Any]]:
    rows = []
    wanted = {CHOSEN: (pair.chosen, pair.chosen_score), REJECTED: (pair.rejected, pair.rejected_score)} if pair else {}
    for c in group:
        score = scores.get(c.key)
        # Two candidates may have the same text and score. The first one is marked as the pair's.
        role = next((r for r, x in wanted.items() if x == (c.response, score)), NEITHER)
        wanted.pop(role, None)
        cut = int(c.finish_reason == "length")
        judged = [[j.score, j.verdict] for j in verdicts.get(c.key, ())]
        rows.append([prompt, c.sample_index, c.response, c.num_tokens, cut, score, role, judged])
    return rows


def island(data: object) -> Markup:
    """JSON that is safe inside a script element, whatever text it contains."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return Markup(text)
