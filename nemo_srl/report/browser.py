"""The data behind the page's browser: every candidate with its prompt, verdicts and place in a pair.

The page holds it as JSON in a `<script type="application/json">`, in which nothing of the models' text can end the
element or start another: `island` escapes what HTML and JavaScript could read. Above `max_candidates` whole
prompts are left out, evenly over the iterations, and counted.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from nemo_srl.judging.verdicts import mean_score
from nemo_srl.records import Candidate, Judgement, PreferencePair
from nemo_srl.runs import Run

MAX_CANDIDATES = 20_000
"""More make a page that browsers open slowly."""

NEITHER, CHOSEN, REJECTED = 0, 1, 2

_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}


def browser_data(run: Run, *, max_candidates: int = MAX_CANDIDATES) -> dict[str, Any]:
    """`prompts`: [iteration, id, text]; `candidates`: [prompt's index, sample's index, response, tokens, whether it was
    cut off, mean score or null, CHOSEN, REJECTED or NEITHER, [[score or null, verdict], ...]]; `num_omitted`."""
    prompts: list[list[Any]] = []
    candidates: list[list[Any]] = []
    num_omitted = 0
    for t in run.iterations:
        by_prompt = _by_prompt(run.table(t, "candidates", Candidate))
        verdicts: dict[str, list[Judgement]] = defaultdict(list)
        for j in run.table(t, "judgements", Judgement):
            verdicts[j.candidate_key].append(j)
        pairs = {p.prompt_id: p for p in run.table(t, "pairs", PreferencePair)}
        room = max_candidates // len(run.iterations)
        for prompt_id, group in by_prompt.items():
            if len(group) > room:
                num_omitted += len(group)
                continue
            room -= len(group)
            prompts.append([t, prompt_id, group[0].prompt])
            candidates += _rows(len(prompts) - 1, group, verdicts, pairs.get(prompt_id))
    return {"prompts": prompts, "candidates": candidates, "num_omitted": num_omitted}


def _by_prompt(candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    groups: dict[str, list[Candidate]] = defaultdict(list)
    for c in candidates:
        groups[c.prompt_id].append(c)
    return groups


def _rows(
    prompt: int, group: Sequence[Candidate], verdicts: Mapping[str, Sequence[Judgement]], pair: PreferencePair | None
) -> list[list[Any]]:
    rows = []
    wanted = {CHOSEN: (pair.chosen, pair.chosen_score), REJECTED: (pair.rejected, pair.rejected_score)} if pair else {}
    for c in group:
        found = verdicts.get(c.key, ())
        score = mean_score([j.score for j in found])
        # Equal texts with equal scores may be there twice; the first one stands for the pair.
        role = next((r for r, x in wanted.items() if x == (c.response, score)), NEITHER)
        wanted.pop(role, None)
        cut = int(c.finish_reason == "length")
        judged = [[j.score, j.verdict] for j in found]
        rows.append([prompt, c.sample_index, c.response, c.num_tokens, cut, score, role, judged])
    return rows


def island(data: object) -> Markup:
    """JSON that can stand in a script element, whatever its strings hold."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    for character, escape in _ESCAPES.items():
        text = text.replace(character, escape)
    return Markup(text)
