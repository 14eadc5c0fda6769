"""Whether each container has the packages that the recipe needs."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from nemo_srl.doctor.findings import Finding
from nemo_srl.doctor.probe import Node
from nemo_srl.protocols import JobRole

if TYPE_CHECKING:
    from nemo_srl.doctor.site import Site

SHOWN = {
    "trainer": ("torch", "transformer-engine", "apex", "nemo-toolkit", "nemo-aligner", "megatron-core", "transformers"),
    "engine": ("torch", "transformers"),
}
"""Packages whose versions are shown, by role."""
OF_ENGINES = {"trtllm": ("tensorrt-llm", "1.2"), "vllm": ("vllm", "")}
"""By engine: its package, and how its version must begin. TensorRT-LLM stays at 1.2.1 until 1.3 is stable: in the image
of 1.3.0rc27, `trtllm-serve` does not start its workers (containers/README.md)."""
MODULES = {
    "trainer": ("nemo_srl.worker", "nemo_srl.experiment", "nemo_srl.stages.pairs"),
    "engine": ("nemo_srl.worker", "nemo_srl.launchers.with_services", "nemo_srl.stages.judgements"),
}
"""Modules of this project whose imports need all packages of a role."""
IMAGES = {"trainer": "containers/nemo.Dockerfile", "engine": "containers/trtllm.Dockerfile"}


def asked(site: Site, role: JobRole) -> dict[str, Any]:
    """What `probe` needs to know."""
    name = site.cfg.engine.name
    packages = [*SHOWN[role], *([OF_ENGINES[name][0]] if role == "engine" and name in OF_ENGINES else [])]
    command = getattr(site.cfg.engine, "command", [])
    needs_program = role == "engine" and command and not getattr(site.cfg.engine, "in_process", False)
    return {
        "packages": packages,
        "modules": list(MODULES[role]),
        "program": command[0] if needs_program else None,
        "trainer": asdict(site.cfg.trainer) if role == "trainer" else None,
    }


def probe(node: Node) -> dict[str, Any]:
    """Versions, the trainer's own description of its platform, and what cannot be imported."""
    given = node.asked["versions"]
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: installed(name) for name in given["packages"]},
        "missing_modules": {name: problem for name in given["modules"] if (problem := _problem(name))},
        "program": [given["program"], shutil.which(given["program"])] if given["program"] else None,
        "home": _home(os.environ),
    }
    if given["trainer"] is not None:
        found["platform"] = _platform(given["trainer"])
    return found


def judge(site: Site, role: JobRole, nodes: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """A finding for all nodes if they agree, and otherwise one for each kind of node."""
    kinds: dict[str, tuple[str, str]] = {}
    for facts in nodes:
        text, remedy = _of_node(site, role, facts)
        kinds.setdefault(text, ("", remedy))
        kinds[text] = (f"{kinds[text][0]} {facts['host']}".strip(), remedy)
    for text, (hosts, remedy) in kinds.items():
        tried = f"the packages of the {role}'s container, as each node sees them"
        yield Finding(name=f"versions.{role}", ok=not remedy, text=f"{hosts}: {text}", tried=tried, remedy=remedy)


def installed(package: str) -> str | None:
    """The version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _of_node(site: Site, role: JobRole, facts: Mapping[str, Any]) -> tuple[str, str]:
    """What was found on a node, and what to set. Nothing to set: all is well."""
    found = facts["versions"]
    if "error" in found:
        return found["error"], f"Use the image of {IMAGES[role]}, or install the packages of requirements.lock."
    packages: dict[str, str | None] = found["packages"]
    shown = ", ".join(f"{name} {number or 'absent'}" for name, number in packages.items())
    remedies = [_missing(found, role), _of_gpu_stack(site, role, facts), _of_engine(site, role, packages)]
    if found["home"]:
        remedies.append(f"{found['home']} Set cluster.env.HOME to a directory on the nodes, such as /tmp.")
    if problem := found.get("platform", {}).get("error"):
        remedies.append(problem)
    text = f"python {found['python']}, {shown}"
    if described := found.get("platform", {}).get("text"):
        text += f"; {described}"
    return text, " ".join(filter(None, remedies))


def _missing(found: Mapping[str, Any], role: JobRole) -> str:
    remedies = []
    if found["packages"]["torch"] is None:
        remedies.append(f"torch is absent. Use the image of {IMAGES[role]}: cluster.{role}.container=...")
    if found["missing_modules"]:
        problems = "; ".join(f"{name}: {problem}" for name, problem in found["missing_modules"].items())
        remedies.append(f"Cannot be imported: {problems}. Build the image of {IMAGES[role]} again.")
    if found["program"] and found["program"][1] is None:
        name = found["program"][0]
        remedies.append(f"There is no program {name!r} on PATH. Set engine.command, or cluster.engine.container.")
    return " ".join(remedies)


def _of_gpu_stack(site: Site, role: JobRole, facts: Mapping[str, Any]) -> str:
    """Transformer Engine and Apex, where the recipe means to use them."""
    wanted = getattr(site.cfg.trainer, "platform", None)
    has_gpus = bool(facts.get("memory", {}).get("gpus"))
    if role != "trainer" or not (wanted == "ngc" or (wanted == "auto" and has_gpus)):
        return ""
    packages = facts["versions"]["packages"]
    absent = [name for name in ("transformer-engine", "apex") if packages[name] is None]
    if not absent:
        return ""
    return (
        f"{' and '.join(absent)} {'is' if len(absent) == 1 else 'are'} absent, and trainer.platform={wanted} on GPUs "
        f"should use them. Use the image of {IMAGES[role]}, or set trainer.platform=cuda, which needs neither."
    )


def _of_engine(site: Site, role: JobRole, packages: Mapping[str, str | None]) -> str:
    """The engine's own package. vLLM may live in an environment of its own, and then its program counts."""
    name = site.cfg.engine.name
    if role != "engine" or name != "trtllm":
        return ""
    package, begin = OF_ENGINES[name]
    number = packages[package]
    if number is None:
        return f"{package} is absent. Use the image of {IMAGES[role]}: cluster.engine.container=..."
    if not re.match(rf"{re.escape(begin)}(\.|$)", number):
        return f"{package} {number} is another version than {begin}. Use the image of {IMAGES[role]}."
    return ""


def _problem(module: str) -> str:
    try:
        importlib.import_module(module)
    except ImportError as e:
        return str(e)
    return ""


def _platform(trainer: Mapping[str, Any]) -> dict[str, str]:
    """What the trainer says of this node."""
    from nemo_srl import registry
    from nemo_srl.errors import NemoSrlError
    from nemo_srl.trainers import trainer_backend

    try:
        settings = registry.load("trainers", trainer["name"]).settings(**trainer)
        return {"text": trainer_backend(settings).describe(settings)}
    except NemoSrlError as e:
        return {"error": str(e)}


def _home(environ: Mapping[str, str]) -> str:
    """What is wrong with HOME, where programs keep caches. Empty if nothing."""
    home = environ.get("HOME", "")
    if home and os.path.isdir(home) and os.access(home, os.W_OK):
        return ""
    return f"HOME={home!r} is not a directory that can be written to."
