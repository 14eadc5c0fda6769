"""What the benchmark generates and judges, how it measures time, and the tables that it prints."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

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


def make_workloads(model_dir: Path, *, num_prompts: int, small: bool) -> list[Workload]:
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
        Workload("generate", generated, n=4, max_tokens=16 if small else 64),
        Workload("judge", judged, n=3, max_tokens=8 if small else 24),
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
    wall, cpu = time.perf_counter(), time.process_time()
    num_tokens = run()
    return Measurement(engine, workload, num_tokens, time.perf_counter() - wall, time.process_time() - cpu)


def table(measurements: Sequence[Measurement]) -> str:
    """A Markdown table: tokens/s by wall time and, in parentheses, by CPU time. Ratios compare all workloads together
    with the first row."""
    names = list(dict.fromkeys(m.engine for m in measurements))
    workloads = list(dict.fromkeys(m.workload for m in measurements))
    lines = [
        f"| engine | {' | '.join(workloads)} | all | ratio, wall | ratio, CPU |",
        "|---" * (len(workloads) + 4) + "|",
    ]
    base: tuple[float, float] | None = None
    for name in names:
        rows = [m for m in measurements if m.engine == name]
        cells = [f"{m.num_tokens / m.seconds:.0f} ({m.num_tokens / m.cpu_seconds:.0f})" for m in rows]
        tokens = sum(m.num_tokens for m in rows)
        rates = tokens / sum(m.seconds for m in rows), tokens / sum(m.cpu_seconds for m in rows)
        base = base or rates
        ratios = f"{rates[0] / base[0]:.2f} | {rates[1] / base[1]:.2f}"
        lines.append(f"| {name} | {' | '.join(cells)} | {rates[0]:.0f} ({rates[1]:.0f}) | {ratios} |")
    return "\n".join(lines) + "\n"
