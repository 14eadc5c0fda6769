"""Seed data from Open Assistant's published trees, as in the paper (section 3.1.1).

    python recipes/prepare_oasst.py trees=2023-04-12_oasst_ready.trees.jsonl.gz output_dir=data/oasst
    python recipes/build_eft.py data.ift_path=data/oasst/ift.jsonl data.rankings_path=data/oasst/rankings.jsonl
    python recipes/iterate.py data.ift_path=data/oasst/ift.jsonl data.eft_path=runs/eft/eft.jsonl \\
        data.eft_eval_path=data/oasst/eft_eval.jsonl

This program needs no model. It writes `ift.jsonl`, `rankings.jsonl` (to which `build_eft.py` adds verdicts),
`eft_eval.jsonl` (answers in people's order, which measure the judge) and `manifest.json` with the numbers of each step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING

from nemo_srl import cli, jsonio
from nemo_srl.artifacts import digest_of_file, to_line, write_atomic
from nemo_srl.data import oasst
from nemo_srl.errors import DataError


@dataclass
class Options:
    trees: str = MISSING
    """The file `*.trees.jsonl.gz` of OASST1 or OASST2."""
    output_dir: str = MISSING
    language: str = "en"
    num_ift: int = 3200
    """Number of prompts with the answer that people like best. Those with the best quality label are taken."""
    num_eft: int = 1000
    """Number of prompts with several ranked answers for the EFT filter, which keeps some of them."""
    num_eft_eval: int = 200
    """Number of such prompts for measuring the judge. 200 of them have about 541 answers, as in the paper."""
    max_characters: int = 8000
    """Prompts and answers with more characters are left out."""
    seed: int = 1234


def prepare(options: Options) -> dict[str, int]:
    """Write the files, and return the numbers of each step. Raises `DataError` if one of the files would be empty."""
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
        raise DataError(
            f"trees={options.trees}: too few usable trees for all three files; counted: {data.counts}. Give the whole "
            "file of trees, or lower num_ift, num_eft or num_eft_eval."
        )
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
    write_atomic(output / "manifest.json", jsonio.dumps(manifest, indent=2, ensure_ascii=False) + "\n")
    return data.counts


def main(options: Options) -> None:
    beside = {"ift examples": "ift", "answers in them": "eft_train", "eft_eval examples": "eft_eval"}
    for what, number in prepare(options).items():
        paper = f"   (the paper: {oasst.PAPER_COUNTS[beside[what]]}" if what in beside else ""
        after = " after the filter)" if what == "answers in them" else ")"
        print(f"{number:8d}  {what}{paper + after if paper else ''}")


if __name__ == "__main__":
    cli.run_program(Options, main)
