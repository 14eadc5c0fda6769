"""At SIGTERM, stop after the running step and save. A time limit, a preemption or Ctrl-C sends this signal.

NeMo-Aligner's loops ask a timer after every step whether to save and stop. This is that timer. Rank 0 decides for all
ranks, since the signal may reach them in different steps. A second signal changes nothing: a batch script and Slurm
may both send one. Not covered: a rank that hangs in a collective operation does not see the request and must be killed.
"""

from __future__ import annotations

import signal
from types import FrameType

import torch


class StopRequest:
    """Has those methods of `nemo_aligner.utils.distributed.Timer` that NeMo-Aligner's loops call."""

    def __init__(self) -> None:
        self._requested = False

    def start_time(self) -> None:
        """Called when the training begins. Before that there is nothing to save, and SIGTERM ends the process."""
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
