"""NeMo-Aligner on a machine without CUDA. No other module of the trainer contains code for such a machine.

NeMo 2.2.1 and megatron-core 0.11.0 are written for NVIDIA GPUs with Transformer Engine and Apex. Their training code
itself is plain PyTorch. `install` makes three replacements, once per process and before NeMo is imported. With them
the code runs unchanged on CPUs with gloo:

1. The CPU takes the place of PyTorch's CUDA: devices, streams, random states, autocast.
2. Plain PyTorch modules (`cpu_modules.py`) take the place of Transformer Engine and Apex. They have the same parameter
   names, so that configurations and checkpoints are the same on both platforms.
3. The training process writes checkpoints itself instead of forked processes.

With CUDA this module is never imported. The replacements are global and stay until the process ends. Not possible
here: Apex's optimizers, packed sequences, context parallelism, fp8.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch._dynamo  # it builds a table of torch functions, some of which are replaced below
from omegaconf import DictConfig
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")
_ENVIRONMENT = {
    # megatron-core requires it with tensor parallelism. It orders CUDA kernels and has no effect here.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # NeMo configures nvFuser by this version, and takes an unset one for a new one.
    "NVIDIA_PYTORCH_VERSION": "24.07",
}


def install() -> None:
    """Prepare this process so that NeMo-Aligner can train in it. Call it before NeMo or megatron-core is imported."""
    assert "megatron.core" not in sys.modules, "megatron-core was imported before the CPU platform"
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    _prefer_onednn()
    _replace_cuda_functions()
    _map_autocast()
    mode: Any = _CudaToCpu()
    mode.__enter__()  # never left: torch keeps it on its stack of modes
    _install_transformer_engine()
    _replace_megatron_functions()
    _write_checkpoints_in_process()
    _replace_nemo_guards()


def adapt_plan(cfg: DictConfig) -> None:
    """Change those settings of a plan that name hardware: the accelerator, and kernels that only CUDA has."""
    cfg.trainer.accelerator = "cpu"
    cfg.model.masked_softmax_fusion = False
    cfg.model.apply_rope_fusion = False
    cfg.model.gradient_accumulation_fusion = False


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
        return func(*args, **kwargs)


class _Nothing:
    """A CUDA stream or event: every method exists and does nothing."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return _nothing


def _nothing(*args: object, **kwargs: object) -> None:
    return None


def _prefer_onednn() -> None:
    """Let oneDNN instead of MKL multiply float32 matrices. The result is the same, and on AMD it is twice as fast.

    torch takes oneDNN only when it is allowed to lower the precision. On most processors oneDNN computes in float32 all
    the same. On one where it does lower the precision (AMX), the test below notices it and takes this back.
    """
    torch.set_float32_matmul_precision("medium")
    just_above_one = torch.full((64, 64), 1 + 2**-20)  # rounds to 1 in bfloat16 and TF32
    if not torch.equal(just_above_one @ torch.eye(64), just_above_one):
        torch.set_float32_matmul_precision("highest")


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


def _install_transformer_engine() -> None:
    """Put our modules where megatron-core looks for its Transformer Engine extension."""
    import megatron.core.extensions as extensions
    import megatron.core.utils as megatron_utils
    from packaging.version import Version

    # The version in NeMo-Aligner 0.7.0's own container. It decides which arguments megatron-core passes.
    megatron_utils._te_version = Version("1.11.0")
    from nemo_srl.trainers.nemo_aligner import cpu_modules

    name = "megatron.core.extensions.transformer_engine"
    stand_in: Any = types.ModuleType(name)
    stand_in.__all__ = []
    for exported, value in cpu_modules.transformer_engine_extension().items():
        setattr(stand_in, exported, value)
    sys.modules[name] = stand_in
    extensions.transformer_engine = stand_in


def _replace_megatron_functions() -> None:
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed_optimizer
    import megatron.core.tensor_parallel.random as random

    from nemo_srl.trainers.nemo_aligner.cpu_modules import FusedAdam

    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    # Without Apex and Transformer Engine megatron-core takes torch's Adam. That has a step count per parameter, which
    # the distributed optimizer cannot put into a checkpoint. One of the ways in which this fails gives no error.
    optimizer.Adam = distributed_optimizer.Adam = FusedAdam
    distributed_optimizer.HAVE_APEX_OR_TE = True
    # megatron-core counts a tensor's elements by `np.product` when it writes checkpoints. numpy 2 has only `np.prod`.
    vars(np).setdefault("product", np.prod)


def _write_checkpoints_in_process() -> None:
    """Write a checkpoint's files in the training process, one after the other.

    megatron-core forks a process that forks writers. That deadlocks when OpenMP threads run in the parent. It collects
    their results through a spawned manager, which imports the whole program again and takes seconds.
    """
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem
    import torch.distributed.checkpoint.filesystem as torch_filesystem
    from megatron.core.dist_checkpointing.strategies.base import AsyncSaveShardedStrategy

    transforms = torch_filesystem._StorageWriterTransforms()
    serialization = torch_filesystem.SerializationFormat.TORCH_SAVE
    results: queue.Queue[dict[int, list[Any]]] = queue.Queue()

    def write(buckets: list[Any], results_queue: queue.Queue[dict[int, list[Any]]]) -> None:
        written: dict[int, list[Any]] = {}
        for index, (path, storage_key, (bytes_data, tensor_data)) in enumerate(buckets):
            with open(path, "wb") as stream:
                written[index] = [
                    torch_filesystem._write_item(transforms, stream, data, item, storage_key, serialization)
                    for item, data in (*bytes_data, *tensor_data)
                ]
                os.fsync(stream.fileno())
        results_queue.put(written)

    def save(self: Any, sharded_state_dict: Any, checkpoint_dir: Any) -> None:
        self.async_save(sharded_state_dict, checkpoint_dir).execute_sync()

    AsyncSaveShardedStrategy.save = save
    filesystem.FileSystemWriterAsync.write_preloaded_data_multiproc = staticmethod(write)
    filesystem._get_write_results_queue = lambda: results


def _replace_nemo_guards() -> None:
    """Put back the names that NeMo replaces by None or by placeholders when it finds no Apex."""
    import nemo.collections.nlp.parts.nlp_overrides as overrides
    from megatron.core.tensor_parallel.layers import set_defaults_if_not_set_tensor_model_parallel_attributes
    from nemo.core.optim.mcore_optim import McoreDistributedOptimizer

    from nemo_srl.trainers.nemo_aligner import cpu_modules

    overrides.HAVE_APEX = True
    overrides.McoreDistributedOptimizer = McoreDistributedOptimizer
    overrides.MegatronDistributedFusedAdam = type("MegatronDistributedFusedAdam", (), {})

    megatron = "nemo.collections.nlp.modules.common.megatron"
    build_model: Any = importlib.import_module(f"{megatron}.build_model")
    build_model.set_defaults_if_not_set_tensor_model_parallel_attributes = (
        set_defaults_if_not_set_tensor_model_parallel_attributes
    )
    utils: Any = importlib.import_module(f"{megatron}.utils")
    utils.listify_model = lambda model: model if isinstance(model, list) else [model]
    for name in ("FusedLayerNorm", "FastLayerNorm", "MixedFusedRMSNorm"):
        setattr(utils, name, type(name, (), {}))
    gpt_model: Any = importlib.import_module("nemo.collections.nlp.models.language_modeling.megatron_gpt_model")
    # It would build a layer of the real Transformer Engine, for a spec that is never used.
    gpt_model.get_gpt_full_te_layer_autocast_spec = _nothing
    aligner: Any = importlib.import_module("nemo_aligner.utils.distributed")
    aligner.DistributedLogprob = cpu_modules.DistributedLogprob
