"""Llama 2, Llama 3.x, and what has their architecture, such as SmolLM2 and TinyLlama."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemo_srl.errors import ModelError
from nemo_srl.models.families import Family, number, positive
from nemo_srl.models.spec import ModelSpec


def read_spec(config: Mapping[str, Any], family: Family | None = None) -> ModelSpec:
    """Transformers' `LlamaConfig`, with its defaults for what older files leave out.

    The configs of other families have the same names. `family` is the one that reads its config with this function. If
    it has other defaults, it adds them to `config`.
    """
    family = family or FAMILY
    wrong = [key for key in ("attention_bias", "mlp_bias") if config.get(key)]
    if config.get("hidden_act", "silu") != "silu":
        wrong.append("hidden_act")
    for key in wrong:
        raise ModelError(f"{key}={config[key]!r} is not supported. Supported is {family.supported}.")
    heads = positive(config, "num_attention_heads")
    hidden = positive(config, "hidden_size")
    groups = positive(config, "num_key_value_heads", heads)
    if heads % groups:
        raise ModelError(
            f"num_attention_heads={heads} is not a multiple of num_key_value_heads={groups}, which grouped-query "
            "attention needs. Copy the file again from where the model came from."
        )
    theta, scaling = rotary(config, family)
    return ModelSpec(
        model_type=str(config.get("model_type") or family.model_types[0]),  # absent or empty in some old files
        num_layers=positive(config, "num_hidden_layers"),
        hidden_size=hidden,
        ffn_hidden_size=positive(config, "intermediate_size"),
        num_attention_heads=heads,
        num_query_groups=groups,
        head_dim=positive(config, "head_dim", hidden // heads),
        vocab_size=positive(config, "vocab_size"),
        max_position_embeddings=positive(config, "max_position_embeddings"),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=number(config, "rms_norm_eps", 1e-6),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        torch_dtype=str(config.get("torch_dtype") or config.get("dtype") or "float32"),
    )


def rotary(config: Mapping[str, Any], family: Family) -> tuple[float, dict[str, Any] | None]:
    """`rope_theta` and `rope_scaling`. Since version 5, transformers writes both into `rope_parameters`."""
    parameters, scaling = config.get("rope_parameters"), config.get("rope_scaling")
    for key, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if value is not None and (not isinstance(value, dict) or any(isinstance(x, dict) for x in value.values())):
            raise ModelError(f"{key}={value!r} is not supported. It must be one set of values for all layers, or null.")
    if parameters:
        config = {**config, **parameters}
        rest = {k: v for k, v in parameters.items() if k not in ("rope_theta", "partial_rotary_factor")}
        scaling = rest if rest.get("rope_type", "default") != "default" else None
    factor = config.get("partial_rotary_factor")
    if factor not in (None, 1):
        raise ModelError(f"partial_rotary_factor={factor!r} is not supported. Supported is {family.supported}.")
    _check_scaling(scaling or {})
    return number(config, "rope_theta", 10000.0), scaling


_SCALING_NUMBERS = {
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _check_scaling(scaling: Mapping[str, Any]) -> None:
    """The numbers that a type of scaling needs. Types that are not known are refused by what would use them."""
    try:
        for key in _SCALING_NUMBERS.get(str(scaling.get("rope_type", scaling.get("type"))), ()):
            number(scaling, key)
    except ModelError as e:
        raise ModelError(f"rope_scaling: {e}") from None


_LAYER = "model.layers.{layer}."

FAMILY = Family(
    model_types=("llama",),
    architectures=("LlamaForCausalLM",),
    supported="LlamaForCausalLM (Llama 2, Llama 3.x, SmolLM2, TinyLlama, ...) with hidden_act=silu and without biases",
    read_spec=read_spec,
    embedding="model.embed_tokens.weight",
    final_norm="model.norm.weight",
    output="lm_head.weight",
    input_norm=_LAYER + "input_layernorm.weight",
    q=_LAYER + "self_attn.q_proj.weight",
    k=_LAYER + "self_attn.k_proj.weight",
    v=_LAYER + "self_attn.v_proj.weight",
    o=_LAYER + "self_attn.o_proj.weight",
    post_attention_norm=_LAYER + "post_attention_layernorm.weight",
    gate=_LAYER + "mlp.gate_proj.weight",
    up=_LAYER + "mlp.up_proj.weight",
    down=_LAYER + "mlp.down_proj.weight",
)
