"""Generation and judging on the CPU: the embedded engine against one full HF `generate` pass per sample and verdict.

    python benchmarks/generation.py                    # SmolLM2-135M, 16 prompts x 4 samples, 64 x 3 verdicts
    python benchmarks/generation.py --small            # a quick look
    python benchmarks/generation.py --threads 1        # on a machine that is busy: then read the CPU column

Three tables. The first: the same model, prompts and token counts (end-of-sequence tokens are ignored) through
`transformers` in static batches, with every prompt prefilled once per sample, and through the embedded engine.
The second: the same with samples that end where the model ends them; a static batch then waits for its
longest, and only tokens up to the end count. The third: the engine of the second table without one of its
techniques at a time. Sampling is T 0.7, top-p 0.9 everywhere.

Tokens per second are given by wall time and by CPU time, which also holds on a machine with other load (and where
it is one thread's). Not covered: time to load, memory, accelerators.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import yaml
from tqdm import tqdm
from transformers import AutoModelForCausalLM

from nemo_srl import judge
from nemo_srl.chat import ChatTemplate
from nemo_srl.engines.embedded import EmbeddedEngine, batching, engine, llama, sampling
from nemo_srl.models import resolve
from nemo_srl.protocols import GenerationRequest, SamplingParams

SMOLLM2 = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Workload:
    """`n` samples for each of `prompts` (token ids), of `max_tokens` tokens at most."""

    name: str
    prompts: Sequence[tuple[int, ...]]
    n: int
    max_tokens: int

    def requests(self) -> list[GenerationRequest]:
        return [
            GenerationRequest(key=f"{self.name}-{i:04d}", prompt_token_ids=prompt, n=self.n, seed=1)
            for i, prompt in enumerate(self.prompts)
        ]


@dataclass(frozen=True)
class Measurement:
    """One engine on one workload."""

    engine: str
    workload: str
    num_tokens: int
    seconds: float
    cpu_seconds: float


def make_workloads(model_dir: Path, *, num_prompts: int, small: bool) -> list[Workload]:
    """Instructions of the seed, and verdicts on four responses to each, by the short rubric."""
    root = Path(__file__).parent.parent
    rubric = yaml.safe_load((root / "conf/judge/additive_5pt_short.yaml").read_text())["rubric"]
    rows = [json.loads(line) for line in (root / "data/seed/ift.jsonl").read_text().splitlines()]
    chat = ChatTemplate(model_dir)
    picked = rows[:num_prompts]
    responses = [row["response"] for row in rows]
    judged = [
        chat.encode(
            chat.render(judge.render(rubric, instruction=row["instruction"], response=responses[(i + j) % len(rows)]))
        )
        for i, row in enumerate(picked)
        for j in range(4)
    ]
    generated = [chat.encode(chat.render(row["instruction"])) for row in picked]
    return [
        Workload("generate", generated, n=4, max_tokens=16 if small else 64),
        Workload("judge", judged, n=3, max_tokens=8 if small else 24),
    ]


def measure(name: str, workload: Workload, run: Callable[[], int]) -> Measurement:
    wall, cpu = time.perf_counter(), time.process_time()
    num_tokens = run()
    return Measurement(name, workload.name, num_tokens, time.perf_counter() - wall, time.process_time() - cpu)


@torch.inference_mode()
def run_transformers(model: Any, workload: Workload, *, batch_size: int, end_tokens: Sequence[int]) -> int:
    """Number of useful tokens; sequences are left-padded into batches in the order in which they come."""
    sequences = [prompt for prompt in workload.prompts for _ in range(workload.n)]
    num_tokens = 0
    for first in tqdm(range(0, len(sequences), batch_size), desc="transformers", leave=False, disable=None):
        rows = sequences[first : first + batch_size]
        longest = max(map(len, rows))
        out = model.generate(
            torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows]),
            attention_mask=torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows]),
            max_new_tokens=workload.max_tokens,
            do_sample=True,
            temperature=0.7,
            top_p=0.9,
            top_k=0,
            eos_token_id=list(end_tokens) or None,
            pad_token_id=0,
        )[:, longest:].tolist()
        for row in out:
            ends = [i for i, token in enumerate(row) if token in end_tokens]
            num_tokens += ends[0] + 1 if ends else len(row)
    return num_tokens


def run_embedded(embedded: EmbeddedEngine, workload: Workload) -> int:
    params = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=workload.max_tokens)
    batches = tqdm(embedded.generate(workload.requests(), params), desc="embedded", leave=False, disable=None)
    return sum(completion.num_tokens for batch in batches for completion in batch)


def without_end_tokens(model_dir: Path, directory: Path) -> Path:
    """The same model with a configuration whose end-of-sequence token does not exist."""
    for path in model_dir.resolve().iterdir():
        if path.name != "generation_config.json":
            (directory / path.name).symlink_to(path)
    config = json.loads((model_dir / "config.json").read_text())
    config["eos_token_id"] = config["vocab_size"]
    (directory / "config.json").unlink()
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@contextlib.contextmanager
def no_prefix_sharing() -> Iterator[None]:
    """Every sample prefills the whole of its prompt."""

    def separate(prompts: Sequence[tuple[int, ...]]) -> Any:
        segments = [batching.Segment(prompt, 0, None) for prompt in prompts]
        return segments, dict(zip(prompts, segments, strict=True))

    with mock.patch.object(engine, "prefix_tree", separate):
        yield


@contextlib.contextmanager
def no_compaction() -> Iterator[None]:
    """A sequence that ended is decoded until the longest of its batch has ended."""
    step = engine._Batch.step

    def wait(batch: Any, end_tokens: frozenset[int]) -> Any:
        finished = step(batch, frozenset())
        rows = list(zip(batch.slots, batch.tokens, batch.logprobs, strict=True)) or finished
        if not finished and any(end_tokens.isdisjoint(tokens) for _, tokens, _ in rows):
            return []
        batch.slots = []
        ends = [next((i for i, t in enumerate(tokens) if t in end_tokens), len(tokens)) for _, tokens, _ in rows]
        return [(slot, tokens[: end + 1], kept) for (slot, tokens, kept), end in zip(rows, ends, strict=True)]

    with mock.patch.object(engine._Batch, "step", wait):
        yield


@contextlib.contextmanager
def no_packed_weights() -> Iterator[None]:
    with mock.patch.object(llama, "make_linear", lambda weight: lambda x: F.linear(x, weight)):
        yield


@contextlib.contextmanager
def no_top_k_first() -> Iterator[None]:
    """Top-p by sorting the vocabulary."""
    with mock.patch.object(sampling, "_NUM_CANDIDATES", ()):
        yield


def compare(
    workloads: Sequence[Workload], model_dir: Path, *, batch_size: int, end_tokens: Sequence[int]
) -> list[Measurement]:
    """Each way of doing it on each workload, one after the other."""
    found = []
    for dtype in ("float32", "bfloat16"):
        model = AutoModelForCausalLM.from_pretrained(model_dir, torch_dtype=getattr(torch, dtype)).eval()
        for w in workloads:
            run = lambda w=w, m=model: run_transformers(m, w, batch_size=batch_size, end_tokens=end_tokens)  # noqa: E731
            found.append(measure(f"HF generate, {dtype}", w, run))
    for dtype in ("float32", "bfloat16"):
        embedded = EmbeddedEngine(model_dir, dtype=dtype, max_batch_size=batch_size)
        found += [measure(f"embedded, {dtype}", w, lambda w=w, e=embedded: run_embedded(e, w)) for w in workloads]
    return found


def leave_one_out(workloads: Sequence[Workload], model_dir: Path, *, batch_size: int) -> list[Measurement]:
    variants: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
        "everything": contextlib.nullcontext,
        "without bfloat16": contextlib.nullcontext,
        "without prefix sharing": no_prefix_sharing,
        "without leaving the batch at the end": no_compaction,
        "without packed weights": no_packed_weights,
        "without topk before top-p": no_top_k_first,
    }
    found = []
    for name, patched in variants.items():
        with patched():
            dtype = "float32" if "bfloat16" in name else "bfloat16"
            embedded = EmbeddedEngine(model_dir, dtype=dtype, max_batch_size=batch_size)
            found += [measure(name, w, lambda w=w, e=embedded: run_embedded(e, w)) for w in workloads]
    return found


def table(title: str, measurements: Sequence[Measurement]) -> str:
    """Markdown; the ratio is by CPU time over all workloads, against the first row."""
    names = list(dict.fromkeys(m.engine for m in measurements))
    workloads = list(dict.fromkeys(m.workload for m in measurements))
    lines = [
        f"**{title}**: tokens/s by wall time (by CPU time)",
        "",
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=SMOLLM2, help="a Hugging Face Llama directory, or a name that is fetched")
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/nemo_srl").expanduser())
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/generation.json"))
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    model_dir = resolve(args.model, args.cache_dir)
    workloads = make_workloads(model_dir, num_prompts=2 if args.small else args.num_prompts, small=args.small)
    with tempfile.TemporaryDirectory() as scratch:
        endless = without_end_tokens(model_dir, Path(scratch))
        fixed = compare(workloads, endless, batch_size=args.batch_size, end_tokens=())
    end_tokens = llama.hf.read_spec(model_dir).eos_token_ids
    ended = compare(workloads, model_dir, batch_size=args.batch_size, end_tokens=end_tokens)
    ablation = leave_one_out(workloads, model_dir, batch_size=args.batch_size)

    for w in workloads:
        lengths = sorted(map(len, w.prompts))
        print(f"{w.name}: {len(lengths)} prompts of {lengths[0]}..{lengths[-1]} tokens x {w.n}, at most {w.max_tokens}")
    print(f"{args.threads} thread(s), torch {torch.__version__}, batches of {args.batch_size}\n")
    tables = {"equal token counts": fixed, "ends as they come": ended, "one technique less": ablation}
    for title, measurements in tables.items():
        print(table(title, measurements))
    args.output.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "machine": platform.machine(),
        "threads": args.threads,
        "torch": torch.__version__,
        "small": args.small,
        "batch_size": args.batch_size,
        "measurements": {title: [asdict(m) for m in rows] for title, rows in tables.items()},
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
