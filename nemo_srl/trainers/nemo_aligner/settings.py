"""The settings of the trainer `nemo_aligner`."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_srl.config.check import check
from nemo_srl.config.training import OptimConfig
from nemo_srl.processor import has_bf16_units, is_gpu
from nemo_srl.trainers.nemo_aligner.platforms import (
    PLATFORMS,
    check_context_parallel,
    check_offload,
    check_tensor_overlap,
)


@dataclass
class NemoAlignerSettings:
    name: str = "nemo_aligner"
    precision: str = "bf16"
    """bf16: products in bfloat16 over float32 weights (NeMo's autocast); bf16-O2: Megatron's bfloat16
    weights with float32 masters in the distributed optimizer; 32: float32 throughout; auto: bf16 on a CPU with units
    for bfloat16, else 32. On a GPU too, where a small model gains little by bf16. The machine of the orchestrator
    decides, and run directories hold what was decided."""
    platform: str = "auto"
    """cpu; cuda: NVIDIA GPUs with pip packages alone; ngc: with Transformer Engine and Apex; auto: what is there."""
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    context_parallel_size: int = 1
    """Ranks that share each sequence, for sequences that are too long for one. Only with the platform `ngc`: it needs
    Transformer Engine's attention."""
    virtual_pipeline_model_parallel_size: int = 1
    """Refused above 1: NeMo-Aligner cannot train with it. And megatron-core 0.11's default communication between stages
    (`batch_p2p_comm`) gave wrong gradients with virtual stages when it was tried, without an error."""
    sequence_parallel: bool = False
    micro_batch_size: int = 1
    """Rows, or pairs, that a rank has in the model at a time. If it has fewer in a step, these are one micro-batch."""
    num_nodes: int = 1
    devices: int | None = None
    """Ranks per node; null: just enough for one model replica (tensor x pipeline x context / num_nodes)."""
    overlap_grad_reduce: bool = False
    """true: add up gradients over the data-parallel ranks while the backward pass still computes others."""
    overlap_param_gather: bool = False
    """true: fetch the weights that other data-parallel ranks have updated while the next forward pass already begins.
    Needs `overlap_grad_reduce`."""
    ub_tp_comm_overlap: bool = False
    """true: exchange activations between tensor-parallel ranks while the matrix products still compute, in Transformer
    Engine's user buffers. These have one size, so every sequence is padded to `max_seq_length`. It pays only if most
    rows are nearly that long. Needs the platform `ngc` and `sequence_parallel`. GPUs without multicast (before Hopper)
    need the environment variable UB_SKIPMC=1. It was never run on a GPU here."""
    recompute_granularity: str = "none"
    """none; full: only the input of each layer is kept. The layer is computed again in the backward pass (Chen et al.
    2016, arXiv 1604.06174), so a step takes a third longer; selective: only attention is computed again (Korthikanti et
    al. 2022, arXiv 2205.05198). Attention kernels do this anyway. It saves memory only with `attention_dropout` on the
    platforms `cpu` and `cuda`, which have no kernel for that. The result is the same."""
    lora_rank: int = 0
    """Above 0: LoRA (Hu et al. 2021, arXiv 2106.09685). The model's weights stay as they are. Each linear layer of the
    attention and of the feed-forward gets an adapter of this rank, and only adapters are trained. They are added to the
    weights when the model is exported. LoRA needs higher learning rates than a training of all weights."""
    lora_alpha: float = 32.0
    """The output of an adapter is multiplied by lora_alpha / lora_rank."""
    frozen_share: float = 0.0
    """Above 0: the embedding and this share of the layers, the first ones, keep their weights (Lee et al. 2019, arXiv
    1911.03090). Their number is rounded down. They need no backward pass, no gradients and no moments of Adam. Not with
    LoRA, pipeline parallelism or `recompute_granularity` full."""
    optimizer_cpu_offload: bool = False
    """true: Adam's two moments stay in the host's memory, and visit the GPU one parameter at a time in each step. This
    frees 8 bytes of GPU memory a parameter (over the data-parallel ranks). The result is the same. It costs two
    transfers a step, and up to 16 bytes a parameter of the host's memory. Not with the platform `ngc`."""

    def __post_init__(self) -> None:
        sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
        for key in (*sizes, "micro_batch_size", "num_nodes"):
            check(getattr(self, key) >= 1, f"trainer.{key}", getattr(self, key), "must be at least 1")
        self._check_communication()
        known = ("none", "selective", "full")
        check(
            self.recompute_granularity in known,
            "trainer.recompute_granularity",
            self.recompute_granularity,
            f"must be one of {known}",
        )
        check(self.lora_rank >= 0, "trainer.lora_rank", self.lora_rank, "must be at least 0; 0 trains all weights")
        reason = "must be at least 0, which trains all layers, and below 1, so that there is something to train"
        check(0 <= self.frozen_share < 1, "trainer.frozen_share", self.frozen_share, reason)
        check(self.lora_alpha > 0, "trainer.lora_alpha", self.lora_alpha, "must be above 0")
        precisions = ("bf16", "bf16-O2", "32", "auto")
        check(self.precision in precisions, "trainer.precision", self.precision, f"must be one of {precisions}")
        platforms = ("auto", *PLATFORMS)
        check(self.platform in platforms, "trainer.platform", self.platform, f"must be one of {platforms}")
        if self.precision == "auto":
            self.precision = "bf16" if not is_gpu(self.platform) and has_bf16_units() else "32"
        check_offload(self.optimizer_cpu_offload, self.platform)
        check_context_parallel(self.context_parallel_size, self.platform)
        check_tensor_overlap(self.ub_tp_comm_overlap, self.platform)
        of_replica = self._ranks_of_replica
        check(
            self.world_size % of_replica == 0,
            "trainer.devices",
            self.devices,
            f"num_nodes x devices = {self.world_size} ranks must be a multiple of tensor x pipeline x context = "
            f"{of_replica}",
        )

    def _check_communication(self) -> None:
        chunks, key = self.virtual_pipeline_model_parallel_size, "trainer.virtual_pipeline_model_parallel_size"
        reason = (
            "NeMo-Aligner gives one stream of rows to a pipeline stage, and with virtual stages each of them needs its "
            "own. Set it to 1. More micro-batches (a larger global_batch_size) also make the pipeline's bubble smaller."
        )
        check(chunks == 1, key, chunks, reason)
        self._check_user_buffers()
        reason = "needs trainer.overlap_grad_reduce=true, too"
        fits = self.overlap_grad_reduce or not self.overlap_param_gather
        check(fits, "trainer.overlap_param_gather", self.overlap_param_gather, reason)

    def _check_user_buffers(self) -> None:
        overlaps, key = self.ub_tp_comm_overlap, "trainer.ub_tp_comm_overlap"
        reason = (
            "it overlaps what sequence parallelism sends, and NeMo turns it off without that. Set "
            "trainer.sequence_parallel=true with trainer.tensor_model_parallel_size above 1, or set it to false."
        )
        fits = self.sequence_parallel and self.tensor_model_parallel_size > 1
        check(fits or not overlaps, key, overlaps, reason)
        reason = (
            "Transformer Engine's buffers hold bfloat16, and trainer.precision=32 sends float32. Set "
            "trainer.precision=bf16-O2, or set it to false."
        )
        check(self.precision != "32" or not overlaps, key, overlaps, reason)
        ranks, tp = self.num_ranks_per_node, self.tensor_model_parallel_size
        reason = (
            f"its buffers are shared inside a node, and trainer.tensor_model_parallel_size={tp} does not divide the "
            f"{ranks} ranks of a node. Use a tensor-parallel size that does, or set it to false."
        )
        check(ranks % tp == 0 or not overlaps, key, overlaps, reason)

    def num_frozen_layers(self, num_layers: int) -> int:
        """Of a model with `num_layers`, how many keep their weights."""
        return int(self.frozen_share * num_layers + 1e-6)  # 0.29 x 100 is 28.999999999999996

    @property
    def num_ranks_per_node(self) -> int:
        if self.devices is not None:
            return self.devices
        return max(1, self._ranks_of_replica // self.num_nodes)

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.num_ranks_per_node

    @property
    def data_parallel_size(self) -> int:
        """Replicas of the model. Ranks that share sequences belong to one."""
        return self.world_size // self._ranks_of_replica

    @property
    def _ranks_of_replica(self) -> int:
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size

    def rows_at_a_time(self, optim: OptimConfig) -> int:
        """`micro_batch_size`, or all rows of a rank in a step if these are fewer."""
        return max(1, min(self.micro_batch_size, optim.global_batch_size // self.data_parallel_size))

    def num_micro_batches(self, optim: OptimConfig) -> int:
        """Of one rank in one step."""
        return optim.global_batch_size // (self.rows_at_a_time(optim) * self.data_parallel_size)

    def pipeline_efficiency(self, optim: OptimConfig) -> float:
        """The share of the time in which a pipeline stage works: m / (m + p - 1) for m micro-batches and p stages.

        Source: Narayanan et al. 2021, arXiv 2104.04473, section 2.2.1.
        """
        m = self.num_micro_batches(optim)
        return m / (m + self.pipeline_model_parallel_size - 1)
