"""Speed of generation and judging on the CPU: HF `generate`, CTranslate2, llama.cpp, vLLM, and the embedded engine.

    python benchmarks/generation.py                    # SmolLM2-135M, 16 prompts x 4 samples, 64 x 3 verdicts
    python benchmarks/generation.py --small            # a quick look
    python benchmarks/generation.py --threads 1        # on a busy machine; read the CPU times there
    python benchmarks/generation.py --only llama.cpp   # only candidates whose names contain one of these texts
    python benchmarks/generation.py --rounds 3         # measure all in turn three times, and take medians
    python benchmarks/generation.py --run-dir runs/X   # repeat the judging of a finished run instead

It prints four tables:

1. The seconds of an iteration's calls, with starts, of the engines that the loop can use (generation_iteration.py).
2. Each candidate of generation_candidates.py, with the same model, prompts and numbers of tokens. End-of-sequence
   tokens are ignored. In `transformers`, every prompt is prefilled once per sample.
3. The same, but samples end where the model ends them. A static batch then waits for its longest sample, and only the
   tokens up to the end count.
4. The embedded engine as in the third table, without one of its techniques at a time.

All sample at temperature 0.7 and top-p 0.9. Tokens per second are given by wall time and by CPU time. CPU time is
meaningful also on a busy machine, with one thread. Beside the first table, the time to load and convert models is not
measured, nor is memory, nor are accelerators. The load of the machine before and after is written to the result.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from generation_candidates import CANDIDATES, Candidate, Setting
from generation_iteration import NUM_PROMPTS, START, iteration, iteration_table
from generation_replay import replay
from generation_techniques import leave_one_out
from generation_workloads import (
    Measurement,
    Workload,
    against_the_fastest_other,
    make_workloads,
    measure,
    medians,
    table,
    without_end_tokens,
)

from nemo_srl.models import resolve, smollm2
from nemo_srl.models.hf import read_spec


def compare(
    candidates: Iterable[Candidate], setting: Setting, workloads: Sequence[Workload], *, rounds: int
) -> list[Measurement]:
    """Open all candidates. Then measure each on each workload, one after the other, and all of them `rounds` times."""
    found = []
    with ExitStack() as stack:
        opened = {c.name: stack.enter_context(c.open(setting)) for c in candidates}
        for _ in range(rounds):
            for name, run in opened.items():
                found += [measure(name, w.name, partial(run, w)) for w in workloads]
                print(*found[-len(workloads) :], sep="\n", flush=True)
    return found


def available(setting: Setting, only: Sequence[str]) -> list[Candidate]:
    """The candidates with one of `only` in their names that can run here. Prints why the others cannot."""
    missing = {c: c.missing(setting) for c in CANDIDATES if not only or any(part in c.name for part in only)}
    for candidate, reason in missing.items():
        if reason:
            print(f"{candidate.name} is left out: {reason}")
    return [c for c, reason in missing.items() if not reason]


def measure_all(args: argparse.Namespace, model_dir: Path, scratch: Path) -> dict[str, list[Measurement]]:
    workloads = make_workloads(model_dir, num_prompts=2 if args.small else args.num_prompts, small=args.small)
    for w in workloads:
        print(w)
    ended = Setting(
        model_dir=model_dir,
        end_tokens=tuple(read_spec(model_dir).eos_token_ids),
        batch_size=args.batch_size,
        threads=args.threads,
        max_length=max(len(prompt) + w.max_tokens for w in workloads for prompt in w.prompts),
        scratch=scratch,
        gguf=scratch / "published.gguf" if args.model == smollm2.NAME else None,
    )
    if ended.gguf:
        smollm2.fetch_gguf(args.cache_dir, ended.gguf)
    endless = replace(ended, model_dir=without_end_tokens(model_dir, scratch / "endless"), end_tokens=())
    candidates = available(ended, args.only)
    found = {}
    if (
        args.iteration_prompts
    ):  # first, so that vLLM's first start is one on a machine where it has compiled nothing yet
        found["an iteration's calls"] = iteration(
            candidates, ended, num_prompts=args.iteration_prompts, rounds=args.rounds
        )
    found["equal token counts"] = compare(candidates, endless, workloads, rounds=args.rounds)
    found["ends as they come"] = compare(candidates, ended, workloads, rounds=args.rounds)
    if not args.only:
        found["one technique less"] = leave_one_out(workloads, model_dir, batch_size=args.batch_size)
    return found


def versions() -> dict[str, str]:
    installed = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    return {n: installed[n] for n in ("torch", "transformers", "ctranslate2", "xllamacpp") if n in installed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=smollm2.NAME, help="a Hugging Face Llama directory, or a name to fetch")
    parser.add_argument("--cache-dir", type=Path, default=Path("~/.cache/nemo_srl").expanduser())
    parser.add_argument("--num-prompts", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--rounds", type=int, default=1, help="measure all candidates so often, in turn")
    parser.add_argument(
        "--iteration-prompts", type=int, default=NUM_PROMPTS, help="of the third table. 0: leave it out"
    )
    parser.add_argument("--only", nargs="*", default=[], help="candidates whose names contain one of these texts")
    parser.add_argument("--run-dir", type=Path, help="repeat the judging of this finished run")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/generation.json"))
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    load = [os.getloadavg()]
    if args.run_dir:
        tables = {"replayed run": replay(args.run_dir, num_answers=4 * args.num_prompts, batch_size=args.batch_size)}
    else:
        with tempfile.TemporaryDirectory() as scratch:
            tables = measure_all(args, resolve(args.model, args.cache_dir), Path(scratch))
    load.append(os.getloadavg())
    print(f"{args.threads} thread(s), batches of {args.batch_size}, {versions()}, load before and after: {load}")
    for title, measurements in tables.items():
        print(f"\n**{title}**: {described(measurements)}")
    result = {
        "machine": platform.machine(),
        "threads": args.threads,
        "load": load,
        "rounds": args.rounds,
        "versions": versions(),
        "small": args.small,
        "batch_size": args.batch_size,
        "measurements": {title: [asdict(m) for m in rows] for title, rows in tables.items()},
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2) + "\n")


def described(measurements: Sequence[Measurement]) -> str:
    """The table of the medians, and what its numbers are."""
    if any(m.workload == START for m in measurements):
        return f"seconds by wall time (by CPU time)\n\n{iteration_table(measurements)}"
    rows = medians(measurements)
    return f"tokens/s by wall time (by CPU time)\n\n{table(rows)}\n{against_the_fastest_other(rows)}"


if __name__ == "__main__":
    main()
