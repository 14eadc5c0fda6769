"""How much memory and disk a Megatron training needs. Arithmetic only: no torch, no files.

Sources of the formulas, named where they are used:
  [D] Megatron-Core's developer guide, "Distributed Optimizer": bytes per parameter by data-parallel size
  [K] Korthikanti et al. 2022, arXiv 2205.05198, sections 4.1 to 4.3: activations with tensor and sequence parallelism
  [N] Narayanan et al. 2021, arXiv 2104.04473, section 2.2: micro-batches in a pipeline

[K] counts a GPT layer with a feed-forward of 4h and GELU. Here the same count is made for Llama's SwiGLU, for
grouped queries, and for an attention that keeps no scores (FlashAttention), so that recomputing it alone saves nothing.
Estimates are for a full micro-batch of the greatest length. Not covered: fp8, and what autocast keeps (precision
"bf16").
"""

from __future__ import annotations

from nemo_srl.config.training import DPOConfig, OptimConfig
from nemo_srl.models.arithmetic import num_parameters, parameters_per_layer
from nemo_srl.models.spec import ModelSpec
from nemo_srl.trainers import TrainingMemory
from nemo_srl.trainers.nemo_aligner.settings import NemoAlignerSettings

OVERHEAD_BYTES = 6e9
"""CUDA context, NCCL's buffers, workspaces and fragmentation, as is usual on an H100 with 8-way tensor parallelism."""
ONE_GPU_OVERHEAD_BYTES = 1.5e9
"""The same for a training on a single GPU, where NCCL has nobody to talk to: about half of it is the CUDA context, and
the rest is for workspaces and fragmentation. An assumption; it was not measured."""


def training_memory(optim: OptimConfig, trainer: NemoAlignerSettings, spec: ModelSpec) -> TrainingMemory:
    """Bytes on the fullest rank. Of a pipeline's stages, the first one keeps one micro-batch for every stage [N]. The
    last one keeps a single micro-batch, and its logits.
    """
    tp, pp = trainer.tensor_model_parallel_size, trainer.pipeline_model_parallel_size
    # A pair is two sequences in one forward pass.
    num_tokens = trainer.rows_at_a_time(optim) * optim.max_seq_length * (2 if isinstance(optim, DPOConfig) else 1)
    num_tokens //= trainer.context_parallel_size
    per_layer = activation_bytes_per_layer(spec, trainer, num_tokens=num_tokens, dropout=optim.hidden_dropout > 0)
    per_layer += unrotated_bytes_per_layer(spec, trainer, num_tokens=num_tokens)
    full = trainer.recompute_granularity == "full"
    kept = input_bytes_per_layer(spec, trainer, num_tokens=num_tokens) if full else per_layer
    kept *= spec.num_layers / pp - trainer.num_frozen_layers(spec.num_layers)
    recomputed = recomputed_bytes(spec, trainer, num_tokens=num_tokens, per_layer=per_layer) if full else 0.0
    logits = logits_bytes(trainer, spec, num_tokens=num_tokens)
    in_first = kept * min(pp, trainer.num_micro_batches(optim))
    first_is_fuller = pp > 1 and in_first + recomputed > kept + max(logits, recomputed)
    # The fullest rank is in the first or the last stage, with the embedding or the output layer. A single stage has
    # both. With tied embeddings, the last of several stages keeps a copy.
    table = spec.vocab_size * spec.hidden_size
    embedding = table * (1 if spec.tie_word_embeddings or pp > 1 else 2)
    parameters = (spec.num_layers / pp * parameters_per_layer(spec) + embedding) / tp
    weights, optimizer, host = bytes_per_parameter(trainer)
    fixed, largest = 0.0, table / tp
    if trainer.lora_rank:
        fixed = parameters
        parameters = spec.num_layers / pp * adapter_parameters_per_layer(spec, trainer.lora_rank) / tp
        largest = trainer.lora_rank * 2 * spec.ffn_hidden_size / tp
    elif trainer.num_frozen_layers(spec.num_layers):
        fixed = frozen_parameters(trainer, spec) / tp
        parameters -= fixed
        if spec.tie_word_embeddings:
            largest = 2 * spec.hidden_size * spec.ffn_hidden_size / tp
    overhead = OVERHEAD_BYTES if trainer.world_size > 1 else ONE_GPU_OVERHEAD_BYTES
    return TrainingMemory(
        weights_and_gradients=fixed * (2.0 if trainer.precision == "bf16-O2" else 4.0) + parameters * weights,
        optimizer=parameters * optimizer,
        activations=in_first if first_is_fuller else kept,
        recomputed=recomputed,
        logits=0.0 if first_is_fuller else logits,
        # The largest parameter: megatron-core's copy of its clipped gradient, or both of its moments on their visit.
        step=largest / optimizer_ranks(trainer) * (8 if trainer.optimizer_cpu_offload else 4),
        overhead=overhead + user_buffers_bytes(trainer, spec, num_tokens=num_tokens),
        host=parameters * host,
    )


def step_passes(trainer: NemoAlignerSettings, spec: ModelSpec) -> float:
    """A training step in forward passes: the backward pass has two products for each one of the forward pass [N, 2.2].

    With LoRA it has only the one for the gradient of the input. Adapters are so small that they are neglected. Frozen
    layers have none. Recomputation repeats the forward pass; that of attention alone is neglected.
    """
    backward = 1.0 if trainer.lora_rank else 2.0 * (1 - trainer.num_frozen_layers(spec.num_layers) / spec.num_layers)
    return 1.0 + backward + (trainer.recompute_granularity == "full")


def frozen_parameters(trainer: NemoAlignerSettings, spec: ModelSpec) -> int:
    """Of `trainer.frozen_share`: those layers and the embedding."""
    number = trainer.num_frozen_layers(spec.num_layers)
    if not number:
        return 0
    return number * parameters_per_layer(spec) + spec.vocab_size * spec.hidden_size


def adapter_parameters_per_layer(spec: ModelSpec, rank: int) -> int:
    """LoRA: two matrices of this rank for each linear layer of NeMo's (`nemo_srl/models/lora.py`)."""
    h, f, q = spec.hidden_size, spec.ffn_hidden_size, spec.num_attention_heads * spec.head_dim
    qkv = q + 2 * spec.num_query_groups * spec.head_dim
    return rank * ((h + qkv) + (q + h) + (h + 2 * f) + (f + h))


def bytes_per_parameter(trainer: NemoAlignerSettings) -> tuple[float, float, float]:
    """(weights and gradients, optimizer on the GPU, optimizer on the host) of the distributed optimizer [D]."""
    d = optimizer_ranks(trainer)
    weights, optimizer = (6.0, 12.0 / d) if trainer.precision == "bf16-O2" else (8.0, 8.0 / d)
    host = 8.0 / d if trainer.optimizer_cpu_offload else 0.0
    return weights, optimizer - host, host


def optimizer_ranks(trainer: NemoAlignerSettings) -> int:
    """Ranks with the same weights. They share the optimizer."""
    return trainer.data_parallel_size * trainer.context_parallel_size


def activation_bytes_per_layer(
    spec: ModelSpec, trainer: NemoAlignerSettings, *, num_tokens: int, dropout: bool
) -> float:
    """What one layer keeps for the backward pass of `num_tokens` tokens on one rank, two bytes an element [K, 4.2].

    Tensor parallelism divides queries, keys, values, the attention's output (its log-sum-exp is neglected), gate, up
    and their product. The inputs of both norms, of the attention and of the feed-forward, and the masks of the
    dropouts (one byte) are whole on every rank, unless sequence parallelism divides them too.
    """
    tp = trainer.tensor_model_parallel_size
    size = _bytes_per_element(trainer)
    heads = spec.num_attention_heads + spec.num_query_groups
    divided = size * (2 * heads * spec.head_dim + 3 * spec.ffn_hidden_size)
    whole = size * 4 * spec.hidden_size + (2 * spec.hidden_size if dropout else 0)
    return num_tokens * (divided / tp + whole / (tp if trainer.sequence_parallel else 1))


def input_bytes_per_layer(spec: ModelSpec, trainer: NemoAlignerSettings, *, num_tokens: int) -> float:
    """All that a layer keeps if it is computed again in the backward pass [K, 5]."""
    whole = num_tokens * _bytes_per_element(trainer) * spec.hidden_size
    return whole / (trainer.tensor_model_parallel_size if trainer.sequence_parallel else 1)


def recomputed_bytes(spec: ModelSpec, trainer: NemoAlignerSettings, *, num_tokens: int, per_layer: float) -> float:
    """What exists at the peak of a layer's backward pass beside the inputs of all layers, if it is computed again.

    `per_layer` is what the layer keeps, with its input. megatron-core's `CheckpointFunction` holds the layer's output
    and the gradient of it the whole time. The peak is in the feed-forward, at one of these moments:

    - Product of gate and up: both, and the gradients of all three. The product itself is gone.
    - Down projection: gate, up, their product and its gradient, and the gradient of the weights.
    - Gate and up projection: their gradients, that of the input, and that of the weights. With sequence parallelism,
      these two work on all tokens: one on the gradient of the output, the other one on its input, too.
    - With LoRA, in the forward pass: `MCoreMLPMixin` of NeMo 2.2.1 holds gate and up three times until the layer ends:
      of the weights, of the adapter, and added up. Adapters are so small that gradients of weights are neglected.
    """
    tp, sharded = trainer.tensor_model_parallel_size, trainer.sequence_parallel
    size = _bytes_per_element(trainer)
    unit, all_tokens = num_tokens * size * spec.ffn_hidden_size / tp, num_tokens * size * spec.hidden_size
    own_input = input_bytes_per_layer(spec, trainer, num_tokens=num_tokens)
    attention = per_layer - 3 * unit - own_input
    if trainer.lora_rank:
        feed_forward = 7 * unit
    else:
        weights = size * spec.hidden_size * spec.ffn_hidden_size / tp
        down = 4 * unit + weights + (all_tokens if sharded else 0)
        gate_up = 2 * unit + 2 * weights + (2 if sharded else 1) * all_tokens
        feed_forward = max(5 * unit, down, gate_up)
    return attention + 2 * own_input + feed_forward + _gradient_of_tied_embedding(spec, trainer)


def _gradient_of_tied_embedding(spec: ModelSpec, trainer: NemoAlignerSettings) -> float:
    """Autograd holds the output layer's gradient until the embedding's is there, at the end of the backward pass."""
    alone = spec.tie_word_embeddings and trainer.pipeline_model_parallel_size == 1 and not trainer.lora_rank
    gradient = _bytes_per_element(trainer) * spec.vocab_size * spec.hidden_size / trainer.tensor_model_parallel_size
    return gradient if alone else 0.0


def unrotated_bytes_per_layer(spec: ModelSpec, trainer: NemoAlignerSettings, *, num_tokens: int) -> float:
    """What the rotary embedding adds to [K]: queries and keys before their rotation.

    Only norms of queries and keys need them, but they are one tensor with the values, which the attention keeps.
    Cosines and sines are neglected: a layer has four numbers of them for each position and each element of a head.
    """
    heads = spec.num_attention_heads + spec.num_query_groups
    return num_tokens * _bytes_per_element(trainer) * heads * spec.head_dim / trainer.tensor_model_parallel_size


def logits_bytes(trainer: NemoAlignerSettings, spec: ModelSpec, *, num_tokens: int) -> float:
    """What the last stage holds behind its layers at the peak: the logits of one micro-batch, and what they are from.

    Logits exist only for tokens with a target (`targets.py`). Here all tokens count, because prompts may be short. In
    the forward pass there are the logits as computed and in float32; in the backward pass, the softmax in float32 and
    the gradient. With float32 these are the same tensor. A bit later there are the gradients of the logits, of the
    output layer's weights and of its input. All the time there are the input and the output of the last norm, and the
    tokens that were selected.
    """
    tp, size = trainer.tensor_model_parallel_size, _bytes_per_element(trainer)
    hidden = num_tokens * size * spec.hidden_size
    per_logit = 4 if size == 4 else 4 + size
    logits = num_tokens * spec.vocab_size
    frozen = trainer.lora_rank or (trainer.num_frozen_layers(spec.num_layers) and spec.tie_word_embeddings)
    later = size * (logits + (0 if frozen else spec.vocab_size * spec.hidden_size))
    kept = hidden * (1 + 2 / (tp if trainer.sequence_parallel else 1))
    return kept + max(per_logit * logits / tp, later / tp + hidden)


def user_buffers_bytes(trainer: NemoAlignerSettings, spec: ModelSpec, *, num_tokens: int) -> float:
    """Of `ub_tp_comm_overlap`: one buffer of all tokens in bfloat16 for each of ten matrix products.

    Source: `initialize_ub` of Transformer Engine 2.0, transformer_engine/pytorch/module/base.py.
    """
    return 10 * 2 * num_tokens * spec.hidden_size if trainer.ub_tp_comm_overlap else 0.0


def _bytes_per_element(trainer: NemoAlignerSettings) -> float:
    """Of activations."""
    return 4.0 if trainer.precision == "32" else 2.0


def checkpoint_bytes(trainer: NemoAlignerSettings, spec: ModelSpec) -> float:
    """One checkpoint of a training: weights, float32 masters (also of float32 weights) and both moments. With LoRA,
    those of the adapters alone. Of frozen layers, the weights.

    Measured on a CPU: 2.1 GB for the 134.5M parameters of SmolLM2-135M in float32. This gives 2.15 GB.
    """
    weights = 2 if trainer.precision == "bf16-O2" else 4
    number = num_parameters(spec)
    if trainer.lora_rank:
        number = spec.num_layers * adapter_parameters_per_layer(spec, trainer.lora_rank)
    return number * weights + (number - frozen_parameters(trainer, spec)) * (4 + 8)
