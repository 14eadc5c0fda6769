"""Whether GPUs and host memory are as large as the plan of the recipe needs (`estimates.py`, `recipes/plan.py`)."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_srl.doctor.findings import Finding, not_checked
from nemo_srl.doctor.probe import Node
from nemo_srl.protocols import JobRole

if TYPE_CHECKING:
    from nemo_srl.doctor.site import Site
    from nemo_srl.models.spec import ModelSpec

MAX_USED_GB = 2.0
"""A GPU on which something else has more memory than this is not free."""


def probe(node: Node) -> dict[str, Any]:
    """GB of each GPU, of the host, and of what Slurm leaves this job. Cores that this process may use."""
    return {
        "gpus": _gpus(),
        "host_gb": _meminfo("MemTotal"),
        "available_gb": _meminfo("MemAvailable"),
        "limit_gb": job_limit_gb(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup")),
        "cores": len(os.sched_getaffinity(0)),
    }


def judge(site: Site, role: JobRole, nodes: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """Findings for the GPUs and the host's memory of each node."""
    for facts in nodes:
        found = facts["memory"]
        if "error" in found:
            yield Finding(name=f"memory.{role}", ok=False, text=f"{facts['host']}: {found['error']}")
            continue
        yield _of_gpus(site, role, facts["host"], found["gpus"])
        yield _of_host(site, role, facts["host"], found)


def num_gpus(site: Site, role: JobRole) -> int:
    """GPUs of a node that the recipe uses in this role."""
    if role == "trainer":
        return int(site.cfg.trainer.num_ranks_per_node)
    return site.engine_size.num_gpus // site.engine_size.num_nodes


def needed_gb(site: Site, role: JobRole, gpu_gb: float) -> tuple[float, str]:
    """GB on one GPU by the plan, and for what."""
    from nemo_srl import estimates
    from nemo_srl.trainers import trainer_backend

    spec, cfg = shape(site), site.cfg
    if role == "trainer":
        memory = trainer_backend(cfg.trainer).memory
        found = {key: memory(optim, cfg.trainer, spec).total for key, optim in (("sft", cfg.sft), ("dpo", cfg.dpo))}
        most = max(found, key=lambda key: found[key])
        return found[most] / 1e9, most
    e = estimates.engine_memory(cfg, spec, replace(site.assumptions, gpu_memory_gb=gpu_gb))
    # Without room for one sequence, no GPU of this size is large enough.
    return (e.total / 1e9 if e.num_sequences else float("inf")), "the engine"


def shape(site: Site) -> ModelSpec:
    """The shape of the recipe's model, from its directory, or from recipes/shapes/ if that is not there yet."""
    from nemo_srl import models
    from nemo_srl.doctor.site import PROJECT_ROOT
    from nemo_srl.models.hf import read_shape

    model, name = site.cfg.model, Path(site.cfg.model.path).name.lower()
    known = {p.name.lower(): p for p in (PROJECT_ROOT / "recipes" / "shapes").glob("*")}
    if not Path(model.path).is_dir() and name in known:
        return read_shape(known[name])
    return read_shape(models.resolve(model.path, Path(model.cache_dir).expanduser()))


def _of_gpus(site: Site, role: JobRole, host: str, gpus: Sequence[Mapping[str, Any]]) -> Finding:
    name, wanted = f"gpus.{role}", num_gpus(site, role)
    tried = f"nvidia-smi in the {role}'s container, against the plan"
    if not wanted:
        return not_checked(name, f"{host}: the recipe's {role} uses no GPU of the cluster", tried=tried)
    if not gpus:
        if site.cfg.cluster.gpus_per_node or getattr(site.cfg.trainer, "platform", "") in ("cuda", "ngc"):
            remedy = "Give the jobs GPUs: cluster.gpus_per_node, and the container's runtime (enroot's NVIDIA hook)."
            return Finding(name=name, ok=False, text=f"{host}: no GPU is visible", tried=tried, remedy=remedy)
        return not_checked(name, f"{host}: there are no GPUs, and the recipe asks Slurm for none", tried=tried)
    least = min(float(gpu["total_gb"]) for gpu in gpus)
    needed, what = needed_gb(site, role, least)
    text = f"{host}: {len(gpus)} x {gpus[0]['name']}, {least:.1f} GB; {what} needs {needed:.1f} GB of each by the plan"
    remedies = []
    if len(gpus) < wanted:
        remedies.append(f"The recipe uses {wanted} on a node. Lower {_sizes(role)}, or ask for more.")
    if needed > least:
        remedies.append(f"The memory is too small. Raise the parallel sizes ({_sizes(role)}). See recipes/plan.py.")
    if busy := [gpu for gpu in gpus if float(gpu["used_gb"]) > MAX_USED_GB]:
        remedies.append(
            f"{len(busy)} of them are in use ({busy[0]['used_gb']:.1f} GB). End the programs that nvidia-smi lists."
        )
    return Finding(name=name, ok=not remedies, text=text, tried=tried, remedy=" ".join(remedies))


def _of_host(site: Site, role: JobRole, host: str, found: Mapping[str, Any]) -> Finding:
    limit = found["limit_gb"]
    usable = min(found["host_gb"], limit or float("inf"))
    needed = _host_gb(site) if role == "trainer" else 0.0
    text = f"{host}: {found['host_gb']:.0f} GB, {found['cores']} cores"
    text += f", of which the job may use {limit:.0f} GB" if limit and limit < found["host_gb"] else ""
    text += f"; a training needs at least {needed:.1f} GB on a node by the plan" if needed else ""
    remedy = ""
    if needed > usable:
        remedy = (
            f"Ask for the node's whole memory: cluster.{role}.sbatch.mem=0." if needed <= found["host_gb"] else
            "Use more nodes, or set trainer.optimizer_cpu_offload=false."
        )  # fmt: skip
    tried = "/proc/meminfo and the cgroup of the job, against the plan"
    return Finding(name=f"host.{role}", ok=not remedy, text=text, tried=tried, remedy=remedy)


def _host_gb(site: Site) -> float:
    """GB of a node's memory that a training needs at least."""
    from nemo_srl import estimates

    return estimates.host_bytes(site.cfg, shape(site)) / 1e9


def _sizes(role: JobRole) -> str:
    if role == "trainer":
        return "trainer.devices, trainer.tensor_model_parallel_size, trainer.pipeline_model_parallel_size"
    return "engine.num_replicas, engine.tensor_parallel_size"


def _gpus() -> list[dict[str, Any]]:
    if not shutil.which("nvidia-smi"):
        return []
    command = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(command, text=True, capture_output=True, timeout=60)
    if done.returncode:
        raise RuntimeError(f"nvidia-smi fails: {done.stdout}{done.stderr}. Install or restart the NVIDIA driver.")
    rows = [line.split(", ") for line in done.stdout.strip().splitlines()]
    mebibyte = 1024**2 / 1e9
    return [{"name": n, "total_gb": float(t) * mebibyte, "used_gb": float(u) * mebibyte} for n, t, u in rows]


def _meminfo(key: str) -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024 / 1e9
    raise RuntimeError(f"/proc/meminfo has no {key}")


def job_limit_gb(memberships: str, root: Path) -> float | None:
    """The lowest memory limit of a process's control group and those above it. None: there is no limit.

    `memberships` is the text of /proc/self/cgroup, and `root` the place of the control groups. Both versions of control
    groups are known.
    """
    limits = []
    for line in memberships.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        base, file = (root, "memory.max") if not controllers else (root / "memory", "memory.limit_in_bytes")
        place = base / path.lstrip("/")
        for directory in (place, *place.parents):
            if directory == base.parent:
                break
            text = (directory / file).read_text().strip() if (directory / file).is_file() else "max"
            # The first version writes a number near 2**63 for no limit.
            if text != "max" and int(text) < 1 << 60:
                limits.append(int(text) / 1e9)
    return min(limits, default=None)
