"""Seed data whose true scores code knows: writes the files of `data/checked/` (its README says what they are).

    python recipes/build_checked_seed.py                       # the same input and seed give the same files
    python recipes/build_checked_seed.py output_dir=data/mine seed=2 num_eft=800

Input: `tasks.jsonl` and models' answers (`answers*.jsonl`) in `input_dir`, and the seed in `data/seed/`. This program
needs no model. The answers are those of `recipes/evaluate.py` to the instructions that this program wrote before. It
prints the numbers of examples by score, and how many pairs of answers their surface puts in the right order.

`large/` gets more training examples of the same tasks, in rounds that give them other constraints. Models' answers to
the instructions of the second round are in `large/answers_2.jsonl`, and so on.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nemo_srl import cli
from nemo_srl.artifacts import read_jsonl, to_line, write_atomic
from nemo_srl.data.checked import build as checked
from nemo_srl.data.checked import ifeval
from nemo_srl.data.checked.instructions import Task
from nemo_srl.data.checked.truth import MAX_SCORE
from nemo_srl.errors import DataError
from nemo_srl.judging.surface import cross_validated_accuracy, surface_accuracy
from nemo_srl.records import Candidate, EFTExample, IFTExample


@dataclass
class Options:
    input_dir: str = "data/checked"
    output_dir: str = "data/checked"
    seed_dir: str = "data/seed"
    """The seed whose tasks get constraints, too."""
    seed: int = 1
    num_eft: int = 1800
    """Number of judging examples, six for an instruction."""
    num_ift: int = 120
    """Number of answering examples."""
    num_rounds: int = 5
    """Rounds of the examples in `large/`. The first has the instructions of the other files. 0 leaves `large/` out."""
    num_ift_large: int = 400
    """Number of answering examples in `large/`."""


def read_tasks(options: Options) -> list[Task]:
    """The tasks of `input_dir`, and those of the other seed."""
    source, seed = Path(options.input_dir), Path(options.seed_dir)
    tasks = read_jsonl(source / "tasks.jsonl", Task)
    return tasks + checked.seed_tasks(
        read_jsonl(seed / "ift.jsonl", IFTExample), read_jsonl(seed / "eft.jsonl", EFTExample)
    )


def read_answers(directory: Path, pattern: str = "answers*.jsonl") -> list[Candidate]:
    """Models' answers in the files of a directory that have such a name. None if there is no such file."""
    return [a for path in sorted(directory.glob(pattern)) for a in read_jsonl(path, Candidate)]


def build(options: Options) -> checked.CheckedSeed:
    """Read the input, and make all tables. Raises `DataError` if it is too little for them."""
    source, tasks = Path(options.input_dir), read_tasks(options)
    answers = read_answers(source)
    made = checked.build(tasks, answers, seed=options.seed, num_ift=options.num_ift, num_eft=options.num_eft)
    for name, table in (("eft", made.eft), ("eft_eval", made.eft_eval)):
        if len(found := {x.instruction for x in table}) < 2:
            raise DataError(
                f"input_dir={source}: {len(tasks)} tasks and {len(answers)} answers gave judging examples for "
                f"{len(found)} instruction(s) in {name}, and it needs two or more. Give more answers to instructions "
                "that this program wrote, or set num_eft to 12 or more."
            )
    return made


def build_large(options: Options) -> checked.LargeSeed:
    """The same for `large/`."""
    source = Path(options.input_dir)
    answers = [read_answers(source)]
    answers += [read_answers(source / "large", f"answers_{r}.jsonl") for r in range(2, options.num_rounds + 1)]
    return checked.build_large(read_tasks(options), answers, seed=options.seed, num_ift=options.num_ift_large)


def tables_of(large: checked.LargeSeed) -> dict[str, Iterable[object]]:
    """By name. The instructions of the first round have a file already."""
    tables: dict[str, Iterable[object]] = {"large/ift": large.ift, "large/eft": large.eft}
    return tables | {f"large/instructions_{r}": xs for r, xs in enumerate(large.instructions[1:], start=2)}


def main(options: Options) -> None:
    made = build(options)
    tables: dict[str, Iterable[object]] = {"ift": made.ift, "eft": made.eft, "eft_eval": made.eft_eval}
    tables |= {f"instructions_{split}": xs for split, xs in made.instructions.items()}
    tables |= {f"prompts_{t}": prompts for t, prompts in enumerate(made.prompts, start=1)}
    tables["ifeval_held_out"] = list(ifeval.prompts(made.instructions["held_out"]))
    if options.num_rounds > 0:
        tables |= tables_of(build_large(options))
    for name, records in tables.items():
        write_atomic(Path(options.output_dir) / f"{name}.jsonl", "".join(map(to_line, records)))
        print(f"{len(list(records)):6d}  {name}")
    for name, examples in {"eft": made.eft, "eft_eval": made.eft_eval}.items():
        print(f"{name} by score: {dict(sorted(Counter(x.score for x in examples).items()))}")
    figures = {
        "eft_eval": surface_accuracy(made.eft, made.eft_eval, max_score=MAX_SCORE),
        "eft_eval, cross-validated": cross_validated_accuracy(made.eft_eval, max_score=MAX_SCORE),
        "eft, cross-validated": cross_validated_accuracy(made.eft, max_score=MAX_SCORE),
    }
    for name, f in figures.items():
        print(f"surface baseline on {name}: {f.value:.3f} [{f.low:.3f}, {f.high:.3f}] of {f.n} pairs")


if __name__ == "__main__":
    cli.run_program(Options, main)
