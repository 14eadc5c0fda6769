"""The time of one iteration's answering and judging, with the starts of the engines counted.

The sizes are those of srl-smollm2-135m-cpu: 24 prompts x 4 answers of at most 96 tokens, and 3 verdicts of at most 48
tokens on each answer. The stages ask one model after the other:

    embedded    each stage opens the model in its own process, so it is loaded twice
    vLLM        one start of the server for both stages, since a launcher keeps it for the next stage

The model is M0, which cannot judge yet. Its verdicts are as long as allowed, and those of later models are shorter. Not
counted: Python's imports of a stage, which are the same for both, and the stages `prompts`, `anchor` and `evaluation`.

Each round has the same model in another directory, as M_t and M_{t+1} are. vLLM's first start on a machine compiles the
model. Later ones find that in its cache. So the first start has a row of its own.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

from generation_candidates import Candidate, Run, Setting
from generation_workloads import Measurement, Workload, cpu_seconds, make_workloads, measure, medians

NUM_PROMPTS, ANSWER_TOKENS, VERDICT_TOKENS = 24, 96, 48
START = "starts"


def iteration(candidates: Iterable[Candidate], setting: Setting, *, num_prompts: int, rounds: int) -> list[Measurement]:
    """Measure `rounds` iterations of each engine, in turn. A first start of its server has no part in them."""
    workloads = make_workloads(
        setting.model_dir, num_prompts=num_prompts, small=False, answer_tokens=ANSWER_TOKENS,
        verdict_tokens=VERDICT_TOKENS,
    )  # fmt: skip
    setting = replace(setting, max_length=max(len(p) + w.max_tokens for w in workloads for p in w.prompts))
    usable = [c for c in candidates if c.served or c.name.startswith("embedded")]
    found = []
    for c in (c for c in usable if c.served):
        with ExitStack() as stack:
            found.append(replace(start(c, setting, stack)[0], engine=f"{c.name}, first start"))
    for i in range(rounds):
        model = another_directory(setting.model_dir, setting.scratch / f"model-{i}")
        for c in usable:
            found += one(c, replace(setting, model_dir=model), workloads)
            print(f"round {i + 1} of {rounds}:", *found[-3:], sep="\n", flush=True)
    return found


def one(candidate: Candidate, setting: Setting, workloads: Sequence[Workload]) -> list[Measurement]:
    """The starts together, and each workload."""
    starts, calls = [], []
    for stages in [workloads] if candidate.served else [[w] for w in workloads]:
        with ExitStack() as stack:
            started, run = start(candidate, setting, stack)
            starts.append(started)
            calls += [measure(candidate.name, w.name, partial(run, w)) for w in stages]
    seconds, cpu = sum(m.seconds for m in starts), sum(m.cpu_seconds for m in starts)
    return [Measurement(candidate.name, START, 0, seconds, cpu), *calls]


def start(candidate: Candidate, setting: Setting, stack: ExitStack) -> tuple[Measurement, Run]:
    wall, cpu = time.perf_counter(), cpu_seconds()
    run = stack.enter_context(candidate.open(setting))
    return Measurement(candidate.name, START, 0, time.perf_counter() - wall, cpu_seconds() - cpu), run


def another_directory(model_dir: Path, directory: Path) -> Path:
    directory.mkdir()
    for path in model_dir.resolve().iterdir():
        (directory / path.name).symlink_to(path)
    return directory


def iteration_table(measurements: Sequence[Measurement]) -> str:
    """A Markdown table of seconds by wall time and, in parentheses, by CPU time: medians of the rounds."""
    rows = medians(measurements)
    names = list(dict.fromkeys(m.engine for m in rows))
    workloads = list(dict.fromkeys(m.workload for m in rows))
    lines = [f"| engine | {' | '.join(workloads)} | iteration |", "|---" * (len(workloads) + 2) + "|"]
    for name in names:
        own = {m.workload: m for m in rows if m.engine == name}
        cells = [f"{own[w].seconds:.1f} ({own[w].cpu_seconds:.1f})" if w in own else "" for w in workloads]
        wall, cpu = sum(m.seconds for m in own.values()), sum(m.cpu_seconds for m in own.values())
        whole = f"{wall:.1f} ({cpu:.1f})" if len(own) == len(workloads) else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {whole} |")
    return "\n".join(lines) + "\n"
