"""What a training runs on. A platform prepares the process before NeMo is imported, and adapts the plan.

cpu    no GPU: gloo, plain PyTorch modules, and the CPU in the place of PyTorch's CUDA
cuda   NVIDIA GPUs with pip packages alone: NCCL and plain PyTorch modules
ngc    NVIDIA GPUs with Transformer Engine and Apex, as in NVIDIA's containers

The weights, the names of parameters and the checkpoints are the same on all of them. `stand_ins.py`, `modules.py` and
`adam.py` are what the first two share. `functions.py`, `attention.py` and `products.py` make the first one fast. A
platform that was not chosen is never imported.
"""

from __future__ import annotations

import importlib
import os
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Protocol

from omegaconf import DictConfig

from nemo_srl.errors import ConfigError

PLATFORMS = ("cpu", "cuda", "ngc")
_SETTING = "trainer.platform"


class Platform(Protocol):
    """A module of this package."""

    def tune(self, work_dir: Path) -> str:
        """Choose what depends on this very machine, before `install`. Returns a line for the log, "" for none."""

    def install(self) -> None:
        """Prepare this process. Call it once, before NeMo or megatron-core is imported."""

    def adapt_plan(self, cfg: DictConfig) -> None:
        """Change what `training_plan.py` planned for GPUs with Transformer Engine."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What decides the platform."""

    gpus: tuple[str, ...] = ()
    """The names of the GPUs that PyTorch can use."""
    compute_capability: tuple[int, int] = (0, 0)
    torch: str = ""
    """PyTorch's version."""
    torch_cuda: str | None = None
    """The version of CUDA that PyTorch was built for. None for a CPU build."""
    has_driver: bool = False
    transformer_engine: str | None = None
    apex: str | None = None


def this_machine() -> Machine:
    import torch

    has_cuda = torch.cuda.is_available()
    return Machine(
        gpus=tuple(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) if has_cuda else (),
        compute_capability=torch.cuda.get_device_capability() if has_cuda else (0, 0),
        torch=torch.__version__,
        torch_cuda=torch.version.cuda,
        has_driver=shutil.which("nvidia-smi") is not None,
        transformer_engine=_installed("transformer-engine"),
        apex=_installed("apex"),
    )


def choose(wanted: str, machine: Machine) -> str:
    """The platform for `trainer.platform`, which is "auto" or a name. Raises `ConfigError` if it cannot work here."""
    if wanted == "cpu" or (wanted == "auto" and not machine.gpus):
        return "cpu"
    if not machine.gpus:
        raise ConfigError(f"{_SETTING}={wanted!r}: {why_no_gpu(machine)} Or set {_SETTING}=cpu.")
    extras = {"Transformer Engine": machine.transformer_engine, "Apex": machine.apex}
    missing = [name for name, found in extras.items() if found is None]
    if wanted == "cuda" or (wanted == "auto" and len(missing) == 2):
        return "cuda"
    if missing:
        found = [f" {name} {number} is installed." for name, number in extras.items() if number]
        raise ConfigError(
            f"{_SETTING}={wanted!r}:{''.join(found)} {' and '.join(missing)} {'is' if found else 'are'} not installed. "
            f"NeMo needs both of them or none. Install both, or set {_SETTING}=cuda, which uses neither."
        )
    return "ngc"


def why_no_gpu(machine: Machine) -> str:
    """Why PyTorch sees no GPU, and what helps."""
    if machine.gpus:
        return f"{_SETTING}=cpu was asked for."
    if machine.torch_cuda is None:
        return f"torch {machine.torch} is a CPU build. Install the CUDA build: make TORCH=cuda install."
    if not machine.has_driver:
        return "there is no NVIDIA driver (no nvidia-smi). Install the driver."
    return (
        f"torch {machine.torch} finds no usable GPU. CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')!r}. "
        f"Unset it if it is empty. nvidia-smi shows whether the driver is new enough for CUDA {machine.torch_cuda}."
    )


def check_precision(precision: str, platform: str, machine: Machine) -> None:
    """Raise `ConfigError` if the GPU cannot compute in bfloat16. GPUs can from compute capability 8.0 on (Ampere)."""
    if platform != "cpu" and precision != "32" and machine.compute_capability < (8, 0):
        major, minor = machine.compute_capability
        raise ConfigError(
            f"trainer.precision={precision!r}: {machine.gpus[0]} has compute capability {major}.{minor}, and bfloat16 "
            "needs 8.0. Set trainer.precision=32."
        )


def check_offload(optimizer_cpu_offload: bool, platform: str) -> None:
    """Raise `ConfigError` if the platform's Adam cannot keep its moments in the host's memory."""
    if optimizer_cpu_offload and platform == "ngc":
        raise ConfigError(
            "trainer.optimizer_cpu_offload=True: the platform ngc has the Adam of NVIDIA's packages. Its moments stay "
            f"on the GPU. Set it to false, or set {_SETTING}=cuda, which works in NVIDIA's containers, too."
        )


def check_context_parallel(context_parallel_size: int, platform: str) -> None:
    """Raise `ConfigError` if the platform's attention sees only the part of a sequence that its own rank has."""
    if context_parallel_size > 1 and platform in ("cpu", "cuda"):
        raise ConfigError(
            f"trainer.context_parallel_size={context_parallel_size}: the platform {platform} has no attention over "
            "several ranks. Transformer Engine has one. Set it to 1, or use the image of containers/nemo.Dockerfile "
            f"with {_SETTING}=ngc."
        )


def check_tensor_overlap(ub_tp_comm_overlap: bool, platform: str) -> None:
    """Raise `ConfigError` if the platform's linear layers have no buffers that they share with other ranks."""
    if ub_tp_comm_overlap and platform in ("cpu", "cuda"):
        raise ConfigError(
            f"trainer.ub_tp_comm_overlap=True: the platform {platform} has no user buffers. Transformer Engine has "
            f"them. Set it to false, or use the image of containers/nemo.Dockerfile with {_SETTING}=ngc."
        )


def describe(platform: str, machine: Machine, packages: dict[str, str]) -> str:
    """One line for the log: the platform, its GPUs and the versions of its packages."""
    gpus = f"{len(machine.gpus)} x {machine.gpus[0]}" if machine.gpus and platform != "cpu" else "CPU"
    found = {"torch": machine.torch, **packages}
    if platform == "ngc":
        found |= {"transformer-engine": str(machine.transformer_engine), "apex": str(machine.apex)}
    line = f"platform {platform}: {gpus}; " + ", ".join(f"{name} {number}" for name, number in found.items())
    if platform == "cpu" and machine.has_driver:
        line += f". This machine has an NVIDIA driver, but {why_no_gpu(machine)}"
    return line


def load(name: str) -> Platform:
    """The platform of this name."""
    module: Platform = importlib.import_module(f"{__name__}.{name}")
    return module


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
