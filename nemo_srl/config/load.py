"""Makes a typed `Config` from composed YAML, or from a stage's description.

Each section of `BACKENDS` has the settings of a backend, which is found by `name`. Every backend has its own settings,
so a setting of another backend is refused here. Raises `ConfigError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_srl import registry
from nemo_srl.errors import ConfigError

BACKENDS: Mapping[str, tuple[str, str]] = {
    "engine": ("engines", "embedded"),
    "prompts.engine": ("engines", ""),
    "judge.engine": ("engines", ""),
    "trainer": ("trainers", "nemo_aligner"),
    "launcher": ("launchers", "local"),
}
"""By section: the package of its backends, and the name of the default (empty: no default)."""

C = TypeVar("C")


def default_settings(section: str) -> Any:
    """The settings of a section when the user sets nothing."""
    package, name = BACKENDS[section]
    return registry.load(package, name).settings()


def load(data: DictConfig | Mapping[str, Any], schema: type[C]) -> C:
    """`data` as an instance of `schema`, which is `Config` or extends it."""
    plain: Any = OmegaConf.to_container(
        OmegaConf.create(dict(data)) if isinstance(data, Mapping) else data, resolve=True
    )
    typed = {key: settings for key in BACKENDS if (settings := _backend_settings(key, _take(plain, key))) is not None}
    try:
        cfg = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), plain))
    except OmegaConfBaseException as e:
        raise ConfigError(f"{e.full_key}: {(e.msg or str(e)).splitlines()[0]}") from e
    assert isinstance(cfg, schema)
    for key, settings in typed.items():
        section, _, name = key.rpartition(".")
        setattr(getattr(cfg, section) if section else cfg, name, settings)
    return cfg


@contextmanager
def key_of(section: str) -> Iterator[None]:
    """Let errors of a backend's settings, which name `engine.KEY`, name `SECTION.KEY`."""
    try:
        yield
    except ConfigError as e:
        outer, _, last = section.rpartition(".")
        raise (ConfigError(f"{outer}.{e}") if outer and str(e).startswith(f"{last}.") else e) from e


def _take(plain: dict[str, Any], key: str) -> Any:
    """Remove and return a section; None where it is not set. Raises `ConfigError` for a value in its place."""
    *outer, last = key.split(".")
    for name in outer:
        plain = _section(name, plain.get(name) or {})
    found = plain.pop(last, None)
    return None if found is None or found == "???" else _section(key, found)


def _section(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(
            f"{key}={value!r}: it is a group of settings. Set one of them, as in {key}.<setting>=<value>."
        )
    return value


def _backend_settings(section: str, given: Any) -> Any:
    if given is None:
        return None
    package, default = BACKENDS[section]
    name = str(given.get("name") or default)
    schema = registry.load(package, name, key=f"{section}.name").settings
    known = [f.name for f in fields(schema)]
    if unknown := [key for key in given if key not in known]:
        raise ConfigError(
            f"{section}.{unknown[0]}={given[unknown[0]]!r}: {section}.name={name!r} has no such setting. It has "
            f"{', '.join(known)}. For another backend, choose its group first: {section.split('.')[-1]}=<name>."
        )
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), given)
        if missing := sorted(OmegaConf.missing_keys(merged)):
            raise ConfigError(f"{section}.{missing[0]}=???: {section}.name={name!r} needs this setting. Give a value.")
        with key_of(section):
            return OmegaConf.to_object(merged)
    except OmegaConfBaseException as e:
        raise ConfigError(f"{section}.{e.key}: {e.msg or e}") from e
