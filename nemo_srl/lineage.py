"""Which stages of a run directory were made with a setting, or from another stage: what to delete to change one.

A stage's `stage.json` has its identity, and the paths of its inputs. So a message can name the directories that a
change concerns. What is not named stays.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from nemo_srl import jsonio
from nemo_srl.errors import DataError

SPEC = "stage.json"
STEPS = "steps.json"

Identity = Mapping[str, Any]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a stage's directory. Raises `DataError` with the remedy for one that is damaged."""
    try:
        found = jsonio.loads(path.read_bytes())
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}, not an object")
        return found
    except ValueError as e:
        raise DataError(
            f"{path}: damaged ({e}). Delete {path.parent}. The next start makes this stage again, and other stages "
            "stay."
        ) from e


def forget_begun(directory: Path) -> None:
    """Remove the `stage.json` of a stage that has made nothing yet, so that it may begin anew with other settings."""
    if (directory / SPEC).exists() and not holds_work(directory):
        (directory / SPEC).unlink()


def holds_work(directory: Path) -> bool:
    """Whether a stage that was begun has made anything."""
    return any(
        path.is_dir() or path.stat().st_size > 0
        for path in directory.iterdir()
        if path.name not in (SPEC, STEPS) and not path.name.startswith(".lock") and path.suffix != ".tmp"
    )


def made_with(
    run_dir: Path, is_concerned: Callable[[Identity], bool], *, also: Collection[Path] = ()
) -> list[Path]:  # fmt: skip
    """The directories of the stages whose identity `is_concerned`, of those in `also`, and of all made from them.

    They are absolute and sorted. Stages that hold no work are left out.
    """
    specs = {path.parent: read_json(path) for path in sorted(run_dir.absolute().glob(f"iter_[0-9]*/*/{SPEC}"))}
    found = {d for d, spec in specs.items() if is_concerned(spec.get("identity", {}))}
    found |= {d for d in specs if d in {path.absolute() for path in also}}
    while more := {d for d, spec in specs.items() if d not in found and _inputs(spec) & set(map(_place, found))}:
        found |= more
    return [d for d in sorted(found) if holds_work(d)]


def with_settings(run_dir: Path, settings: Collection[str]) -> list[Path]:
    """`made_with` for stages that depend on one of these settings."""
    return made_with(run_dir, lambda identity: any(key in identity for key in settings))


def removal(directories: Collection[Path]) -> str:
    """The command that deletes these stages. It names an iteration if it deletes all of its stages."""
    names: dict[Path, None] = {}
    for directory in directories:
        others = {spec.parent for spec in directory.parent.glob(f"*/{SPEC}")} - set(directories)
        names[directory if any(map(holds_work, others)) else directory.parent] = None
    return shlex.join(["rm", "-r", *map(str, names)])


def _place(path: Path) -> tuple[str, ...]:
    return path.parts[-2:]


def _inputs(spec: Mapping[str, Any]) -> set[tuple[str, ...]]:
    """The stages whose results are inputs. By the last two parts of their paths, since a run may have been moved."""
    rows = spec.get("inputs", {}).values()
    return {_place(Path(row["path"])) for row in rows if row.get("kind") in ("table", "model")}
