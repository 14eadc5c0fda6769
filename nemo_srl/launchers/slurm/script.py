"""The batch script of a job, from `job.sbatch.jinja`. It depends on the job and the configuration alone.

Raises `ConfigError` for a job that could not run, such as one with more GPUs than a node has.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

import jinja2

from nemo_srl.config import ClusterConfig
from nemo_srl.errors import ConfigError
from nemo_srl.launchers.slurm.settings import SlurmSettings
from nemo_srl.launchers.slurm.steps import (
    cancelled_file,
    container_name,
    gpus_per_node,
    removal_of,
    resources,
    step_command,
    step_environment,
)
from nemo_srl.protocols import EXIT_STOPPED, Job

TEMPLATE = Path(__file__).with_name("job.sbatch.jinja")


def render(job: Job, *, launcher: SlurmSettings, cluster: ClusterConfig, token: str) -> str:
    """The script. `token` names this submission: in the job's comment, and in the canary file."""
    env = step_environment(cluster, job, token=token)
    name = container_name(cluster, job, token) if len(job.steps) > 1 else ""
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    environment.filters["q"] = lambda value: shlex.quote(str(value))
    environment.filters |= {"lines": _lines, "join_quoted": shlex.join}
    return environment.from_string(TEMPLATE.read_text()).render(
        job=job,
        directives=_directives(job, launcher, cluster, token),
        env=env,
        exit_stopped=EXIT_STOPPED,
        cancelled_file=cancelled_file(job),
        max_requeues=launcher.max_requeues,
        remove_container=removal_of(name, job.num_nodes) if name else (),
        setup=cluster.setup,
        signal_seconds=launcher.signal_seconds,
        steps=[
            step_command(s, job, rank_idiom=launcher.rank_idiom, cluster=cluster, env=env, container_name=name)
            for s in job.steps
        ],
    )


def _directives(
    job: Job, launcher: SlurmSettings, cluster: ClusterConfig, token: str
) -> list[tuple[str, str | int | None]]:
    asked = resources(cluster, job)
    time = asked.time or cluster.time
    if seconds_of(time) <= launcher.signal_seconds:
        raise ConfigError(
            f"the time limit {time!r} of {job.name}: it is not above launcher.signal_seconds={launcher.signal_seconds},"
            f" so the job would be told to stop at once. Raise cluster.{job.role}.time or lower "
            "launcher.signal_seconds."
        )
    num_tasks_per_node = job.num_ranks_per_node if launcher.rank_idiom == "srun" else 1
    options: dict[str, str | int | None] = {
        "job-name": f"{job.log_dir.parent.name}.{job.name}".replace(" ", "_"),
        "comment": f"nemo_srl:{token}",
        "nodes": job.num_nodes,
        "ntasks-per-node": num_tasks_per_node,
        "time": time,
        "output": _output(job),
        "open-mode": "append",
        "signal": f"B:USR1@{launcher.signal_seconds}",
        "requeue": None,
    }
    for key, value in (
        ("account", cluster.account),
        ("partition", asked.partition),
        ("cpus-per-task", asked.cpus_per_task),
        ("gpus-per-node", gpus_per_node(cluster, job)),
    ):
        if value is not None:
            options[key] = value
    if asked.cpus_per_task is not None and launcher.rank_idiom == "torchrun":
        options["cpus-per-task"] = asked.cpus_per_task * job.num_ranks_per_node
    if cluster.exclusive:
        options["exclusive"] = None
        if not {"mem", "mem-per-cpu", "mem-per-gpu"} & asked.sbatch.keys():
            options["mem"] = 0  # all of the node's; without it, Slurm gives its default, which may be 4 GB per core
    return list((options | asked.sbatch).items())


def _output(job: Job) -> str:
    path = str(job.log_dir / f"{job.name}.log")
    if '"' in path or "\\" in path:
        raise ConfigError(f"run_dir: {path!r} has a quote or backslash, which sbatch cannot take. Rename it.")
    return '"' + path.replace("%", "%%") + '"'


def seconds_of(time: str) -> int:
    """The seconds of a time limit in Slurm's forms: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S. Raises `ConfigError`."""
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return 10**9
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time)
    if found is None:
        raise ConfigError(f"the time limit {time!r} of the cluster: use one of Slurm's forms, such as 04:00:00 or 2-00")
    days, a, b, c = (int(x) if x is not None else None for x in found.groups())
    assert a is not None
    if days is not None:
        return days * 86400 + a * 3600 + (b or 0) * 60 + (c or 0)
    if c is not None:
        return a * 3600 + (b or 0) * 60 + c
    return a * 60 + (b or 0)


def _lines(words: Iterable[str]) -> str:
    """A command over several lines."""
    return " \\\n  ".join(shlex.quote(w) for w in words)
