"""Artifacts: what a stage leaves on disk, and how a later run knows that it may be reused.

    run_dir/iter_02/candidates/
        stage.json      what was asked for: settings, inputs, identity; written before the work starts
        steps.json      what each step cost
        journal.jsonl   one line is one model call, appended as it completes
        data.jsonl      the result, sorted by key
        <part>.jsonl    a further table of some stages, such as the answers that an evaluation measured
        manifest.json   written last, by rename: a directory without one is unfinished work

An artifact's *identity* is its stage, the settings that decide its result and the digests of its inputs. The same
identity is kept. Another one is refused (`StaleArtifactError`, which names each change), whether the work in its place
is finished or not. So old and new settings never mix. A setting that is newer than the directory counts as its default
(`Schema`), so a run goes on after this package has learned a new setting.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic

from nemo_srl.errors import DataError, StaleArtifactError
from nemo_srl.records import Completion, R, Record, from_row, to_row
from nemo_srl.rows import read_rows

MANIFEST = "manifest.json"
SPEC = "stage.json"
STEPS = "steps.json"
DATA = "data.jsonl"
JOURNAL = "journal.jsonl"

Identity = Mapping[str, Any]


@dataclass(frozen=True)
class Schema:
    """What an identity on disk may lack, or may call by an old name, because an older version wrote it."""

    defaults: Identity = field(default_factory=dict)
    """The default of every setting that can be part of an identity."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """New key by old key. A key that ends with a dot stands for all keys that begin with it."""

    def completed(self, found: Identity, wanted: Identity) -> dict[str, Any]:
        """`found`, with today's names, and with the defaults of those settings of `wanted` that it does not know."""
        today = {self._name(key): value for key, value in found.items()}
        return {**{k: v for k, v in self.defaults.items() if k in wanted}, **today}

    def _name(self, key: str) -> str:
        for old, new in self.renamed.items():
            if key == old or (old.endswith(".") and key.startswith(old)):
                return new + key.removeprefix(old)
        return key


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all, also after a power cut."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def digest_of(value: object) -> str:
    """16 hex digits over the canonical JSON of `value`."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def digest_of_file(path: Path) -> str:
    """16 hex digits over a file's bytes."""
    sha = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()[:16]


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` holds. `digest` names the content; later stages remember it as their input."""

    stage: str
    identity: dict[str, Any]
    digest: str
    metrics: dict[str, float]
    seconds: float
    """Of its steps together, on rank 0; work that was killed before its step ended is not in it."""
    peak_memory_bytes: int = 0
    """The largest resident memory of a step, on rank 0."""
    parts: dict[str, str] = field(default_factory=dict)
    """The digests of the further tables, by their names."""


@dataclass(frozen=True)
class Artifact:
    """A directory with a `manifest.json` once it is published."""

    path: Path
    identity: Identity

    def manifest(self) -> Manifest | None:
        """The manifest of what is published here, of whatever identity; None for unfinished work."""
        try:
            return Manifest(**json.loads((self.path / MANIFEST).read_text()))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as e:
            raise DataError(f"{self.path / MANIFEST}: not a manifest of this version ({e}); delete {self.path}") from e

    def is_published(self, schema: Schema = Schema()) -> bool:
        """True when exactly this artifact is here. Raises `StaleArtifactError` for another one in its place."""
        found = self.manifest()
        if found is not None:
            self._refuse_other(found.identity, schema, "was made")
            return True
        spec = self.path / SPEC
        if spec.exists():
            self._refuse_other(json.loads(spec.read_text())["identity"], schema, "was begun")
        return False

    def _refuse_other(self, identity: Identity, schema: Schema, verb: str) -> None:
        wanted = json.loads(json.dumps(dict(self.identity)))
        found = json.loads(json.dumps(schema.completed(identity, wanted)))
        if found == wanted:
            return
        keys = sorted(found.keys() | wanted.keys())
        changes = [
            f"  {k}: {_short(found.get(k))} -> {_short(wanted.get(k))}" for k in keys if found.get(k) != wanted.get(k)
        ]
        raise StaleArtifactError(
            f"{self.path} {verb} with other settings or inputs:\n" + "\n".join(changes) + "\n"
            "Nothing was changed. Use a new run_dir, or go back to the old settings, or delete that directory "
            "to make it, and what depends on it, anew."
        )

    def digest(self) -> str:
        """Of the published content."""
        found = self.manifest()
        if found is None:
            raise DataError(f"{self.path} is not published")
        return found.digest

    def publish(
        self,
        *,
        stage: str,
        digest: str,
        metrics: Mapping[str, float],
        seconds: float,
        peak_memory_bytes: int = 0,
        parts: Mapping[str, str] | None = None,
    ) -> None:
        """Write the manifest. From here on the artifact is there."""
        identity = dict(self.identity)
        manifest = Manifest(stage, identity, digest, dict(metrics), seconds, peak_memory_bytes, dict(parts or {}))
        write_atomic(self.path / MANIFEST, json.dumps(asdict(manifest), indent=2, sort_keys=True) + "\n")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters, digest {digest_of(value)})"


@dataclass(frozen=True)
class Model(Artifact):
    """A policy: `hf/` is a Hugging Face directory, read by engines and by the next training."""

    @property
    def model_dir(self) -> Path:
        return self.path / "hf"


@dataclass(frozen=True)
class BaseModel:
    """M0: the user's Hugging Face directory, outside the run directory and never written to."""

    model_dir: Path
    content_digest: str

    def digest(self) -> str:
        return self.content_digest


@dataclass(frozen=True)
class SourceFile(Generic[R]):
    """A file of the user's, outside the run directory and never written to."""

    path: Path
    record: type[R]

    def read(self) -> list[R]:
        return read_jsonl(self.path, self.record)

    def digest(self) -> str:
        return digest_of_file(self.path)


@dataclass(frozen=True)
class Table(Artifact, Generic[R]):
    """`data.jsonl`: one kind of record, sorted by key. Some stages write further tables beside it, its parts."""

    record: type[R]

    def read(self) -> list[R]:
        return read_jsonl(self.path / DATA, self.record)

    def write(self, records: Iterable[R]) -> str:
        """Write all records and return the content's digest. Refuses two records with one key."""
        return write_table(self.path / DATA, records)


def part_file(name: str) -> str:
    """The file name of a part."""
    return f"{name}.jsonl"


def write_table(path: Path, records: Iterable[Record]) -> str:
    """Write records, sorted by key, and return the content's digest. Refuses two records with one key."""
    rows = sorted(records, key=lambda r: r.key)
    for a, b in itertools.pairwise(rows):
        if a.key == b.key:
            raise DataError(f"{path}: two records have the key {a.key!r}")
    write_atomic(path, "".join(map(to_line, rows)))
    return digest_of_file(path)


def to_line(record: Any) -> str:
    return json.dumps(to_row(record), ensure_ascii=False) + "\n"


def read_jsonl(path: Path, record: type[R]) -> list[R]:
    """Read the records of a file, which is JSONL or another form that `read_rows` takes.

    Raises `DataError` with the file and the line for a row that is not such a record, and for a key that occurs twice.
    """
    records: list[R] = []
    places: dict[str, str] = {}
    for where, row in read_rows(path, what=f"rows of {record.__name__}"):
        found = from_row(record, row, where=where)
        if (first := places.setdefault(found.key, where)) != where:
            raise DataError(f"{where}: the key {found.key!r} is already used in {first.removeprefix(f'{path}, ')}")
        records.append(found)
    return records


class Journal:
    """The model calls of one stage, on disk as they complete.

    Opening it drops a torn last line, the mark of a kill in mid-write. Completions that come together
    are appended in one write, so that a kill hardly ever splits them.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / JOURNAL
        self.completions = {c.key: c for c in self._recover()}
        self._file = self.path.open("a", encoding="utf-8")

    def _recover(self) -> list[Completion]:
        if not self.path.exists():
            return []
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with self.path.open("r+b") as f:
                f.truncate(len(whole))
        # Not `splitlines`: JSON strings may hold U+2028 and its kin, which that would split at.
        lines = whole.decode("utf-8").split("\n")[:-1]
        return [
            from_row(Completion, json.loads(line), where=f"{self.path}, line {i}")
            for i, line in enumerate(lines, start=1)
        ]

    def append(self, completions: tuple[Completion, ...]) -> None:
        """Record completions; they are in the kernel's hands, safe from a kill, when this returns."""
        self._file.write("".join(map(to_line, completions)))
        self._file.flush()
        self.completions.update((c.key, c) for c in completions)

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
