"""Shows whether a cluster can run a recipe: the list of checks, in the order of what they need.

Each check runs small jobs through the recipe's own launcher, in the containers of its roles. A check that fails, or
that cannot run, does not end the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from nemo_srl.doctor import images, memory, ports, probe, serving, stopping, storage, training, versions
from nemo_srl.doctor.findings import Finding, collected
from nemo_srl.doctor.site import Site
from nemo_srl.errors import JobFailedError
from nemo_srl.launchers import launcher_backend
from nemo_srl.protocols import JobRole, JobStep


@dataclass(frozen=True, kw_only=True)
class Check:
    """A check of a cluster. If `run` raises, `tried` and `remedy` complete the finding."""

    name: str
    tried: str
    run: Callable[[Site], Iterable[Finding]]
    remedy: str = "The end of the log above says where it failed."


NO_JOB = (
    "No job of this role can run. If Slurm refused it: cluster.account, cluster.partition and cluster.gpus_per_node. "
    "If its container did not start: cluster.ROLE.container must be an image that the nodes can read. If a module is "
    "missing: use the image of containers/. If a node does not see a file: work_dir and run_dir must be on shared "
    "storage."
)


def _facts_check(role: JobRole) -> Check:
    tried = f"a job in the role {role} with a probe on each node"
    return Check(name=f"job.{role}", tried=tried, run=partial(_probe, role=role), remedy=NO_JOB.replace("ROLE", role))


def _of_facts(name: str, role: JobRole, judge: Callable[[Site, list[dict[str, Any]]], Iterable[Finding]]) -> Check:
    def run(site: Site) -> Iterable[Finding]:
        if role not in site.facts:
            raise JobFailedError(f"not found out, because job.{role} failed")
        return judge(site, site.facts[role])

    return Check(name=name, tried=f"what the probe of job.{role} found", run=run, remedy=f"First correct job.{role}.")


def _probe(site: Site, role: JobRole) -> Iterator[Finding]:
    """Run the probes on the nodes of a role, and keep the facts. Only trainers probe the storage and the ports."""
    directory = site.directory / f"probe-{role}"
    directory.mkdir(parents=True)
    num_nodes = site.trainer_nodes if role == "trainer" else site.engine_nodes
    site.write(
        f"{directory.name}/asked.json",
        {
            "probes": list(probe.PROBES if role == "trainer" else probe.PROBES[:2]),
            "versions": versions.asked(site, role),
            "storage": {"num_bytes": storage.NUM_BYTES},
        },
    )
    step = JobStep(name="probe", command=["-m", "nemo_srl.doctor.probe", str(directory)], distributed=True)
    job = site.job(f"probe-{role}", [step], role=role, num_nodes=num_nodes,
                   num_gpus_per_node=memory.num_gpus(site, role))  # fmt: skip
    tried = f"a job in the role {role} with a probe on {num_nodes} node(s)"
    with storage.held(directory):
        site.run(job)
    site.facts[role] = [site.read(f"{directory.name}/facts-{node}.json") for node in range(num_nodes)]
    hosts = ", ".join(str(facts["host"]) for facts in site.facts[role])
    yield Finding(name=f"job.{role}", ok=True, text=f"ran on {hosts}", tried=tried)


CHECKS: tuple[Check, ...] = (
    _facts_check("trainer"),
    _of_facts("versions.trainer", "trainer", lambda site, facts: versions.judge(site, "trainer", facts)),
    _of_facts("memory.trainer", "trainer", lambda site, facts: memory.judge(site, "trainer", facts)),
    _of_facts("storage", "trainer", storage.judge),
    _of_facts("ports", "trainer", ports.judge),
    _facts_check("engine"),
    _of_facts("versions.engine", "engine", lambda site, facts: versions.judge(site, "engine", facts)),
    _of_facts("memory.engine", "engine", lambda site, facts: memory.judge(site, "engine", facts)),
    Check(name="conversion", tried=f"{images.TESTS} in the trainer's container", run=images.check_conversion),
    Check(name="sft", tried="a tiny SFT", run=partial(training.check, algorithm="sft"), remedy=training.REMEDY),
    Check(name="dpo", tried="a tiny DPO", run=partial(training.check, algorithm="dpo"), remedy=training.REMEDY),
    Check(name="stopping", tried="a stop request", run=stopping.check, remedy=stopping.REMEDY),
    Check(name="contract", tried="the record of TensorRT-LLM's names", run=images.check_contract),
    Check(name="serving", tried="a server on a tiny model", run=serving.check, remedy=serving.REMEDY_START),
)


def examine(site: Site, checks: Iterable[Check] = CHECKS) -> Iterator[Finding]:
    """Yield the findings of each check as soon as they are known."""
    for check in checks:
        yield from collected(check.name, partial(check.run, site), tried=check.tried, remedy=check.remedy)


def check_launcher(site: Site) -> None:
    """Raise `ConfigError` before anything starts, for what the launcher cannot run."""
    num_nodes = {"trainer.num_nodes": site.trainer_nodes, "engine.num_nodes": site.engine_nodes}
    launcher_backend(site.cfg.launcher).check(num_nodes)
