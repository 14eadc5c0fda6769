"""Shows a job's progress bars on the console. Everything that the job prints goes to its log.

A progress bar is a line that begins or ends with a carriage return. Other output is not shown.
"""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path

from nemo_srl.shared_storage import ask_again

QUIET_SECONDS = 15
"""Time between two progress lines if the console is a file and not a terminal."""


class Console:
    """Shows the latest progress bar in one line of the terminal, or now and then in a log."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._next = 0.0
        self._shown = False
        self._pending = b""

    def feed(self, block: bytes) -> None:
        """More of the job's output. It may be cut anywhere."""
        *lines, self._pending = re.split(rb"(?<=[\r\n])", self._pending + block)
        for line in lines:
            if line.endswith(b"\r") or line.startswith(b"\r"):
                self.show(line.decode(errors="replace"))
        if len(self._pending) > 1 << 20:  # so much without a line end is no progress bar
            self._pending = b""

    def show(self, line: str) -> None:
        """Show one line. On a terminal it replaces the last one."""
        text = line.strip("\r\n")
        if not text.strip() or (not self._terminal and time.monotonic() < self._next):
            return
        self._next = time.monotonic() + QUIET_SECONDS
        self._shown = True
        print(f"\r\x1b[K{text}" if self._terminal else text, end="" if self._terminal else "\n", file=sys.stderr)
        sys.stderr.flush()

    def end(self) -> None:
        """Clear the line."""
        if self._shown and self._terminal:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


class LogTail:
    """Gives a console what others write to a log, from now on."""

    def __init__(self, path: Path, console: Console) -> None:
        self._path, self._console = path, console
        self._position = path.stat().st_size if path.exists() else 0

    def show(self) -> None:
        """Give it what is new."""
        try:
            with self._path.open("rb") as f:
                f.seek(self._position)
                while block := f.read(1 << 16):
                    self._console.feed(block)
                self._position = f.tell()
        except FileNotFoundError:
            ask_again(self._path.parent)  # for the next look
