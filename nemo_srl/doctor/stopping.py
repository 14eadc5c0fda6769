"""A stop request, as before a time limit or at preemption: it must reach a training, which must save and go on later.

The training has more steps than it could ever make, and saves often, in the recipe's own precision. When it has made
some steps, the launcher asks it to stop. It saves, the job starts again, and the training goes on from the saved step.
Then it has shown everything and ends.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from nemo_srl import jsonio
from nemo_srl.artifacts import write_atomic
from nemo_srl.doctor import tiny
from nemo_srl.doctor.findings import Finding, not_checked
from nemo_srl.errors import NemoSrlError, StoppedError

if TYPE_CHECKING:
    from nemo_srl.doctor.site import Site
    from nemo_srl.doctor.training import Lesson
    from nemo_srl.protocols import Job, Trainer

NAME = "stopping"
RESULT, ASKED, NOT_REACHED = "stopping-result.json", "stopping-asked", "stopping-not-reached"
MIN_STEPS = 5
"""The request comes after so many steps, and so after the first checkpoints."""
STEPS_AFTER = 2
"""So many further steps show that the training goes on."""
FIRST_STEPS_SECONDS = 1200.0
REACH_SECONDS = 120.0
"""So long, a request may take to reach the training. A step takes less than a second."""
REMEDY = (
    "Without this, a time limit costs all steps since the last checkpoint. See the end of the log. If the request did "
    "not arrive: does the site's Slurm pass signals on to steps (scancel --signal=TERM JOB)? May a job requeue itself "
    "(JobRequeue=1)? If the save failed: is the storage fast enough for launcher.signal_seconds?"
)


def check(site: Site) -> Iterator[Finding]:
    """Ask a training to stop, and see that it goes on from the step that it saved."""
    from nemo_srl.doctor import training
    from nemo_srl.launchers import launcher_backend

    s, precision = training.sizes(site), getattr(site.cfg.trainer, "precision", "32")
    tried = f"a stop request to a running SFT with {s}, precision {precision}, which must save, start again and go on"
    if launcher_backend(site.launcher).ask_to_stop is None:
        yield not_checked(NAME, f"launcher={site.cfg.launcher.name} has no time limits", tried=tried)
        return
    tiny.write_model(site.directory / "model")
    lesson = training.write_lesson(
        site.directory, "sft", training.settings(site, precision=precision), model_dir=site.directory / "model",
        name=NAME, max_epochs=50_000, learning_rate=1e-5, min_learning_rate=1e-5, save_interval=2,
    )  # fmt: skip
    job = site.job(
        NAME, [training.step(lesson, "prepare"), training.step(lesson, "train_and_stop")], role="trainer",
        num_nodes=s.num_nodes, num_ranks_per_node=s.num_ranks_per_node, num_gpus_per_node=s.num_ranks_per_node,
    )  # fmt: skip
    problems: list[str] = []
    try:
        _run(site, job, lesson, problems)
        found = site.read(RESULT)
    except NemoSrlError as e:
        text = " ".join([*problems, str(e)])
        yield Finding(name=NAME, ok=False, text=text, tried=tried, remedy=REMEDY)
        return
    yield judge(found, tried)


def judge(found: dict[str, Any], tried: str) -> Finding:
    """`found` has the steps before the stop, those of the checkpoint from which the training went on, and the last."""
    before, kept, after = found["before"], found["kept"], found["after"]
    text = f"asked after step {before}; went on from step {kept}, and made step {after}"
    if kept == before and after > before:
        return Finding(name=NAME, ok=True, text=text, tried=tried)
    return Finding(name=NAME, ok=False, text=f"{text}: steps were lost", tried=tried, remedy=REMEDY)


def _run(site: Site, job: Job, lesson: Lesson, problems: list[str]) -> None:
    """Run the job, and meanwhile ask it to stop. launcher=srun returns then, and must start it again."""
    over = threading.Event()
    asking = threading.Thread(target=_ask, args=(site, job, lesson, over, problems), daemon=True)
    asking.start()
    try:
        try:
            site.run(job)
        except StoppedError:
            site.run(job)
    finally:
        over.set()
        asking.join()


def _ask(site: Site, job: Job, lesson: Lesson, over: threading.Event, problems: list[str]) -> None:
    """Wait for the first steps, and let the launcher ask the job to stop. Errors go to `problems`."""
    from nemo_srl.doctor.site import wait_until
    from nemo_srl.launchers import launcher_backend

    trainer, ask = lesson.open_trainer(), launcher_backend(site.launcher).ask_to_stop
    assert ask is not None
    try:
        there = wait_until(
            lambda: over.is_set() or len(trainer.metrics(lesson.work_dir)) >= MIN_STEPS, FIRST_STEPS_SECONDS, every=0.5
        )
        if over.is_set():
            return
        # The training gives up some time after this file is there, whether it got the request or not.
        write_atomic(lesson.directory / ASKED, "1")
        if there:
            ask(job)
        else:
            problems.append(f"no {MIN_STEPS} steps in {FIRST_STEPS_SECONDS:g} s.")
    except (NemoSrlError, OSError) as e:
        problems.append(f"The request could not be sent: {e}.")
        with suppress(OSError):
            write_atomic(lesson.directory / ASKED, "1")


# ---- in the job


def train(lesson: Lesson, trainer: Trainer) -> None:
    """Train until the request comes. After the next start, make some steps more and end well.

    Raises `StoppedError` at the first stop, and `NemoSrlError` if the request did not reach the start before this one.
    """
    if (lesson.directory / NOT_REACHED).exists():
        raise NemoSrlError(f"the stop request did not reach the training in {REACH_SECONDS:g} s")
    before = trainer.metrics(lesson.work_dir)
    is_first_rank = os.environ.get("RANK", "0") == "0"
    if is_first_rank:
        watch = partial(_end_after_some_steps, trainer, len(before)) if before else _give_up_without_a_request
        threading.Thread(target=watch, args=(lesson,), daemon=True).start()
    try:
        trainer.train(lesson.work_dir)
    except StoppedError:
        if not before:
            raise
    if is_first_rank:
        after = trainer.metrics(lesson.work_dir)
        # Steps that were made again have other times.
        kept = next((i for i, row in enumerate(before) if after[i : i + 1] != [row]), len(before))
        found = {"before": len(before), "kept": kept, "after": len(after)}
        write_atomic(lesson.directory / RESULT, jsonio.dumps(found))


def _end_after_some_steps(trainer: Trainer, before: int, lesson: Lesson) -> None:
    """Ask this training to end, in the trainer's own way, when it has gone on."""
    from nemo_srl.doctor.site import wait_until

    wait_until(lambda: len(trainer.metrics(lesson.work_dir)) >= before + STEPS_AFTER, FIRST_STEPS_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)


def _give_up_without_a_request(lesson: Lesson) -> None:
    """End this training, and let the next start fail, if the request does not come."""
    from nemo_srl.doctor.site import wait_until

    wait_until((lesson.directory / ASKED).exists, 2 * FIRST_STEPS_SECONDS, every=1.0)
    time.sleep(REACH_SECONDS)
    write_atomic(lesson.directory / NOT_REACHED, "1")
    print(f"error: the stop request did not reach the training in {REACH_SECONDS:g} s", flush=True)
    os._exit(4)
