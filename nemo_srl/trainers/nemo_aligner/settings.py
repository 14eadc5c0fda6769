"""The settings of the trainer `nemo_aligner`."""

from __future__ import annotations

from dataclasses import dataclass

from nemo_srl.config.check import check
from nemo_srl.config.training import OptimConfig
from nemo_srl.trainers.nemo_aligner.platforms import PLATFORMS, check_offload


@dataclass
class NemoAlignerSettings:
    name: str = "nemo_aligner"
    precision: str = "bf16"
    """bf16: products in bfloat16 over float32 weights (NeMo's autocast); bf16-O2: Megatron's bfloat16
    weights with float32 masters in the distributed optimizer; 32: float32 throughout."""
    platform: str = "auto"
    """cpu; cuda: NVIDIA GPUs with pip packages alone; ngc: with Transformer Engine and Apex; auto: what is there."""
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    sequence_parallel: bool = False
    micro_batch_size: int = 1
    num_nodes: int = 1
    devices: int | None = None
    """Ranks per node; null: just enough for one model replica (tensor x pipeline / num_nodes)."""
    lora_rank: int = 0
    """Above 0: LoRA (Hu et al. 2021, arXiv 2106.09685). The model's weights stay as they are. Each linear layer of the
    attention and of the feed-forward gets an adapter of this rank, and only adapters are trained. They are added to the
    weights when the model is exported. LoRA needs higher learning rates than a training of all weights."""
    lora_alpha: float = 32.0
    """The output of an adapter is multiplied by lora_alpha / lora_rank."""
    optimizer_cpu_offload: bool = False
    """true: Adam's two moments stay in the host's memory, and visit the GPU one parameter at a time in each step. This
    frees 8 bytes of GPU memory a parameter (over the data-parallel ranks). The result is the same. It costs two
    transfers a step, and up to 16 bytes a parameter of the host's memory. Not with the platform `ngc`."""

    def __post_init__(self) -> None:
        for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "micro_batch_size", "num_nodes"):
            check(getattr(self, key) >= 1, f"trainer.{key}", getattr(self, key), "must be at least 1")
        check(self.lora_rank >= 0, "trainer.lora_rank", self.lora_rank, "must be at least 0; 0 trains all weights")
        check(self.lora_alpha > 0, "trainer.lora_alpha", self.lora_alpha, "must be above 0")
        known = ("bf16", "bf16-O2", "32")
        check(self.precision in known, "trainer.precision", self.precision, f"must be one of {known}")
        platforms = ("auto", *PLATFORMS)
        check(self.platform in platforms, "trainer.platform", self.platform, f"must be one of {platforms}")
        check_offload(self.optimizer_cpu_offload, self.platform)
        model_parallel = self.tensor_model_parallel_size * self.pipeline_model_parallel_size
        check(
            self.world_size % model_parallel == 0,
            "trainer.devices",
            self.devices,
            f"num_nodes x devices = {self.world_size} ranks must be a multiple of tensor x pipeline = {model_parallel}",
        )

    @property
    def num_ranks_per_node(self) -> int:
        if self.devices is not None:
            return self.devices
        return max(1, self.tensor_model_parallel_size * self.pipeline_model_parallel_size // self.num_nodes)

    @property
    def world_size(self) -> int:
        return self.num_nodes * self.num_ranks_per_node

    @property
    def data_parallel_size(self) -> int:
        return self.world_size // (self.tensor_model_parallel_size * self.pipeline_model_parallel_size)

    def num_micro_batches(self, optim: OptimConfig) -> int:
        """Of one rank in one step."""
        return optim.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    def pipeline_efficiency(self, optim: OptimConfig) -> float:
        """The share of the time in which a pipeline stage works: m / (m + p - 1) for m micro-batches and p stages.

        Source: Narayanan et al. 2021, arXiv 2104.04473, section 2.2.1.
        """
        m = self.num_micro_batches(optim)
        return m / (m + self.pipeline_model_parallel_size - 1)
