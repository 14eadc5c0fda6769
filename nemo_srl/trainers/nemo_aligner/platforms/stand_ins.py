"""What takes the place of Transformer Engine and Apex, on CPUs and on GPUs without them.

NeMo 2.2.1 and megatron-core 0.11.0 are written for NVIDIA's containers. Plain PyTorch (`modules.py`, `adam.py`) takes
the place of the layers and of Adam. The names of parameters are the same, so that configurations and checkpoints are
the same on every platform. The training process writes checkpoints itself instead of forked processes.
"""

from __future__ import annotations

import importlib
import os
import queue
import sys
import types
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig

_ENVIRONMENT = {
    # megatron-core requires it with tensor parallelism. It orders CUDA kernels and has no effect on CPUs.
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    # NeMo configures nvFuser by this version, and takes an unset one for a new one.
    "NVIDIA_PYTORCH_VERSION": "24.07",
}


def prepare_environment() -> None:
    """Set what NeMo and megatron-core read at import. Call it before they are imported."""
    assert "megatron.core" not in sys.modules, "megatron-core was imported before the platform was installed"
    for key, value in _ENVIRONMENT.items():
        os.environ.setdefault(key, value)


def install() -> None:
    _install_transformer_engine()
    _install_adam()
    restore_numpy_product()
    write_checkpoints_in_process()
    _replace_nemo_guards()


def adapt_plan(cfg: DictConfig) -> None:
    """Turn off the kernels of Transformer Engine and Apex in a plan, and tell Adam where its moments stay."""
    from nemo_srl.trainers.nemo_aligner.platforms.adam import FusedAdam

    FusedAdam.cpu_offload = cfg.model.optim.get("optimizer_cpu_offload", False)
    cfg.model.masked_softmax_fusion = False
    cfg.model.apply_rope_fusion = False
    cfg.model.gradient_accumulation_fusion = False


def restore_numpy_product() -> None:
    """megatron-core counts a tensor's elements by `np.product` when it writes checkpoints. numpy 2 has `np.prod`."""
    vars(np).setdefault("product", np.prod)


def _install_transformer_engine() -> None:
    """Put our modules where megatron-core looks for its Transformer Engine extension."""
    import megatron.core.extensions as extensions
    import megatron.core.utils as megatron_utils
    from packaging.version import Version

    # The version in NeMo-Aligner 0.7.0's own container. It decides which arguments megatron-core passes.
    megatron_utils._te_version = Version("1.11.0")
    from nemo_srl.trainers.nemo_aligner.platforms import modules

    name = "megatron.core.extensions.transformer_engine"
    stand_in: Any = types.ModuleType(name)
    stand_in.__all__ = []
    for exported, value in modules.transformer_engine_extension().items():
        setattr(stand_in, exported, value)
    sys.modules[name] = stand_in
    extensions.transformer_engine = stand_in


def _install_adam() -> None:
    """Let megatron-core find an Adam whose state it can put into a checkpoint.

    Without Apex and Transformer Engine it takes torch's Adam. That has a step count per parameter, which the
    distributed optimizer cannot put into a checkpoint. One of the ways in which this fails gives no error.
    """
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.clip_grads as clip_grads
    import megatron.core.optimizer.distrib_optimizer as distributed_optimizer

    from nemo_srl.trainers.nemo_aligner.platforms.adam import FusedAdam

    optimizer.Adam = distributed_optimizer.Adam = FusedAdam
    distributed_optimizer.HAVE_APEX_OR_TE = True
    clip_grads.multi_tensor_scale_impl = scale_in_place


def scale_in_place(chunk_size: int, overflow: Any, tensor_lists: list[list[Any]], scale: float) -> None:
    """`multi_tensor_scale` for clipping, which passes the same gradients twice: the source and the target."""
    torch._foreach_mul_(tensor_lists[1], scale)


def write_checkpoints_in_process() -> None:
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
    gpt_model.get_gpt_full_te_layer_autocast_spec = lambda *args, **kwargs: None
