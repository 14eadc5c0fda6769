"""How long a run takes on the CPU of this machine: its work, divided by what a short probe of matrix products finds.

It is an estimate: other programs slow a run down, and nobody knows before how long answers get. `estimates` plans
runs on GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from statistics import fmean

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

TRAINING_SHARE = 0.6
"""Of the probe's rate: products are some 60% of a training step (benchmarks/results/training-2026-11-26.md)."""
READING_SHARE, WRITING_SHARE = 0.8, 0.3
"""Of the probe's rate, for prompts and for generated tokens. Each decoding step reads all weights for few tokens."""
START_SECONDS = {"trained": 25.0, "generated": 8.0}
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
    lessons = [reader(cfg.judge).lesson(x, cfg.judge)[0] for x in eft[:_SAMPLE]]
    a = assumptions(cfg, chat, ift, eft, lessons)
    shared = shared_tokens(chat, [x.instruction for x in ift], lessons, share_of_lessons=len(eft) / a.num_sft_rows)
    formats = {"trained": "float32" if cfg.trainer.precision == "32" else "bfloat16", "generated": cfg.engine.dtype}
    gflops = {
        name: max(products.gflops(spec.hidden_size, spec.ffn_hidden_size, getattr(torch, name)).values())
        for name in sorted(set(formats.values()))
    }
    rates = {work: gflops[name] for work, name in formats.items()}
    minutes = seconds(cfg, spec, a, rates=rates, shared=shared) / 60
    speed = " and ".join(f"{value:.0f} GFLOP/s in {name}" for name, value in gflops.items())
    return (
        f"This machine multiplies {speed}, so a whole run takes about {minutes:.0f} minutes. "
        "Less work: num_iterations=1, candidates.num_samples=2 or evaluation.num_prompts=20"
    )


def assumptions(
    cfg: Config, chat: ChatTemplate, ift: Sequence[IFTExample], eft: Sequence[EFTExample], judge_prompts: Sequence[str]
) -> Assumptions:
    """Mean lengths in the seed data. `judge_prompts` show the judge an answer, before the chat template."""
    wrapper, sample = chat.num_tokens(chat.render("")), ift[:_SAMPLE]
    prompt = wrapper + fmean(chat.num_tokens(x.instruction) for x in sample)
    answer = fmean(chat.num_tokens(x.response) for x in sample)
    judged = fmean(chat.num_tokens(text) for text in judge_prompts) if judge_prompts else 0.0
    reasons = fmean(chat.num_tokens(x.justification) for x in eft[:_SAMPLE]) if eft else float(cfg.judge.max_tokens)
    return Assumptions(
        num_sft_rows=len(ift) + len(eft),
        mean_prompt_tokens=prompt,
        mean_response_tokens=answer,
        mean_rubric_tokens=max(0.0, judged - prompt - answer + wrapper),
        mean_verdict_tokens=reasons + 5,  # the line with the score, and the end
    )


def shared_tokens(
    chat: ChatTemplate, instructions: Sequence[str], lessons: Sequence[str], *, share_of_lessons: float
) -> float:
    """The mean number of tokens with which an SFT row begins as all others of its kind do: instructions, or prompts of
    the judge. The trainer computes them once for the rows of a micro-batch (`shared_beginnings.py`)."""
    begun = [chat.num_tokens(_beginning([chat.render(x) for x in some])) for some in (instructions[:_SAMPLE], lessons)]
    return begun[0] * (1 - share_of_lessons) + begun[1] * share_of_lessons


def _beginning(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    first, last = min(texts, default=""), max(texts, default="")
    return "".join(a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))


def seconds(
    cfg: Config, spec: ModelSpec, a: Assumptions, *, rates: Mapping[str, float], shared: float = 0.0
) -> float:  # fmt: skip
    """Seconds of the whole run. `rates`: the probe's GFLOP/s, in the format of what is `trained` and of what is
    `generated`. `shared`: see `shared_tokens`."""
    total = 0.0
    for stage in map(stage_named, LOOP):
        work, times = stage.work(cfg, a), times_of(stage, cfg)
        if isinstance(work, Trained):
            length = work.row_tokens / work.num_sequences
            flops = flops_per_token(spec, sequence_length=length, forward_passes=num_passes(cfg, work))
            rows = cfg.trainer.rows_at_a_time(work.optim)
            once = shared * (1 - 1 / rows) if work.num_sequences == 1 else work.shared_tokens
            needed = work.num_rows * (work.row_tokens - once) * work.optim.max_epochs * flops
            total += times * (needed / (1e9 * rates["trained"]) / TRAINING_SHARE + START_SECONDS["trained"])
        elif isinstance(work, Generated):
            flops = 2 * num_parameters(spec)
            reading, writing = work.num_prompt_tokens / READING_SHARE, work.num_tokens / WRITING_SHARE
            total += times * ((reading + writing) * flops / (1e9 * rates["generated"]) + START_SECONDS["generated"])
    return total
