"""The file system that all nodes share: how late a node sees files, locks, renames, speed and free space.

The first two nodes of the job test it together. With one node, that node and this machine do. All waiting is done by
looking for files, because that is what a run does. Clocks of different machines are never compared.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_srl.doctor.findings import Finding
from nemo_srl.doctor.probe import Node, put, read_text

if TYPE_CHECKING:
    from nemo_srl.doctor.site import Site

NUM_ROUNDS = 3
"""Files that go to the other node and back."""
NUM_RENAMES = 100
NUM_BYTES = 256 << 20
"""Each node writes so much to measure the speed."""
BLOCK = 16 << 20
SLOW_SECONDS = 5.0
"""A delay that is worth a remark."""
TOO_LATE_SECONDS = 60.0
"""The launcher and a stage wait for files of other machines up to 90 s. Above this delay, that is no longer safe."""
LOCK_FILE = "login.lock"
"""This machine holds the lock while the job runs, as an orchestrator does."""


def probe(node: Node) -> dict[str, Any]:
    """Facts of this node. Nodes beside the first two only measure speed."""
    found: dict[str, Any] = {"lock": _lock(node.file("lock")), "login_lock": _lock(node.directory / LOCK_FILE)}
    found["free_gb"] = shutil.disk_usage(node.directory).free / 1e9
    if node.count > 1 and node.index < 2:
        found["new_file_seconds"] = _round_trips(node, "new", replaces=False)
        if None in found["new_file_seconds"]:  # all that follows would wait in vain
            raise TimeoutError(f"a new file of the other node was not visible in {node.seconds:g} s")
        found["replaced_file_seconds"] = _round_trips(node, "again", replaces=True)
        found["lock_between_nodes"] = _lock_between_nodes(node)
    found["rename"] = _renames(node)
    found["write_gb_per_second"], found["read_gb_per_second"] = _speed(node, int(node.asked["storage"]["num_bytes"]))
    return found


def judge(site: Site, nodes: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Findings for visibility, locks, renames, speed and space."""
    if broken := [facts for facts in nodes if "error" in facts["storage"]]:
        text = "; ".join(f"{facts['host']}: {facts['storage']['error']}" for facts in broken)
        remedy = f"run_dir must lie on a file system that all nodes share and can write to. {site.directory} does not."
        yield Finding(name="storage", ok=False, text=text, tried=f"files in {site.directory}", remedy=remedy)
        return
    found = {str(facts["host"]): facts["storage"] for facts in nodes}
    yield _visibility(site, found)
    yield _locks(site, found)
    yield _of_renames(site, found)
    yield _of_speed(site, found)
    yield _of_space(site, found)


# ---- what a node does


def _round_trips(node: Node, name: str, *, replaces: bool) -> list[float | None]:
    """Seconds until a file of this node came back as a file of the other one. None: not in time.

    Each way counts as half of it, but one way may have taken all of it. With `replaces`, the same two files get new
    contents. Otherwise each round has new files, for which the other node has looked in vain before.
    """
    times: list[float | None] = []
    for number in range(NUM_ROUNDS):
        label = name if replaces else f"{name}{number}"
        mine, other, text = node.file(label), node.file(label, 1 - node.index), str(number)
        began = time.monotonic()
        if node.index == 0:
            put(mine, text)
        if not node.wait_for(other, text):
            return [*times, None]
        if node.index == 1:
            put(mine, text)
        else:
            times.append(time.monotonic() - began)
    return times


def _lock(path: Path) -> str:
    """ok, busy, or the name of the error."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        return "busy" if e.errno in (errno.EWOULDBLOCK, errno.EACCES) else errno.errorcode.get(e.errno or 0, str(e))
    finally:
        os.close(handle)
    return "ok"


def _lock_between_nodes(node: Node) -> str:
    """The first node holds a lock, and the second one tries to get it: busy is right."""
    path, held, tried = node.directory / "shared.lock", node.file("held", 0), node.file("tried", 1)
    if node.index == 1:
        result = _lock(path) if node.wait_for(held) else "the other node did not answer"
        put(tried, result)
        return result
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with suppress(OSError):  # `lock` says what is wrong
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        put(held, "1")
        node.wait_for(tried)
        return read_text(tried) or "the other node did not answer"
    finally:
        os.close(handle)


def _renames(node: Node) -> dict[str, Any]:
    """Replace a file again and again while the neighbour reads it, and rename a directory.

    `torn` counts readings that were neither the old nor the new content, and `errors` readings that failed.
    """
    mine, other = node.file("replaced"), node.file("replaced", (node.index + 1) % node.count)
    torn, errors, seen = 0, dict[str, int](), 0
    for number in range(NUM_RENAMES):
        put(mine, f"{number % 10}" * 4096)
        try:
            text = other.read_text()
        except FileNotFoundError:
            continue  # the neighbour has not begun
        except OSError as e:
            name = errno.errorcode.get(e.errno or 0, str(e))
            errors[name] = errors.get(name, 0) + 1
            continue
        seen += 1
        torn += len(text) != 4096 or len(set(text)) != 1
    directory = node.file("directory")
    new = node.file("renamed")
    directory.mkdir()
    (directory / "file").write_text("whole")
    os.rename(directory, new)
    link = node.file("link")
    link.symlink_to(new)
    return {"torn": torn, "errors": errors, "seen": seen, "directory": read_text(link / "file") == "whole"}


def _speed(node: Node, num_bytes: int) -> tuple[float, float]:
    """GB/s of writing a file to the end (fsync), and of reading the one that the neighbour wrote at the same time."""
    mine, other = node.file("large"), node.file("large", (node.index + 1) % node.count)
    block = os.urandom(min(BLOCK, num_bytes))
    began = time.monotonic()
    with mine.open("wb", buffering=0) as f:
        for _ in range(num_bytes // len(block)):
            f.write(block)
        os.fsync(f.fileno())
    written = time.monotonic() - began
    put(node.file("written"), "1")
    node.wait_for(node.file("written", (node.index + 1) % node.count))
    node.until(lambda: other.exists() and other.stat().st_size >= num_bytes // len(block) * len(block))
    began = time.monotonic()
    with other.open("rb", buffering=0) as f:
        while f.read(BLOCK):
            pass
    read = time.monotonic() - began
    put(node.file("read"), "1")
    node.wait_for(node.file("read", (node.index - 1) % node.count))  # the neighbour must have read this file
    mine.unlink()
    return num_bytes / 1e9 / written, num_bytes / 1e9 / read


# ---- what it means


def _visibility(site: Site, found: Mapping[str, Any]) -> Finding:
    name, tried = "storage.visibility", f"new and replaced files between nodes and to this machine, in {site.directory}"
    times = [x for facts in found.values() for key in ("new_file_seconds", "replaced_file_seconds")
             for x in facts.get(key, ())]  # fmt: skip
    to_here = max(site.result_delays, default=0.0)
    remedy = (
        "Use a directory on a parallel file system, or ask for a mount with short caching of attributes (NFS: "
        "acdirmax=10, lookupcache=positive)."
    )
    if None in times:
        text = "a node did not see the new content of a replaced file in time"
        return Finding(name=name, ok=False, text=text, tried=tried, remedy=remedy)
    there = max((x for x in times if x is not None), default=0.0)
    text = f"there and back {there:.2f} s" if times else "one node only"
    text += f"; a job's file was seen here {to_here:.2f} s after its end"
    late = max(there, to_here)
    ok = late <= TOO_LATE_SECONDS
    slow = f" Files come late: {remedy}" if late > SLOW_SECONDS else ""
    return Finding(name=name, ok=ok, text=text, tried=tried, remedy=slow.strip())


def _locks(site: Site, found: Mapping[str, Any]) -> Finding:
    tried = "flock on a node, against a lock of another node, and against a lock of this machine"
    answers = {host: {k: facts.get(k) for k in ("lock", "lock_between_nodes", "login_lock")} for host, facts in
               found.items()}  # fmt: skip
    kinds = {str(a["lock"]) for a in answers.values()}
    between = {str(a["lock_between_nodes"]) for a in answers.values() if a["lock_between_nodes"] is not None}
    login = {str(a["login_lock"]) for a in answers.values()}
    remedies = []
    if kinds != {"ok"}:
        remedies.append(
            "Locks do not work here. Mount it with them (Lustre: -o flock; NFS: rpc.statd and lockd on every node), or "
            "set run_dir to another file system. Without them, a node that dies may leave a lock that you must delete."
        )
    elif between - {"busy"} or login - {"busy"}:
        remedies.append(
            "Locks are not shared between machines. Mount it with shared ones (Lustre: -o flock and not localflock; "
            "NFS: without nolock and local_lock), or start a run from one machine only."
        )
    text = f"a lock: {', '.join(sorted(kinds))}; one that this machine holds: {', '.join(sorted(login))}"
    text += f"; one that another node holds: {', '.join(sorted(between))}" if between else ""
    return Finding(name="storage.locks", ok=not remedies, text=text, tried=tried, remedy=" ".join(remedies))


def _of_renames(site: Site, found: Mapping[str, Any]) -> Finding:
    renames = [facts["rename"] for facts in found.values()]
    torn, seen = sum(r["torn"] for r in renames), sum(r["seen"] for r in renames)
    errors: dict[str, int] = {}
    for r in renames:
        errors = {name: errors.get(name, 0) + r["errors"].get(name, 0) for name in errors.keys() | r["errors"].keys()}
    text = f"{seen} readings: {torn} torn, " + (", ".join(f"{n} x {e}" for e, n in errors.items()) or "no errors")
    whole = all(r["directory"] for r in renames)
    text += "; a renamed directory and a link to it " + ("work" if whole else "do NOT work")
    # A file that was replaced while it was open may be stale on NFS. Reading it again helps.
    ok = not torn and whole and set(errors) <= {"ESTALE"}
    remedy = "" if ok else "Renames must be atomic. Set run_dir to a POSIX file system (no object store mount)."
    tried = f"{NUM_RENAMES} replacements of a file by each node while the other one reads it"
    return Finding(name="storage.rename", ok=ok, text=text, tried=tried, remedy=remedy)


def _of_speed(site: Site, found: Mapping[str, Any]) -> Finding:
    """A checkpoint must be written between the stop request and the time limit."""
    from nemo_srl.doctor.memory import shape
    from nemo_srl.trainers import trainer_backend

    written, read = (sum(f[f"{key}_gb_per_second"] for f in found.values()) for key in ("write", "read"))
    checkpoint = trainer_backend(site.cfg.trainer).checkpoint_bytes(site.cfg.trainer, shape(site)) / 1e9
    seconds, given = checkpoint / written, getattr(site.cfg.launcher, "signal_seconds", None)
    text = (
        f"{written:.2f} GB/s written and {read:.2f} GB/s read by {len(found)} node(s) at once; a checkpoint of "
        f"{checkpoint:.1f} GB takes {seconds:.0f} s at this rate; the plan assumes "
        f"{site.assumptions.storage_gb_per_second:g} GB/s"
    )
    remedies = []
    if given is not None and seconds > given:
        remedies.append(
            f"Set launcher.signal_seconds={int(2 * seconds) + 60}: with {given}, the time limit would end a training "
            "while it saves, unless more nodes write faster."
        )
    slow = f" For the plan, set ++assume.storage_gb_per_second={written:.2g}." if (
        written < site.assumptions.storage_gb_per_second / 2) else ""  # fmt: skip
    tried = f"a file of {NUM_BYTES >> 20} MiB from each node, written with fsync and read by another node"
    remedy = (" ".join(remedies) + slow).strip()
    return Finding(name="storage.speed", ok=not remedies, text=text, tried=tried, remedy=remedy)


def _of_space(site: Site, found: Mapping[str, Any]) -> Finding:
    """The disk that the whole run needs, by the plan."""
    from nemo_srl import estimates
    from nemo_srl.doctor.memory import shape
    from nemo_srl.models.arithmetic import num_parameters
    from nemo_srl.trainers import trainer_backend

    cfg, spec = site.cfg, shape(site)
    kept = sum(s.times * s.disk_bytes for s in estimates.stages(cfg, spec, site.assumptions))
    scratch = 2 * trainer_backend(cfg.trainer).checkpoint_bytes(cfg.trainer, spec) + 4 * num_parameters(spec)
    needed, free = (kept + scratch) / 1e9, min(facts["free_gb"] for facts in found.values())
    text = f"{free:,.0f} GB free; the whole run needs {needed:,.1f} GB by the plan"
    remedy = "" if free >= needed else "Free some space, or put run_dir on a larger file system."
    tried = f"free space of {site.directory}, against the plan"
    return Finding(name="storage.space", ok=not remedy, text=text, tried=tried, remedy=remedy)


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """Hold a lock on this machine, as an orchestrator does, while a job runs. Where locks fail, nothing is held."""
    handle = os.open(directory / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)
