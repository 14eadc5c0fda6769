"""Pairwise judging (`judge.mode=pairwise`): every two answers to a prompt are compared, each coming first once.

Judges prefer what they read first; in both orders that evens out: an answer that only wins when it is first
gets half of the two comparisons. The score of an answer is its share of wins times `judge.max_score`, as a mean over
`Judgement`s of 0, half or `max_score`, so that pairs are made of it as of any other. N answers take N (N - 1)
prompts of `judge.num_judgements` verdicts each.

Only the iteration's candidates are compared. Evaluations still ask for points, since shares of wins
against one's own answers cannot be compared between models; nor does the EFT seed teach this format, so a
small M1 needs another judge for it (`judge.engine`).
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from nemo_srl.chat import ChatTemplate
from nemo_srl.config import Config, JudgeConfig
from nemo_srl.judging import verdicts
from nemo_srl.protocols import GenerationRequest
from nemo_srl.records import Candidate, Completion, Judgement
from nemo_srl.stages.calls import verdict_request

_SLOT = re.compile(r"\{(instruction|response_a|response_b)\}")

# As for scores, only the asked format counts, up to the end of the line or sentence, and the last one decides.
_WINNER = re.compile(
    r"(?<![^\W_])(?ai:winner)[*_]{0,3}[ \t]{0,4}:[*_ \t]{0,8}"
    r"(?P<winner>A|B|(?ai:tie))[*_]{0,3}(?=[ \t]{0,4}(?:[.!]|[\r\n]|\Z))"
)
WINNER_LINES = ("Winner: A\n", "Winner: B\n", "Winner: tie\n")
_SHARE_OF_A: Mapping[str, float] = {"a": 1.0, "b": 0.0, "tie": 0.5}


def pairings(candidates: Sequence[Candidate]) -> Iterator[tuple[Candidate, Candidate]]:
    """Every two candidates of a prompt, in both orders; those of a prompt one after the other."""
    by_prompt: dict[str, list[Candidate]] = defaultdict(list)
    for c in candidates:
        by_prompt[c.prompt_id].append(c)
    for group in by_prompt.values():
        yield from itertools.permutations(group, 2)


def comparison_requests(candidates: Sequence[Candidate], chat: ChatTemplate, cfg: Config) -> list[GenerationRequest]:
    """One request for all verdicts on one pairing."""
    return [
        comparison_request(_key(a, b), instruction=a.prompt, responses=(a.response, b.response), chat=chat, cfg=cfg)
        for a, b in pairings(candidates)
    ]


def comparison_request(
    key: str, *, instruction: str, responses: tuple[str, str], chat: ChatTemplate, cfg: Config
) -> GenerationRequest:
    """One request for all verdicts on A and B, which are `responses` in this order."""
    a, b = responses
    prompt = render(cfg.judge.pairwise_rubric, instruction=instruction, response_a=a, response_b=b)
    return verdict_request(key, prompt, stop=WINNER_LINES, chat=chat, cfg=cfg)


def judgements_of_comparisons(
    candidates: Sequence[Candidate], completions: Mapping[str, Sequence[Completion]], cfg: JudgeConfig
) -> list[Judgement]:
    """Two judgements from every verdict, one for each of the two candidates."""
    found: list[Judgement] = []
    count: dict[str, int] = defaultdict(int)
    for a, b in pairings(candidates):
        for completion in completions[_key(a, b)]:
            share = share_of_a(completion)
            for candidate, mine in ((a, share), (b, None if share is None else 1 - share)):
                found.append(
                    Judgement(
                        candidate_key=candidate.key,
                        judgement_index=count[candidate.key],
                        verdict=f"[A is {a.key}, B is {b.key}] {completion.text.strip()}",
                        score=None if mine is None else mine * cfg.max_score,
                    )
                )
                count[candidate.key] += 1
    return found


def share_of_a(verdict: Completion) -> float | None:
    """1, 0 or 0.5 as the verdict says A, B or tie; None when it says nothing of the kind, or was cut off."""
    claims = _WINNER.findall(verdict.text)
    if not claims or verdict.finish_reason == "length":
        return None
    return _SHARE_OF_A[claims[-1].lower()]


def render(rubric: str, *, instruction: str, response_a: str, response_b: str) -> str:
    """The judge's prompt. As in `verdicts.render`, texts are not templates and cannot close their block."""
    texts = {"instruction": instruction, "response_a": response_a, "response_b": response_b}
    safe = {slot: verdicts.render("{response}", instruction="", response=text) for slot, text in texts.items()}
    return _SLOT.sub(lambda slot: safe[slot[1]], rubric)


def _key(a: Candidate, b: Candidate) -> str:
    return f"{a.key}-vs-{b.sample_index:02d}"
