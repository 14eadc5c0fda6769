"""What follows from a model's shape alone: the number of its parameters and of its FLOPs. No torch, no files.

Source: [N] Narayanan et al. 2021, arXiv 2104.04473, equations 2 and 3.
"""

from __future__ import annotations

from nemo_srl.models import families
from nemo_srl.models.spec import ModelSpec


def num_parameters(spec: ModelSpec) -> int:
    """The exact number, as in the checkpoint."""
    embeddings = spec.vocab_size * spec.hidden_size * (1 if spec.tie_word_embeddings else 2)
    return embeddings + spec.num_layers * parameters_per_layer(spec) + spec.hidden_size


def parameters_per_layer(spec: ModelSpec) -> int:
    h, q = spec.hidden_size, spec.num_attention_heads * spec.head_dim
    kv, family = spec.num_query_groups * spec.head_dim, families.of(spec)
    biases = q + 2 * kv if family.q_bias else 0
    norms = 2 * h + (2 * spec.head_dim if family.q_norm else 0)
    return h * q + 2 * h * kv + q * h + 3 * h * spec.ffn_hidden_size + biases + norms


def flops_per_token(spec: ModelSpec, *, sequence_length: float, forward_passes: float) -> float:
    """Model FLOPs: 2 a parameter and token in each matrix product of a forward pass, and attention [N, eq. 3].

    A training step counts as three forward passes, with recomputed activations as four. DPO's reference adds one, once.
    """
    matrices = spec.num_layers * parameters_per_layer(spec) + spec.vocab_size * spec.hidden_size
    # Scores and their product with the values, 2 FLOPs each. A causal mask halves this, but Megatron does not count
    # that, and neither do we.
    attention = 4 * spec.num_layers * sequence_length * spec.num_attention_heads * spec.head_dim
    return forward_passes * (2 * matrices + attention)
