"""Part `losses` of gpu.py: the same trainings of a tiny model on the CPU platform and on the GPU's."""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor

from gpu_session import Session

MAX_DIFFERENCE = 1e-4
"""The goal in float32: what the order of additions explains."""
NUM_STEPS, NUM_PAIRS, MAX_LENGTH = 6, 8, 128


def run(session: Session) -> None:
    if (directory := session.model("tiny")) is None:
        return
    cases = [(algorithm, precision) for precision in ("32", "bf16-O2") for algorithm in ("sft", "dpo")]
    sides = ("cpu", session.device)  # a dry run compares the CPU with itself

    def train(case: tuple[str, str], side: int) -> list[float] | None:
        algorithm, precision = case
        name = f"{algorithm} {precision} {'reference' if side == 0 else sides[side]}"
        trainer = {"precision": precision, "platform": sides[side], "micro_batch_size": 2}
        settings = {
            "algorithm": algorithm, "model": directory / "model", "pairs": directory / "pairs.json",
            "num_pairs": NUM_PAIRS, "max_length": MAX_LENGTH, "num_steps": NUM_STEPS, "learning_rate": 1e-3,
            "work_dir": session.directory / name.replace(" ", "-"), "trainer": trainer,
        }  # fmt: skip
        found = session.measure(name, "gpu_training.py", settings)
        return None if found is None else list(found["losses"])

    # Most of the time goes into imports, so several run at once where there are cores enough.
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 4)) as pool:
        trained = {case: [pool.submit(train, case, side) for side in (0, 1)] for case in cases}
        for (algorithm, precision), futures in trained.items():
            reference, other = (future.result() for future in futures)
            if reference and other:
                report(session, algorithm, precision, reference, other)


def report(session: Session, algorithm: str, precision: str, reference: list[float], other: list[float]) -> None:
    differences = [abs(a - b) for a, b in zip(reference, other, strict=True)]
    largest = math.nan if any(map(math.isnan, differences)) else max(differences)
    is_goal = precision == "32"
    dtype = "float32" if is_goal else precision
    session.add(
        f"{algorithm.upper()} losses, {dtype}: CPU platform against {session.device.upper()}",
        f"differ by at most {largest:.1e} in {len(other)} steps (last: {reference[-1]:.5f} and {other[-1]:.5f})",
        goal=f"{MAX_DIFFERENCE:.0e}" if is_goal else "",
        reached=largest <= MAX_DIFFERENCE if is_goal else None,  # not a number is no agreement
        values={"reference": reference, "losses": other, "largest_difference": largest},
    )
