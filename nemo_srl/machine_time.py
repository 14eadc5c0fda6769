"""How long a run takes on the CPU of this machine: its work, divided by what a short probe of matrix products finds.

It is an estimate: other programs slow a run down, and nobody knows before how long answers get. `estimates` plans
runs on GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from pathlib import Path
from statistics import fmean
from typing import TypeVar

from nemo_srl.chat import ChatTemplate
from nemo_srl.config import Config
from nemo_srl.estimates import num_passes, times_of
from nemo_srl.judging import reader
from nemo_srl.models import hf
from nemo_srl.models.arithmetic import flops_per_token, num_parameters
from nemo_srl.models.spec import ModelSpec
from nemo_srl.records import EFTExample, IFTExample
from nemo_srl.stages import LOOP, stage_named
from nemo_srl.workload import Assumptions, Generated, Trained

_SAMPLE = 100

T = TypeVar("T")

PRODUCTS_SHARE = 0.73
"""The time of a training's matrix products, measured in those of the probe."""
OTHERS_GFLOPS = {"float32": 311.0, "bfloat16": 329.0}
"""The rate that a training would have if its products took no time. All else moves memory.

These and the shares below were fitted to the stages of three runs of the default recipe on one machine: two in
bfloat16, where the probe gives 385 and 398 GFLOP/s, and one in float32, where it gives 201. The time announced is
within 7% of each. The share of products is older. It comes from trainings on two machines, one of them twice as
fast."""
READING_SHARE, WRITING_SHARE = 1.4, 0.32
"""Of the probe's rate, for prompts and for generated tokens. What judge prompts begin with is read once, so they are
read faster than their tokens say. Each decoding step reads all weights for few tokens."""
START_SECONDS = {"trained": 25.0, "generated": 4.0}
"""A process that imports its libraries and loads a model. A training also converts it twice."""


def announcement(
    cfg: Config, model_dir: Path, ift: Sequence[IFTExample], eft: Sequence[EFTExample]
) -> str:  # fmt: skip
    """One line for a person who starts a run. Empty if the run does not compute on the CPU of this machine."""
    if (cfg.engine.name, cfg.launcher.name, cfg.trainer.name) != ("embedded", "local", "nemo_aligner"):
        return ""
    import torch  # imported here, because it takes seconds and a launcher does not need it

    from nemo_srl.trainers.nemo_aligner.platforms import products

    if torch.cuda.is_available():
        return ""
    spec = hf.read_spec(model_dir)
    chat = ChatTemplate(model_dir, chat_template=cfg.model.chat_template, variables=cfg.model.chat_template_kwargs)
    all_lessons = [reader(cfg.judge).lesson(x, cfg.judge) for x in eft]
    lessons = _sample(all_lessons)
    a = assumptions(cfg, chat, ift, eft, [prompt for prompt, _ in lessons])
    rows = row_tokens(chat, [(x.instruction, x.response) for x in _sample(ift)], lessons, len(eft) / a.num_sft_rows)
    rows = replace(rows, alike_judging=tokens_alike(chat, [prompt for prompt, _ in all_lessons]))
    formats = {"trained": "float32" if cfg.trainer.precision == "32" else "bfloat16", "generated": cfg.engine.dtype}
    gflops = {
        name: max(products.gflops(spec.hidden_size, spec.ffn_hidden_size, getattr(torch, name)).values())
        for name in sorted(set(formats.values()))
    }
    trained, generated = formats["trained"], formats["generated"]
    rates = {"trained": training_gflops(trained, gflops[trained]), "generated": gflops[generated]}
    minutes = seconds(cfg, spec, a, rates=rates, rows=rows) / 60
    speed = " and ".join(f"{value:.0f} GFLOP/s in {name}" for name, value in gflops.items())
    return (
        f"This machine multiplies {speed}, so a whole run takes about {minutes:.0f} minutes. "
        "Less work: num_iterations=1, candidates.num_samples=2 or evaluation.num_prompts=20"
    )


def training_gflops(dtype: str, of_products: float) -> float:
    """The rate of a whole training, by that of the probe's matrix products."""
    return 1 / (PRODUCTS_SHARE / of_products + 1 / OTHERS_GFLOPS[dtype])


def assumptions(
    cfg: Config, chat: ChatTemplate, ift: Sequence[IFTExample], eft: Sequence[EFTExample], judge_prompts: Sequence[str]
) -> Assumptions:
    """Mean lengths in the seed data. `judge_prompts` show the judge an answer, before the chat template."""
    wrapper, sample = chat.num_tokens(chat.render("")), _sample(ift)
    prompt = wrapper + fmean(chat.num_tokens(x.instruction) for x in sample)
    answer = fmean(chat.num_tokens(x.response) for x in sample)
    judged = fmean(chat.num_tokens(text) for text in judge_prompts) if judge_prompts else 0.0
    reasons = fmean(chat.num_tokens(x.justification) for x in _sample(eft)) if eft else float(cfg.judge.max_tokens)
    return Assumptions(
        num_sft_rows=len(ift) + len(eft),
        mean_prompt_tokens=prompt,
        mean_response_tokens=answer,
        mean_rubric_tokens=max(0.0, judged - prompt - answer + wrapper),
        mean_verdict_tokens=reasons + 5,  # the line with the score, and the end
    )


@dataclass(frozen=True, kw_only=True)
class RowTokens:
    """Mean tokens of rows for training, by what they teach."""

    share_of_judging: float
    """The share of rows of SFT that teach judging."""
    sft: float
    """Of a row of SFT."""
    begun_answering: float
    begun_judging: float
    """With which all rows of the kind begin. A micro-batch has them once (`shared_beginnings.py`)."""
    alike_judging: float = 0.0
    """What a row of judging has in common with the row before it in its group (`rows_together`), beyond that."""

    def begun(self, share_of_judging: float) -> float:
        return self.begun_answering * (1 - share_of_judging) + self.begun_judging * share_of_judging


def row_tokens(
    chat: ChatTemplate, answers: Sequence[tuple[str, str]], lessons: Sequence[tuple[str, str]], share_of_judging: float
) -> RowTokens:
    """`answers` and `lessons`: prompt, before the chat template, and response, of rows that teach either."""
    shares = (1 - share_of_judging, share_of_judging)
    prompts = [[chat.render(prompt) for prompt, _ in rows] for rows in (answers, lessons)]
    responses = [[response for _, response in rows] for rows in (answers, lessons)]
    sft = sum(
        share * fmean(chat.num_tokens(text) for text in texts) if texts else 0.0
        for kind in (prompts, responses)
        for share, texts in zip(shares, kind, strict=True)
    )
    begun = [float(chat.num_tokens(_beginning(texts))) for texts in prompts]
    return RowTokens(
        share_of_judging=share_of_judging, sft=sft + 1,  # the end
        begun_answering=begun[0], begun_judging=begun[1],
    )  # fmt: skip


def tokens_alike(chat: ChatTemplate, prompts: Sequence[str]) -> float:
    """Mean tokens that one of these prompts shares with the one before it if they share half, beyond what all share."""
    if not prompts:
        return 0.0
    texts = sorted(prompts)
    common, shared = len(_beginning(texts)), 0
    for pair in pairwise(texts):
        length = len(_beginning(pair))
        shared += length - common if 2 * length >= min(map(len, pair)) else 0
    sample = _sample(texts)
    return shared / len(texts) * sum(map(chat.num_tokens, sample)) / sum(map(len, sample))


def _sample(examples: Sequence[T]) -> Sequence[T]:
    """Examples from all over the file."""
    return examples[:: max(1, len(examples) // _SAMPLE)]


def _beginning(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    first, last = min(texts, default=""), max(texts, default="")
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))


def seconds(cfg: Config, spec: ModelSpec, a: Assumptions, *, rates: Mapping[str, float], rows: RowTokens) -> float:
    """Seconds of the whole run. `rates`: GFLOP/s of a whole training (`trained`, see `training_gflops`), and of the
    probe in the engine's format (`generated`)."""
    total = 0.0
    for stage in map(stage_named, LOOP):
        work, times = stage.work(cfg, a), times_of(stage, cfg)
        if isinstance(work, Trained):
            length = work.row_tokens / work.num_sequences
            flops = flops_per_token(spec, sequence_length=length, forward_passes=num_passes(cfg, work, spec))
            needed = work.num_rows * _tokens_once(cfg, a, work, rows) * work.optim.max_epochs * flops
            total += times * (needed / (1e9 * rates["trained"]) + START_SECONDS["trained"])
        elif isinstance(work, Generated):
            flops = 2 * num_parameters(spec)
            reading, writing = work.num_prompt_tokens / READING_SHARE, work.num_tokens / WRITING_SHARE
            total += times * ((reading + writing) * flops / (1e9 * rates["generated"]) + START_SECONDS["generated"])
    return total


def _tokens_once(cfg: Config, a: Assumptions, work: Trained, rows: RowTokens) -> float:
    """Mean tokens of a row, where a micro-batch has common beginnings once."""
    others: float = 1 - 1 / cfg.trainer.rows_at_a_time(work.optim)
    alike = rows.alike_judging * (1 - 1 / work.optim.rows_together)
    if work.num_sequences == 1:
        return rows.sft - rows.begun(rows.share_of_judging) * others - rows.share_of_judging * alike
    of_judging = 1 - min(1.0, cfg.prompts.num_prompts * a.pairs_per_prompt / work.num_rows)
    return work.row_tokens - work.shared_tokens - rows.begun(of_judging) * others - of_judging * alike
