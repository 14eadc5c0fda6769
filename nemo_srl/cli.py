"""Options of the small command-line tools, as `key=value`, the form that the recipes have: `read_options`.

A tool's options are the fields of a dataclass; unknown keys, values of another type and missing ones raise
`ConfigError`. Not covered: groups and files of settings, which only `recipes/iterate.py` has (by Hydra).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_srl.errors import ConfigError

T = TypeVar("T")


def read_options(schema: type[T], arguments: Sequence[str]) -> T:
    """An instance of the dataclass `schema`, set by `arguments`; fields that are `MISSING` must be given."""
    structure = OmegaConf.structured(schema)
    names = ", ".join(structure)
    for argument in arguments:
        if "=" not in argument:
            raise ConfigError(f"{argument!r}: options are given as key=value; the keys are {names}")
    try:
        merged = OmegaConf.merge(structure, OmegaConf.from_dotlist(list(arguments)))
    except OmegaConfBaseException as e:
        raise ConfigError(f"{' '.join(arguments)}: {e.msg or e}; the keys are {names}") from e
    if missing := sorted(OmegaConf.missing_keys(merged)):
        raise ConfigError(f"{missing[0]}=???: must be given, as {missing[0]}=...; the keys are {names}")
    options = OmegaConf.to_object(merged)
    assert isinstance(options, schema)
    return options
