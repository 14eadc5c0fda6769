"""New instructions by self-instruct: a model continues a list of 8 tasks (paper section 3.1.1).

Six of the eight come from the IFT seed, and two from instructions kept so far. The new tasks are filtered
(`data/prompt_filter.py`), and rejections are counted by reason. Rounds are repeated until enough tasks are kept, each
as large as the rate of the calls before it asks for. The input `policy` is M_t, or a fixed model (`prompts.model`) as
in the paper. The inputs `earlier` are the instructions of earlier iterations. New ones must differ from these, too.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_srl import lineage
from nemo_srl.config import Config
from nemo_srl.data.diversity import distinct_n, novelty
from nemo_srl.data.prompt_filter import PromptFilter, Reason
from nemo_srl.errors import DataError
from nemo_srl.protocols import GenerationRequest
from nemo_srl.records import Completion, EFTExample, IFTExample, Prompt
from nemo_srl.stages.base import MODEL, Context, Made, Need, settings_of, table_stage
from nemo_srl.stages.calls import open_caller
from nemo_srl.workload import Assumptions, Generated

HEADER = "A numbered list of varied tasks that users give to an AI assistant, each on one line:"
# `9. Write`, `9) Write`, `**9.** Write`, `- 9. Write`, `**Task 9: Write**`, `### 9. Write`, and with full-width marks
_NUMBERED = re.compile(
    r"\s{0,9}[*#>_-]{0,4}\s?(?:(?ai:task)\s)?[\uff08\[(]?(?P<number>\d{1,4})[*_]{0,2}"
    r"(?:[.):\]\u3001\uff0e\uff1a\uff09\u06d4]|\s[\u2013-]\s)[*_]{0,2}\s*(?P<text>.*)"
)
_BULLET = re.compile(r"\s{0,9}[*\u2022-]\s")
_MIN_FIRST_ROUND = 8


def few_shot_text(shots: Sequence[str]) -> str:
    """The text that the model continues. It ends with the number of the next task."""
    lines = [f"{i}. {' '.join(shot.split())}" for i, shot in enumerate(shots, start=1)]
    return "\n".join([HEADER, *lines, f"{len(shots) + 1}."])


def tasks_in(completion: Completion, *, first_number: int) -> list[str]:
    """The tasks in a continuation of a list whose next number is `first_number`.

    A last one that was cut off is left out. The text may go on right behind that number. A chat model rather begins
    with an introduction and ends with a farewell, and neither is a task. So a line without a number counts at the
    beginning only, and only if the number after it is the one after `first_number`. A text without any number is a
    list of lines, and a first one that ends with a colon introduces the others.
    """
    lines = completion.text.split("\n")
    if completion.finish_reason == "length":
        lines = lines[:-1] or lines  # a single line stays, and the filters judge it
    numbered = [match for line in lines if (match := _NUMBERED.match(line))]
    if not numbered:
        found = [text for line in lines if (text := _BULLET.sub("", line).strip())]
        return found[1:] if len(found) > 1 and found[0].endswith((":", "\uff1a")) else found
    tasks = [_without_emphasis(match["text"]) for match in numbered]
    first = next(line.strip() for line in lines if line.strip())
    if not _NUMBERED.match(first) and int(numbered[0]["number"]) == first_number + 1:
        tasks.insert(0, first)
    return [task for task in tasks if task]


def _without_emphasis(text: str) -> str:
    """Without Markdown's marks around the whole text, of which the number may have had the opening one."""
    text = text.strip()
    for mark in ("**", "__", "*"):
        if text.endswith(mark) and mark not in text[: -len(mark)].removeprefix(mark):
            text = text.removesuffix(mark).removeprefix(mark).strip()
    return text


def num_calls_of_round(num_prompts: int, *, num_kept: int, num_calls: int) -> int:
    """As many calls as the missing prompts need at the rate of the calls so far.

    The first round is small. It finds the rate, and its tasks are the generated shots of the next one.
    """
    missing = num_prompts - num_kept
    if not num_calls:
        return min(missing, max(_MIN_FIRST_ROUND, num_prompts // 8))
    return min(2 * missing, -(-missing * num_calls // num_kept)) if num_kept else missing


def round_requests(
    ctx: Context, number: int, num_calls: int, *, seed_texts: Sequence[str], kept: Sequence[str]
) -> list[tuple[GenerationRequest, int]]:
    """The requests of one round, each with the number of the task that it asks for.

    They depend only on what earlier rounds kept, so a resumed run makes the same ones.
    """
    cfg, seed = ctx.cfg.prompts, ctx.cfg.seed
    rng = random.Random(f"{seed}:{ctx.iteration}:{number}")
    requests = []
    for i in range(num_calls):
        num_generated = min(cfg.num_generated_shots, len(kept))
        num_seed = min(cfg.num_seed_shots + cfg.num_generated_shots - num_generated, len(seed_texts))
        shots = rng.sample(seed_texts, num_seed) + rng.sample(kept, num_generated)
        rng.shuffle(shots)
        key = f"iter{ctx.iteration}-round{number:02d}-{i:05d}"
        text = few_shot_text(shots)
        ids = ctx.chat.encode_plain(text)
        requests.append((GenerationRequest(key=key, prompt_token_ids=ids, n=1, seed=seed, text=text), len(shots) + 1))
    return requests


def run(ctx: Context) -> Made[Prompt]:
    cfg = ctx.cfg.prompts
    seed_texts = [x.instruction for x in ctx.read("ift", IFTExample)]
    earlier = [p.text for p in ctx.read_all("earlier", Prompt)]
    held_out = [x.instruction for x in ctx.read("eft_eval", EFTExample)]
    keep = PromptFilter(cfg, seed=seed_texts + earlier, held_out=held_out)
    kept: list[str] = []
    dropped: Counter[Reason] = Counter()
    num_calls = 0
    with open_caller(ctx) as caller:
        for number in range(cfg.max_rounds):
            size = num_calls_of_round(cfg.num_prompts, num_kept=len(kept), num_calls=num_calls)
            asked = round_requests(ctx, number, size, seed_texts=seed_texts, kept=kept)
            found = caller.complete([r for r, _ in asked], "prompts", title=f"prompts, round {number + 1}")
            num_calls += len(asked)
            for text in (t for r, first in asked for t in tasks_in(found[r.key][0], first_number=first)):
                if (reason := keep.reason_to_drop(text)) is None:
                    kept.append(text)
                else:
                    dropped[reason] += 1
            if len(kept) >= cfg.num_prompts:
                break
    if len(kept) < cfg.num_prompts:
        raise DataError(
            f"prompts.num_prompts={cfg.num_prompts}: only {len(kept)} new instructions passed the filters in "
            f"prompts.max_rounds={cfg.max_rounds} rounds. Dropped: {dict(dropped)}. Raise prompts.max_rounds, lower "
            "prompts.num_prompts, or loosen the filter that dropped most (prompts.max_rouge_l, prompts.min_words, "
            f"prompts.blocked_words). {_first_delete(ctx.output.path)}"
        )
    prompts = [Prompt(prompt_id=f"iter{ctx.iteration}-{i:06d}", text=t) for i, t in enumerate(kept[: cfg.num_prompts])]
    texts = [p.text for p in prompts]
    varied = {"distinct_2": distinct_n(texts, 2), "novelty": novelty(texts, seed_texts + earlier)}
    counts = {"num_calls": num_calls, "num_kept": len(prompts), **{f"num_{r}": n for r, n in dropped.items()}}
    known = {name: value for name, value in varied.items() if value is not None}
    return Made(prompts, {**counts, **known, **caller.figures()})


def _first_delete(stage_dir: Path) -> str:
    old = lineage.with_settings(stage_dir.parent.parent, ["prompts.max_rounds"]) or [stage_dir]
    return f"Before that, delete what was made with the old settings: {lineage.removal(old)}. All other stages stay."


def work(cfg: Config, a: Assumptions) -> Generated | None:
    if cfg.prompts.path:
        return None
    num_tokens = cfg.prompts.num_prompts / a.prompts_kept * a.mean_prompt_tokens
    shots = (cfg.prompts.num_seed_shots + cfg.prompts.num_generated_shots) * a.mean_prompt_tokens
    return Generated(num_tokens=num_tokens, num_prompt_tokens=num_tokens / cfg.prompts.max_tokens * shots)


def summary(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    counts = {k.removeprefix("num_"): v for k, v in metrics.items() if k.startswith("num_")}
    dropped = {k: v for k, v in counts.items() if k not in ("calls", "kept")}
    reasons = ", ".join(f"{v:.0f} {k.replace('_', ' ')}" for k, v in sorted(dropped.items(), key=lambda x: -x[1]))
    lines = [("instructions generated and dropped", reasons or "none")]
    if "novelty" in metrics:
        varied = f"{metrics['novelty']:.2f} (1: nothing in common), distinct-2 {metrics['distinct_2']:.2f}"
        lines.append(("their novelty against the seed and earlier ones", varied))
    return [*lines, ("prompts", f"{metrics['num_kept']:.0f}")]


STAGE = table_stage(
    "prompts",
    Prompt,
    run,
    version=3,  # which lines are tasks, the size of rounds, and what is a word in other scripts
    needs={"policy": MODEL, "ift": IFTExample, "eft_eval": EFTExample, "earlier": Need(Prompt, many="earlier")},
    settings=(*settings_of("prompts"), "model.thinking_tags", "seed"),
    engines=("prompts",),
    work=work,
    summary=summary,
)
