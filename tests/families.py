"""Random models of every family, in transformers' own code, which knows nothing of this package.

Transformers has Qwen3 from version 4.51 on, and NeMo 2.2 asks for 4.48. So it is here, in the terms of transformers'
Llama. `test_models_families.py` compares it with what transformers 4.57 computed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

FAMILIES = ("llama", "mistral", "phi3", "qwen2", "qwen3")
OTHERS = FAMILIES[1:]
_SETTINGS: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": None}, "phi3": {"pad_token_id": 2}}
_FIXED_HEAD_DIM = ("phi3", "qwen2")
"""In these, a head always has hidden_size / heads dimensions."""


class Qwen3Config(LlamaConfig):
    model_type = "qwen3"


class Qwen3ForCausalLM(LlamaForCausalLM):
    """A Llama that normalises each query and each key before it rotates them."""

    config_class = Qwen3Config

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            for name in ("q", "k"):
                norm = LlamaRMSNorm(config.head_dim, config.rms_norm_eps)
                layer.self_attn.register_module(f"{name}_norm", norm)
                getattr(layer.self_attn, f"{name}_proj").register_forward_hook(partial(_normed, norm))


def _normed(norm: LlamaRMSNorm, module: object, args: object, projected: torch.Tensor) -> torch.Tensor:
    heads = projected.unflatten(-1, (-1, norm.weight.shape[0]))
    return norm(heads).flatten(-2)


if "qwen3" not in CONFIG_MAPPING:
    AutoConfig.register("qwen3", Qwen3Config)
    AutoModelForCausalLM.register(Qwen3Config, Qwen3ForCausalLM)


def random_model(family: str, *, seed: int, **config: Any) -> Any:
    """Weights of a `config`, whose names are Llama's. Norms and biases are not ones and zeros, so that they count."""
    config = {**_SETTINGS.get(family, {}), **config}
    if family in _FIXED_HEAD_DIM:
        config.pop("head_dim", None)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[family](**config))
        if family != "llama":
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.data.add_(0.3 * torch.randn_like(parameter))
    return model.eval()
