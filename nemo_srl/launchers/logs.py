"""How a process ended, in words, and the end of its log."""

from __future__ import annotations

import signal
from pathlib import Path

TAIL_LINES = 30


def how_it_ended(code: int) -> str:
    """In words. `code` is an exit status. -N stands for signal N, and so does 128 + N, which wrappers report."""
    number = -code if code < 0 else code - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"with exit status {code}"
    return f"by {name}{' (out of memory?)' if name == 'SIGKILL' else ''}"


def tail(log_path: Path) -> str:
    """The last lines of a log, without progress bars. The last line of an error is shown in any case."""
    text = log_path.read_bytes()[-(1 << 18) :].decode(errors="replace") if log_path.exists() else ""
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in text.split("\n")]
    lines = [line for line in lines if line]
    shown, errors = lines[-TAIL_LINES:], [line for line in lines if line.startswith("error: ")]
    if errors and errors[-1] not in shown:
        shown = [errors[-1], "...", *shown]
    return f"The end of {log_path}:\n" + "\n".join(f"  | {line}" for line in shown)
