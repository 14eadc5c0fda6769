"""Model families, found by `model_type` in a model's config.json: a module here, or a user's own that was registered.

A family is a module with a `FAMILY`. It says how to read the config, the names of the tensors, and what NeMo must be
told. Every family here has the layers of a Llama: RMSNorm, grouped-query attention with rotary embeddings, SwiGLU. It
may have biases of the queries, keys and values, and norms of the queries and keys. Importing a family imports no torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nemo_srl import registry
from nemo_srl.errors import ModelError
from nemo_srl.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Family:
    """What differs between families. `{layer}` in the name of a tensor stands for the layer's number, from 0.

    `q`, `k` and `v` may have one name. Then they are one tensor, with the rows of q, then of k, then of v. So may
    `gate` and `up`.
    """

    model_types: tuple[str, ...]
    """`model_type` in config.json."""
    architectures: tuple[str, ...]
    """Transformers' classes: `architectures` in config.json holds one of these."""
    supported: str
    """For messages: which models these are, and what they must not have."""
    read_spec: Callable[[Mapping[str, Any]], ModelSpec]
    """The content of config.json as a `ModelSpec`. Raises `ModelError`, without the file's name, for what cannot be
    used."""

    embedding: str
    final_norm: str
    output: str
    """Absent from the weights of a model with tied embeddings."""
    input_norm: str
    q: str
    k: str
    v: str
    o: str
    post_attention_norm: str
    gate: str
    up: str
    down: str

    q_bias: str = ""
    k_bias: str = ""
    v_bias: str = ""
    """Biases of these three projections. Empty in a family without them."""
    q_norm: str = ""
    k_norm: str = ""
    """Weights [head_dim] of an RMSNorm of each query and key, before they are rotated. Empty in a family without."""

    nemo_settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of NeMo's `megatron_gpt_config.yaml` with another value than a Llama has."""


_registered: dict[str, Family] = {}


def register(path: str) -> Family:
    """Make the family of the user's module `path` known to this process: its `FAMILY`, or `my.module:OTHER`.

    Raises `ConfigError` for a path that cannot be imported or gives something else.
    """
    name = path if ":" in path else f"{path}:FAMILY"
    none: dict[str, Family] = {}
    family = registry.named(none, name, key="model.family", kind=Family)
    _registered.update(dict.fromkeys(family.model_types, family))
    return family


def known() -> dict[str, Family]:
    """Families by `model_type`. One that was registered comes before one of this package."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(__path__):
        family: Family = importlib.import_module(f"{__name__}.{module.name}").FAMILY
        found |= dict.fromkeys(family.model_types, family)
    return found | _registered


def of(spec: ModelSpec) -> Family:
    return known()[spec.model_type]


def read_spec(config: Mapping[str, Any]) -> ModelSpec:
    """The shape that a config.json describes. Raises `ModelError`, without the file's name."""
    model_type, architectures = config.get("model_type"), config.get("architectures")
    families = known()
    # Some old files have no `model_type`.
    by_class = {name: family for family in families.values() for name in family.architectures}
    first = architectures[0] if isinstance(architectures, list) and architectures else None
    family = families.get(str(model_type)) if model_type else by_class.get(str(first))
    if family is None or architectures not in [[name] for name in family.architectures]:
        raise ModelError(f"model_type={model_type!r}, architectures={architectures!r} is not supported. {supported()}")
    return family.read_spec(config)


def supported() -> str:
    """For messages: what can be used, and the way to more."""
    models = ", or ".join(dict.fromkeys(family.supported for family in known().values()))
    return f"Supported is {models}, without quantization, in safetensors format. model.family adds a family of yours."


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A positive number of config.json; `default` where it is absent or null. Raises `ModelError`."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value < 1e300:
        raise ModelError(f"{key}={_excerpt(value)} must be a positive number. {_COPY}")
    return float(value)


def positive(config: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A positive integer of config.json; `default` where it is absent or null. Raises `ModelError`."""
    value = config.get(key)
    value = default if value is None else value
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise ModelError(f"{key}={_excerpt(value)} must be a positive integer below 2^31. {_COPY}")
    return value


def within_window(spec: ModelSpec, config: Mapping[str, Any]) -> ModelSpec:
    """`spec` with a context of at most `sliding_window` tokens, if config.json has such a window.

    Neither the trainer nor the embedded engine has it. Within so many tokens, it hides nothing.
    """
    window = positive(config, "sliding_window", spec.max_position_embeddings)
    return replace(spec, max_position_embeddings=min(spec.max_position_embeddings, window))


_COPY = "Copy the file again from where the model came from, or correct it."


def _excerpt(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
