"""What the benchmark generates and judges, how it measures time, and the tables that it prints."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import yaml

from nemo_srl.chat import ChatTemplate
from nemo_srl.judging.rubrics import render
from nemo_srl.protocols import GenerationRequest


@dataclass(frozen=True)
class Workload:
    """`n` samples for each of `prompts` (token ids). A sample has at most `max_tokens` tokens."""

    name: str
    prompts: Sequence[tuple[int, ...]]
    n: int
    max_tokens: int

    def requests(self) -> list[GenerationRequest]:
        return [
            GenerationRequest(key=f"{self.name}-{i:04d}", prompt_token_ids=prompt, n=self.n, seed=1)
            for i, prompt in enumerate(self.prompts)
        ]

    def __str__(self) -> str:
        lengths = sorted(map(len, self.prompts))
        return (
            f"{self.name}: {len(lengths)} prompts of {lengths[0]}..{lengths[-1]} tokens x {self.n} samples, "
            f"at most {self.max_tokens} tokens each"
        )


@dataclass(frozen=True)
class Measurement:
    """One engine on one workload."""

    engine: str
    workload: str
    num_tokens: int
    seconds: float
    cpu_seconds: float


def make_workloads(
    model_dir: Path, *, num_prompts: int, small: bool, answer_tokens: int = 64, verdict_tokens: int = 24
) -> list[Workload]:
    """Instructions of the seed data, and verdicts on four responses to each, with the short rubric."""
    root = Path(__file__).parent.parent
    rubric = yaml.safe_load((root / "conf/judge/additive_5pt_short.yaml").read_text())["rubric"]
    rows = [json.loads(line) for line in (root / "data/seed/ift.jsonl").read_text().splitlines()]
    chat = ChatTemplate(model_dir)
    picked = rows[:num_prompts]
    responses = [row["response"] for row in rows]
    judged = [
        chat.encode(
            chat.render(render(rubric, instruction=row["instruction"], response=responses[(i + j) % len(rows)]))
        )
        for i, row in enumerate(picked)
        for j in range(4)
    ]
    generated = [chat.encode(chat.render(row["instruction"])) for row in picked]
    return [
        Workload("generate", generated, n=4, max_tokens=16 if small else answer_tokens),
        Workload("judge", judged, n=3, max_tokens=8 if small else verdict_tokens),
    ]


def without_end_tokens(model_dir: Path, directory: Path) -> Path:
    """The same model, configured with an end-of-sequence token that does not exist."""
    directory.mkdir()
    for path in model_dir.resolve().iterdir():
        if path.name not in ("generation_config.json", "config.json"):
            (directory / path.name).symlink_to(path)
    config = json.loads((model_dir / "config.json").read_text())
    config["eos_token_id"] = config["vocab_size"]
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def measure(engine: str, workload: str, run: Callable[[], int]) -> Measurement:
    """Measure the time of `run`, which returns the number of useful tokens that it made."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    num_tokens = run()
    return Measurement(engine, workload, num_tokens, time.perf_counter() - wall, cpu_seconds() - cpu)


def cpu_seconds() -> float:
    """CPU time of this process and of all processes that it has started, such as a server's."""
    import psutil  # imported here, because the benchmarks for GPUs use this module and do not need it

    found = 0.0
    for process in [psutil.Process(os.getpid()), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        found += times.user + times.system
    return found


def medians(measurements: Sequence[Measurement]) -> list[Measurement]:
    """One measurement for each engine and workload, with the medians of its rounds."""
    rounds: dict[tuple[str, str], list[Measurement]] = {}
    for m in measurements:
        rounds.setdefault((m.engine, m.workload), []).append(m)
    return [
        Measurement(
            *key, round(median(m.num_tokens for m in ms)), median(m.seconds for m in ms),
            median(m.cpu_seconds for m in ms),
        )
        for key, ms in rounds.items()
    ]  # fmt: skip


def rates(measurements: Sequence[Measurement], engine: str) -> tuple[float, float]:
    """Tokens/s of an engine over all workloads, by wall time and by CPU time."""
    rows = [m for m in measurements if m.engine == engine]
    tokens = sum(m.num_tokens for m in rows)
    return tokens / sum(m.seconds for m in rows), tokens / sum(m.cpu_seconds for m in rows)


def against_the_fastest_other(measurements: Sequence[Measurement]) -> str:
    """How the fastest embedded engine compares with the fastest of the others. Empty if only one kind was measured."""
    names = dict.fromkeys(m.engine for m in measurements)
    ours, others = [n for n in names if n.startswith("embedded")], [n for n in names if not n.startswith("embedded")]
    if not ours or not others:
        return ""
    lines = []
    for i, clock in enumerate(("wall", "CPU")):
        best, other = (max(group, key=lambda n: rates(measurements, n)[i]) for group in (ours, others))
        ratio = rates(measurements, best)[i] / rates(measurements, other)[i]
        lines.append(f"{best} has {ratio:.2f} times the tokens/s of {other} by {clock} time")
    return "Against the fastest other engine: " + ", and ".join(lines) + ".\n"


def table(measurements: Sequence[Measurement]) -> str:
    """A Markdown table: tokens/s by wall time and, in parentheses, by CPU time. Ratios compare all workloads together
    with the first row."""
    names = list(dict.fromkeys(m.engine for m in measurements))
    workloads = list(dict.fromkeys(m.workload for m in measurements))
    lines = [
        f"| engine | {' | '.join(workloads)} | all | ratio, wall | ratio, CPU |",
        "|---" * (len(workloads) + 4) + "|",
    ]
    base = rates(measurements, names[0])
    for name in names:
        cells = [f"{m.num_tokens / m.seconds:.0f} ({m.num_tokens / m.cpu_seconds:.0f})"
                 for m in measurements if m.engine == name]  # fmt: skip
        wall, cpu = rates(measurements, name)
        ratios = f"{wall / base[0]:.2f} | {cpu / base[1]:.2f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {wall:.0f} ({cpu:.0f}) | {ratios} |")
    return "\n".join(lines) + "\n"
