"""Stop at the next step and save, when SIGTERM comes: a time limit, a preemption, Ctrl-C at the orchestrator.

NeMo-Aligner's loops ask a timer after every step whether to save and leave; this is that timer. Rank 0
decides for all, since a signal may reach the ranks in different steps. Further signals change nothing: a
batch script and Slurm itself may both send one. Not covered: a rank that is stuck in a collective notices
nothing and has to be killed.
"""

from __future__ import annotations

import signal
from types import FrameType

import torch


class StopRequest:
    """Implements what NeMo-Aligner's loops use of its `nemo_aligner.utils.distributed.Timer`."""

    def __init__(self) -> None:
        self._requested = False

    def start_time(self) -> None:
        """Called when training begins: from here on SIGTERM is a request. Before, there is nothing to save."""
        signal.signal(signal.SIGTERM, self._request)

    def is_finished(self) -> bool:
        """The same answer on every rank."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        requested = torch.tensor([self._requested], dtype=torch.uint8, device=device)
        if torch.distributed.is_initialized():
            torch.distributed.broadcast(requested, 0)
        return bool(requested.item())

    def _request(self, number: int, frame: FrameType | None) -> None:
        if not self._requested:
            print("asked to stop: saving after this step", flush=True)
        self._requested = True
