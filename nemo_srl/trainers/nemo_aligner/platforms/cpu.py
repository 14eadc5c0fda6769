"""NeMo-Aligner on a machine without CUDA.

Its training code itself is plain PyTorch. `install` makes two replacements, once per process and before NeMo is
imported. With them the code runs unchanged on CPUs with gloo:

1. The CPU takes the place of PyTorch's CUDA: devices, streams, random states, autocast.
2. `stand_ins.py` takes the place of Transformer Engine and Apex, and writes the checkpoints.

The replacements are global and stay until the process ends. Not possible here: Apex's optimizers, packed sequences,
context parallelism, fp8.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo  # it builds a table of torch functions, some of which are replaced below
from omegaconf import DictConfig
from torch.distributed import distributed_c10d
from torch.overrides import TorchFunctionMode

from nemo_srl.trainers.nemo_aligner.platforms import functions, products, stand_ins

_CPU = torch.device("cpu")
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def tune(work_dir: Path) -> str:
    """Choose the library for matrix products."""
    return products.choose(work_dir)


def install() -> None:
    """Prepare this process so that NeMo-Aligner can train in it. Call it before NeMo or megatron-core is imported."""
    stand_ins.prepare_environment()
    keep_freed_memory()
    _replace_cuda_functions()
    _map_autocast()
    gather_without_gloo_if_alone()
    mode: Any = _CudaToCpu()
    mode.__enter__()  # never left: torch keeps it on its stack of modes
    stand_ins.install()
    _replace_megatron_functions()


def adapt_plan(cfg: DictConfig) -> None:
    """Change those settings of a plan that name hardware: the accelerator, and kernels that are not there."""
    cfg.trainer.accelerator = "cpu"
    # There are no tensor cores to fill. Sequence parallelism cuts sequences into equal parts.
    cfg.model.data.pad_length_to_multiple_of = (
        cfg.model.tensor_model_parallel_size if cfg.model.sequence_parallel else 1
    )
    cfg.model.data.share_beginnings = True
    stand_ins.adapt_plan(cfg)


def _is_cuda(device: object) -> bool:
    """Whether `device` names a CUDA device: an index, "cuda:0" or a torch.device."""
    if isinstance(device, bool):
        return False
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, int) or (isinstance(device, str) and device.startswith("cuda"))


class _CudaToCpu(TorchFunctionMode):
    """Replaces CUDA devices in the arguments of every torch call: `.cuda()`, `.to("cuda")`, `device=0`, pinning."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.Tensor.cuda, torch.Tensor.pin_memory):
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # NeMo sorts gradients into buckets by names such as "torch.cuda.FloatTensor".
            return func(args[0]).replace("torch.", "torch.cuda.", 1)
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        if func is torch.Tensor.to:
            args = (args[0], *(_CPU if not isinstance(a, int) and _is_cuda(a) else a for a in args[1:]))
        if func is torch.autograd.backward and kwargs["grad_tensors"] is not None:
            # Of a layer that is computed again. The mode is off within this call, so it is entered once more, and the
            # engine is called directly, as megatron-core's schedules do.
            with self:
                gradients = tuple(kwargs["grad_tensors"])
                return torch.autograd.graph._engine_run_backward(
                    args[0], gradients, False, False, (), allow_unreachable=True, accumulate_grad=True
                )
        return func(*args, **kwargs)


class _Nothing:
    """A CUDA stream or event: every method exists and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return _nothing


def _nothing(*args: object, **kwargs: object) -> None:
    return None


def keep_freed_memory() -> None:
    """Let the C library keep the memory that is freed, and use it again.

    glibc gives large blocks back to the kernel as soon as they are freed. Every operation on a large tensor then gets
    new pages, which the kernel fills with zeros first. This took up to a third of a training's time in a virtual
    machine. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)  # take large blocks from the heap, too: what is freed there can be kept
        mallopt(_M_TRIM_THRESHOLD, -1)  # and never give the end of the heap back


def _replace_cuda_functions() -> None:
    cuda: Any = torch.cuda
    for name in ("set_device", "synchronize", "empty_cache", "set_stream", "_lazy_init"):
        setattr(cuda, name, _nothing)
    cuda.current_device = lambda: 0
    # It must be above 0. Otherwise NeMo would not seed megatron-core's random state tracker.
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    for name in ("memory_allocated", "max_memory_allocated", "max_memory_reserved"):
        setattr(cuda, name, lambda *args, **kwargs: 0)
    cuda.manual_seed = torch.manual_seed
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    cuda.Stream = cuda.Event = cuda.current_stream = cuda.default_stream = _Nothing
    cuda.stream = lambda stream: contextlib.nullcontext()
    for name in ("FloatTensor", "IntTensor", "HalfTensor", "BFloat16Tensor"):
        setattr(cuda, name, getattr(torch, name))
    module: Any = torch.nn.Module
    module.cuda = lambda self, *args, **kwargs: self
    # megatron-core compiles small fused functions at import. Here that takes more time than it saves.
    patched: Any = torch
    patched.compile = lambda function=None, *args, **kwargs: function if callable(function) else lambda f: f


def _map_autocast() -> None:
    """Turn autocast for "cuda" into autocast for "cpu", in forward passes and in autograd functions.

    megatron-core's linear layers save by `custom_fwd` whether autocast was on, and restore that in their backward pass.
    They ask for CUDA's state. Without this the backward pass would mix dtypes.
    """
    original = torch.autocast

    class CpuAutocast(original):  # type: ignore[misc, valid-type]
        def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
            super().__init__("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    def mapped(decorator: Callable[..., Any]) -> Callable[..., Any]:
        def decorate(function: Any = None, *, device_type: str, **kwargs: Any) -> Any:
            return decorator(function, device_type="cpu" if device_type == "cuda" else device_type, **kwargs)

        return decorate

    patched: Any = torch
    patched.autocast = CpuAutocast
    patched.amp.custom_fwd = mapped(torch.amp.custom_fwd)
    patched.amp.custom_bwd = mapped(torch.amp.custom_bwd)


def _replace_megatron_functions() -> None:
    import megatron.core.distributed.param_and_grad_buffer as buffers
    import megatron.core.fusions.fused_bias_swiglu as swiglu
    import megatron.core.models.common.embeddings.rope_utils as rope
    import megatron.core.tensor_parallel.layers as layers
    import megatron.core.tensor_parallel.random as random

    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    swiglu.SwiGLUFunction = functions.SwiGLU
    rope._apply_rotary_pos_emb_bshd = functions.with_fast_rotary(rope._apply_rotary_pos_emb_bshd)
    layers.F = SimpleNamespace(embedding=functions.embedding)  # the only function that it takes from there
    buffers.dist_all_gather_func = skip_if_alone(buffers.dist_all_gather_func)
    buffers.dist_reduce_scatter_func = skip_if_alone(buffers.dist_reduce_scatter_func)


def gather_without_gloo_if_alone() -> None:
    """Let a group of one rank copy what it gathers in the thread that asks.

    gloo copies in a thread of its own. From 32,768 elements on, PyTorch copies in parallel, so this thread gets OpenMP
    threads as well, and keeps them. The names in the checkpoint of a 135M model are that long. Then OpenMP has more
    threads than there are cores, and lets them sleep after each operation instead of waiting for the next one. On two
    cores, every parallel operation of a training took 40 microseconds longer.
    """
    original = distributed_c10d.all_gather

    def all_gather(
        tensor_list: list[torch.Tensor], tensor: torch.Tensor, group: Any = None, async_op: bool = False
    ) -> Any:
        if async_op or distributed_c10d.get_world_size(group) != 1:
            return original(tensor_list, tensor, group, async_op)
        tensor_list[0].copy_(tensor)
        return None

    for module in (torch.distributed, distributed_c10d):
        module.all_gather = all_gather  # type: ignore[attr-defined]


def skip_if_alone(collective: Callable[..., Any]) -> Callable[..., Any]:
    """A gather or a mean over ranks that does nothing for a group of one rank. gloo copies the whole buffer there."""

    def call(output: torch.Tensor, input: torch.Tensor, *, group: Any, **kwargs: Any) -> Any:
        if group.size() > 1:
            return collective(output, input, group=group, **kwargs)
        output.copy_(input)  # megatron-core passes two views of the same memory, and torch copies nothing then
        return None

    return call
