"""Artifacts: the result of a stage on disk, and the rule that decides whether a later start may reuse it.

    run_dir/iter_02/candidates/
        stage.json      settings, inputs and identity of the stage; written before the work starts
        steps.json      time and memory of each step
        journal.jsonl   one line per model call, appended when the call is complete
        data.jsonl      the result, sorted by key
        <part>.jsonl    a further table of some stages, such as the answers that an evaluation measured
        manifest.json   written last, by rename: without it the work is not finished

The *identity* of an artifact is its stage and its version, the settings that decide its result, and the digests of its
inputs. An artifact with the same identity is kept. An artifact with another identity is refused, finished or not.
`StaleArtifactError` names each change, and what to delete. So old and new settings never mix. A setting that the
directory does not know counts as its default (`Schema`), so an old run can continue after this package has got a new
setting.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import TypeAdapter

from nemo_srl import jsonio, lineage
from nemo_srl.errors import DataError, StaleArtifactError
from nemo_srl.lineage import SPEC as SPEC
from nemo_srl.lineage import STEPS as STEPS
from nemo_srl.lineage import Identity as Identity
from nemo_srl.lineage import read_json as read_json
from nemo_srl.records import Completion, R, Record, from_row, to_row
from nemo_srl.rows import read_rows

MANIFEST = "manifest.json"
P = TypeVar("P", bound=Record)

DATA = "data.jsonl"
JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Schema:
    """How an identity on disk may differ because an older version of this package wrote it."""

    defaults: Identity = field(default_factory=dict)
    """The default of every setting that can be part of an identity."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """The new key for each old key. A key that ends with a dot stands for all keys that begin with it."""

    def completed(self, found: Identity, wanted: Identity) -> dict[str, Any]:
        """`found` with today's names. Settings of `wanted` that it lacks get their defaults."""
        today = {self._name(key): value for key, value in found.items()}
        return {**{k: v for k, v in self.defaults.items() if k in wanted}, **today}

    def _name(self, key: str) -> str:
        for old, new in self.renamed.items():
            if key == old or (old.endswith(".") and key.startswith(old)):
                return new + key.removeprefix(old)
        return key


def write_atomic(path: Path, text: str) -> None:
    """Write a file. Even after a power failure it is either complete or not there."""
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
    """The content of `manifest.json`. `digest` names the result; later stages record it as their input."""

    stage: str
    identity: dict[str, Any]
    digest: str
    metrics: dict[str, float]
    seconds: float
    """Time of all steps on rank 0. A step that was killed before its end is not counted."""
    peak_memory_bytes: int = 0
    """The largest resident memory of any step on rank 0."""
    parts: dict[str, str] = field(default_factory=dict)
    """The digests of the further tables, by their names."""


_MANIFEST = TypeAdapter(Manifest)


@dataclass(frozen=True)
class Artifact:
    """A stage's directory. It is published when it has a `manifest.json`."""

    path: Path
    identity: Identity

    def manifest(self) -> Manifest | None:
        """The manifest that is published here, with any identity. None when the work is not finished."""
        try:
            # As JSON again, because strict types take an object for a `Manifest` in JSON only.
            return _MANIFEST.validate_json(jsonio.dumps(read_json(self.path / MANIFEST)), strict=True)
        except FileNotFoundError:
            return None
        except ValueError as e:
            reason = "; ".join(str(e).splitlines()[:3])
            raise DataError(
                f"{self.path / MANIFEST}: not a manifest of this version ({reason}). Delete {self.path}. The next "
                "start makes this stage again, and other stages stay."
            ) from e

    def is_published(self, schema: Schema = Schema()) -> bool:
        """Whether this artifact is published. Raises `StaleArtifactError` when another one is in its place."""
        found = self.manifest()
        if found is not None:
            self._refuse_other(found.identity, schema, "was made")
            return True
        spec = self.path / SPEC
        if spec.exists():
            self._refuse_other(read_json(spec).get("identity", {}), schema, "was begun")
        return False

    def _refuse_other(self, identity: Identity, schema: Schema, verb: str) -> None:
        wanted = json.loads(jsonio.dumps(dict(self.identity)))
        found = json.loads(jsonio.dumps(schema.completed(identity, wanted)))
        if found == wanted:
            return
        values = [(k, found.get(k), wanted.get(k)) for k in sorted(found.keys() | wanted.keys())]
        changes = [f"  {key}: {_short(old)} -> {_short(new)}{_why(key)}" for key, old, new in values if old != new]
        new = {key: value for key, old, value in values if old != value and not key.startswith("input ")}
        concerned = partial(_differs, new=new, stage=self.identity.get("stage"))
        old = lineage.made_with(self.path.parent.parent, concerned, also=[self.path]) or [self.path]
        raise StaleArtifactError(
            f"{self.path} {verb} with other settings or inputs:\n" + "\n".join(changes) + "\n"
            "Nothing was changed. Use a new run_dir, or use the old settings. Or delete what was made with the old "
            "ones. The next start makes it again, and all other stages stay:\n  " + lineage.removal(old)
        )

    def digest(self) -> str:
        """The digest of the published content."""
        found = self.manifest()
        if found is None:
            raise DataError(f"{self.path} is not published")
        return found.digest

    def publish(
        self, *, stage: str, digest: str, metrics: Mapping[str, float], seconds: float, peak_memory_bytes: int = 0,
        parts: Mapping[str, str] = {},
    ) -> None:  # fmt: skip
        """Write the manifest. After this the artifact is published."""
        identity = dict(self.identity)
        manifest = Manifest(stage, identity, digest, dict(metrics), seconds, peak_memory_bytes, dict(parts))
        write_atomic(self.path / MANIFEST, jsonio.dumps(asdict(manifest), indent=2, sort_keys=True) + "\n")


def _differs(identity: Identity, *, new: Identity, stage: object) -> bool:
    """Whether an identity on disk has another value of one of the settings in `new`, which are those of `stage`."""
    common = new if identity.get("stage") == stage else {key: value for key, value in new.items() if key != "version"}
    return any(key in identity and identity[key] != value for key, value in common.items())


def _why(key: str) -> str:
    return " (this package does it in another way now; see CHANGELOG.md)" if key.endswith("version") else ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters, digest {digest_of(value)})"


@dataclass(frozen=True)
class Model(Artifact):
    """A policy. Engines and the next training read `hf/`, a Hugging Face directory."""

    @property
    def model_dir(self) -> Path:
        return self.path / "hf"

    @property
    def checkpoints(self) -> list[Path]:
        """The models of the training's checkpoints by their steps, the last one included. Empty if none was kept."""
        return sorted((self.path / "checkpoints").glob("step_*[0-9]"))


@dataclass(frozen=True)
class BaseModel:
    """M0: the user's Hugging Face directory. It is outside the run directory, and never changed."""

    model_dir: Path
    content_digest: str

    def digest(self) -> str:
        return self.content_digest


@dataclass(frozen=True)
class SourceFile(Generic[R]):
    """A file of the user. It is outside the run directory, and never changed."""

    path: Path
    record: type[R]

    def read(self) -> list[R]:
        return read_jsonl(self.path, self.record)

    def digest(self) -> str:
        return digest_of_file(self.path)


@dataclass(frozen=True)
class Table(Artifact, Generic[R]):
    """`data.jsonl`: one kind of record, sorted by key. Some stages write further tables beside it, called parts."""

    record: type[R]

    def read(self) -> list[R]:
        path = file_of(self.path)
        # A file without rows is refused as damaged, unless it was published so.
        is_empty = path.exists() and not path.stat().st_size
        if is_empty and (found := self.manifest()) and found.digest == digest_of_file(path):
            return []
        return read_jsonl(path, self.record)

    def part(self, name: str, record: type[P]) -> list[P]:
        """The records of a part."""
        return read_jsonl(file_of(self.path, name), record)

    def write(self, records: Iterable[Record], part: str = "") -> str:
        """Write all records of the table, or of a part, and return the content's digest.

        Raises `DataError` for two records with one key.
        """
        path = file_of(self.path, part)
        rows = sorted(records, key=lambda r: r.key)
        for a, b in itertools.pairwise(rows):
            if a.key == b.key:
                raise DataError(f"{path}: two records have the key {a.key!r}")
        write_atomic(path, "".join(map(to_line, rows)))
        return digest_of_file(path)


def file_of(directory: Path, part: str = "") -> Path:
    """The file of the table in a stage's directory, or of a part of it."""
    return directory / (f"{part}.jsonl" if part else DATA)


def to_line(record: Any) -> str:
    return jsonio.dumps(to_row(record), ensure_ascii=False) + "\n"


def read_jsonl(path: Path, record: type[R]) -> list[R]:
    """Read the records of a file, which is JSONL or another form that `read_rows` takes.

    Raises `DataError` with the file and the line for a row that is not such a record, and for a key that occurs twice.
    """
    records: list[R] = []
    places: dict[str, str] = {}
    for where, row in read_rows(path, what=f"rows of {record.__name__}"):
        found = from_row(record, row, where=where)
        if (first := places.setdefault(found.key, where)) != where:
            raise DataError(
                f"{where}: the key {found.key!r} is already used in {first.removeprefix(f'{path}, ')}. Give each row "
                "a key of its own, or remove one of the two."
            )
        records.append(found)
    return records


class Journal:
    """The completed model calls of one stage, on disk.

    Opening the journal removes an incomplete last line, which a kill during a write leaves. Completions that come
    together are appended in one write, so a kill rarely separates them.
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
        # Not `splitlines`: it also splits at characters such as U+2028, which JSON strings may hold.
        lines = whole.split(b"\n")[:-1]
        return [self._completion(line, f"{self.path}, line {i}") for i, line in enumerate(lines, start=1)]

    def _completion(self, line: bytes, where: str) -> Completion:
        try:
            row = jsonio.loads(line)
        except ValueError as e:
            raise DataError(
                f"{where}: damaged ({e}). Remove this line. Its call is made again, and all others stay."
            ) from e
        return from_row(Completion, row, where=where)

    def append(self, completions: tuple[Completion, ...]) -> None:
        """Write completions. When this returns, the kernel has them, and a kill of this process cannot lose them."""
        self._file.write("".join(map(to_line, completions)))
        self._file.flush()
        self.completions.update((c.key, c) for c in completions)

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()
