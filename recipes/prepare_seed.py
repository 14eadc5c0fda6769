"""IFT seed from `messages`, ShareGPT or Alpaca data: `prepare_seed.py input=data.jsonl output=data/mine/ift.jsonl`.

The input may be JSONL, a JSON array, Parquet or a directory of `datasets.save_to_disk`. nemo_srl/data/seeds.py says
which rows are used and which are left out. Give the output to the loop as `data.ift_path`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from nemo_srl import cli
from nemo_srl.artifacts import to_line, write_atomic
from nemo_srl.data.seeds import read_seed


@dataclass
class Options:
    input: str = MISSING
    output: str = MISSING
    num_examples: int = 0
    """Write only that many, from the beginning; 0: all."""


def main(options: Options) -> None:
    counts = Counter[str]()
    examples = read_seed(Path(options.input), counts)
    write_atomic(Path(options.output), "".join(map(to_line, examples[: options.num_examples or None])))
    for what, number in counts.items():
        print(f"{number:8d}  {what}")


if __name__ == "__main__":
    cli.run_program(Options, main)
