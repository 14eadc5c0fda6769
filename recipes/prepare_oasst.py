"""Seed data from Open Assistant's published trees, as in the paper (section 3.1.1).

    python recipes/prepare_oasst.py trees=2023-04-12_oasst_ready.trees.jsonl.gz output_dir=data/oasst
    python recipes/build_eft.py data.ift_path=data/oasst/ift.jsonl data.rankings_path=data/oasst/rankings.jsonl
    python recipes/iterate.py data.ift_path=data/oasst/ift.jsonl data.eft_path=runs/eft/eft.jsonl \\
        data.eft_eval_path=data/oasst/eft_eval.jsonl

This program needs no model: it writes `ift.jsonl`, `rankings.jsonl` (for `build_eft.py`, which adds verdicts),
`eft_eval.jsonl` (people's own order, for measuring the judge) and `manifest.json`, which counts every step.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from nemo_srl.artifacts import digest_of_file, to_line, write_atomic
from nemo_srl.cli import read_options
from nemo_srl.data import oasst
from nemo_srl.errors import DataError, NemoSrlError


@dataclass
class Options:
    trees: str = MISSING
    """OASST1's or OASST2's `*.trees.jsonl.gz`."""
    output_dir: str = MISSING
    language: str = "en"
    num_ift: int = 3200
    """Prompts with their favourite answer, by its quality."""
    num_eft: int = 1000
    """Prompts with several ranked answers for the EFT filter, which keeps a part of them."""
    num_eft_eval: int = 200
    """The same for measuring the judge: about 541 answers, as many as the paper has."""
    max_characters: int = 8000
    """Longer prompts and answers are left out."""
    seed: int = 1234


def prepare(options: Options) -> dict[str, int]:
    """Write the files; returns the counts."""
    source, counts = Path(options.trees), Counter[str]()
    trees = oasst.read_trees(source, counts, language=options.language, max_characters=options.max_characters)
    data = oasst.build(
        trees,
        counts,
        num_ift=options.num_ift,
        num_eft=options.num_eft,
        num_eft_eval=options.num_eft_eval,
        seed=options.seed,
    )
    if not data.ift or not data.rankings or not data.eft_eval:
        raise DataError(f"trees={options.trees}: too little in it to build all three files; counted: {data.counts}")
    output = Path(options.output_dir)
    tables: dict[str, Iterable[object]] = {"ift": data.ift, "rankings": data.rankings, "eft_eval": data.eft_eval}
    for name, records in tables.items():
        write_atomic(output / f"{name}.jsonl", "".join(map(to_line, records)))
    manifest = {
        "source": source.name,
        "source_digest": digest_of_file(source),
        "options": {k: v for k, v in vars(options).items() if k not in ("trees", "output_dir")},
        "counts": data.counts,
        "paper": oasst.PAPER_COUNTS,
    }
    write_atomic(output / "manifest.json", json.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return data.counts


def main(arguments: list[str]) -> None:
    try:
        counts = prepare(read_options(Options, arguments))
    except NemoSrlError as e:
        sys.exit(f"error: {e}")
    beside = {"ift examples": "ift", "answers in them": "eft_train", "eft_eval examples": "eft_eval"}
    for what, number in counts.items():
        paper = f"   (the paper: {oasst.PAPER_COUNTS[beside[what]]}" if what in beside else ""
        after = " after the filter)" if what == "answers in them" else ")"
        print(f"{number:8d}  {what}{paper + after if paper else ''}")


if __name__ == "__main__":
    main(sys.argv[1:])
