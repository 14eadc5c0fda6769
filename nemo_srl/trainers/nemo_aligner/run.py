"""One rank of a training: builds NeMo-Aligner's model, data and loop from the plan and runs them to the end.

Follows NeMo-Aligner 0.7.0's `examples/nlp/gpt/train_gpt_{sft,dpo}.py` step by step, without Hydra and with
our own datasets and metrics. Goes on from the last checkpoint in the work directory, if there is one.

The environment tells the rank: torchrun's variables (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or
Slurm's with one task per rank (SLURM_PROCID and others; MASTER_ADDR must then be set). Without either there is one
rank. Raises `ConfigError` when the number of ranks is not the planned one.
"""

from __future__ import annotations

import functools
import os
import sys
import warnings
from pathlib import Path
from typing import Any

from nemo_srl.errors import ConfigError, NemoSrlError
from nemo_srl.trainers.nemo_aligner import platforms
from nemo_srl.trainers.nemo_aligner.settings import NemoAlignerSettings
from nemo_srl.trainers.nemo_aligner.versions import check_versions

ATTENTION_VARIABLES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


def train(work_dir: Path, settings: NemoAlignerSettings) -> None:
    """Train what `prepare` wrote into `work_dir`. Called on every rank."""
    adopt_rank_environment(os.environ)
    forget_attention_choice(os.environ)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # checkpoints are written by forked processes
    if not sys.warnoptions:
        # NeMo makes hundreds of warnings, of deprecations and of missing optional packages. Errors stay errors.
        warnings.simplefilter("ignore")
    name, description = choose_platform(settings)
    platform = platforms.load(name)
    details = platform.tune(work_dir)
    if os.environ["RANK"] == "0":
        print(*filter(None, (description, details)), sep="\n", file=sys.stderr, flush=True)
    platform.install()
    import torch

    from nemo_srl.trainers.nemo_aligner.session import run_session

    try:
        run_session(work_dir, adapt_plan=platform.adapt_plan)
    except torch.OutOfMemoryError as e:
        raise NemoSrlError(out_of_memory(settings, *torch.cuda.mem_get_info(), torch.cuda.memory_reserved())) from e


def forget_attention_choice(environ: dict[str, str] | os._Environ[str]) -> None:
    """Remove what a site or an image says about the attention of Transformer Engine.

    megatron-core sets these variables itself. It ends with an assertion when one of them has another value
    (`LanguageModule._set_attention_backend`).
    """
    found = [f"{name}={environ.pop(name)}" for name in ATTENTION_VARIABLES if name in environ]
    if found and environ["RANK"] == "0":
        print(f"{', '.join(found)}: not used, since megatron-core chooses the attention", file=sys.stderr, flush=True)


def choose_platform(settings: NemoAlignerSettings) -> tuple[str, str]:
    """The platform's name, and a line that describes it. Raises `ConfigError` if a training could not run here."""
    packages = check_versions()
    if settings.platform == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # read when PyTorch first looks for GPUs
    machine = platforms.this_machine()
    name = platforms.choose(settings.platform, machine)
    platforms.check_precision(settings.precision, name, machine)
    platforms.check_offload(settings.optimizer_cpu_offload, name)
    platforms.check_context_parallel(settings.context_parallel_size, name)
    platforms.check_tensor_overlap(settings.ub_tp_comm_overlap, name)
    return name, platforms.describe(name, machine, packages)


def out_of_memory(settings: NemoAlignerSettings, free: int, total: int, reserved: int) -> str:
    """What to say when a GPU is full. Bytes: `free` and `total` of the GPU, and `reserved` by this process."""
    others = total - free - reserved
    lines = [
        f"trainer.micro_batch_size={settings.micro_batch_size}: the GPU's memory is full. This process has "
        f"{reserved / 1e9:.1f} of {total / 1e9:.1f} GB."
    ]
    if others > 1e9:
        lines.append(
            f"Other processes have {others / 1e9:.1f} GB of the same GPU: nvidia-smi lists them. End them first."
        )
    if settings.micro_batch_size > 1:
        lines.append("Lower trainer.micro_batch_size.")
    if not settings.optimizer_cpu_offload and settings.platform != "ngc":
        lines.append("Set trainer.optimizer_cpu_offload=true, unless the platform is ngc.")
    lines.append(
        "Or divide the model over more GPUs: raise trainer.tensor_model_parallel_size. `python recipes/plan.py` says "
        "how much memory a training needs."
    )
    return " ".join(lines)


def adopt_rank_environment(environ: dict[str, str] | os._Environ[str]) -> None:
    """Put torchrun's variables into `environ`, whoever started this process.

    Otherwise Lightning would guess among several launchers. Inside a Slurm allocation, for example, it would take
    Slurm's variables although torchrun started the process.
    """
    if "RANK" not in environ:
        if int(environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in environ:
            if "MASTER_ADDR" not in environ:
                raise ConfigError(
                    "MASTER_ADDR: it is not set, and under srun nothing else tells the ranks where to meet. Export "
                    "it in the batch script, for example the first host of SLURM_JOB_NODELIST."
                )
            environ["RANK"], environ["WORLD_SIZE"] = environ["SLURM_PROCID"], environ["SLURM_NTASKS"]
            environ["LOCAL_RANK"] = environ["SLURM_LOCALID"]
            environ["LOCAL_WORLD_SIZE"] = environ.get("SLURM_NTASKS_PER_NODE", "1")
            environ.setdefault("MASTER_PORT", "29500")
        else:
            environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
            environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_own_store().port)}
    environ.setdefault("TORCHELASTIC_RUN_ID", "nemo_srl")  # makes Lightning read the variables above
    environ.setdefault("GROUP_RANK", str(int(environ["RANK"]) // int(environ.get("LOCAL_WORLD_SIZE", "1"))))


@functools.cache
def _own_store() -> Any:
    """The store where a lone rank meets itself.

    It listens from now on. A port that is only looked up here can be taken before torch.distributed listens at it, as
    NeMo's imports last seconds. Being multi-tenant lets torch.distributed join this one.
    """
    import torch.distributed

    store = torch.distributed.TCPStore  # type: ignore[attr-defined]  # public, but not in __all__
    return store("127.0.0.1", 0, world_size=1, is_master=True, multi_tenant=True)
