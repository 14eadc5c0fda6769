"""Finds the parts that vary by their names: engines, trainers, launchers, verdict readers, pair rules, stages.

A plain name means one of this package's own, such as `embedded` for `nemo_srl/engines/embedded/`. A dotted name means
the user's own: `my_package.my_engine` is a module that has `BACKEND`, and `my_package.rules:longest` is an object of a
module. The user's package must be importable where the stages run. Nothing is imported before it is needed.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, TypeVar

from nemo_srl.errors import ConfigError

T = TypeVar("T")


def names(package: str) -> list[str]:
    """The names of this package's own backends: the folders of `nemo_srl/<package>/`."""
    module = importlib.import_module(f"nemo_srl.{package}")
    return sorted(m.name for m in pkgutil.iter_modules(module.__path__) if m.ispkg)


def load(package: str, name: str, *, key: str = "") -> Any:
    """The `BACKEND` with this name in `nemo_srl/<package>/`, or at the user's own dotted path.

    `key` is the setting that holds the name. Raises `ConfigError` for an unknown name.
    """
    key = key or f"{package.removesuffix('s')}.name"
    if _is_path(name, names(package), key):
        found = imported(name, key=key, attribute="BACKEND")
        if not hasattr(found, "settings"):
            raise ConfigError(f"{key}={name!r}: this is a {type(found).__name__}, and not a backend with `settings`.")
        return found
    return importlib.import_module(f"nemo_srl.{package}.{name}").BACKEND


def named(entries: Mapping[str, T], name: str, *, key: str, kind: type = object) -> T:
    """The entry with this name, or the object at the user's own dotted path.

    Raises `ConfigError` for an unknown name, or for an object that is not a `kind`.
    """
    if not _is_path(name, sorted(entries), key):
        return entries[name]
    found: T = imported(name, key=key)
    if not isinstance(found, kind):
        raise ConfigError(f"{key}={name!r}: this is a {type(found).__name__}, but a {kind.__name__} is needed.")
    return found


def imported(path: str, *, key: str, attribute: str = "") -> Any:
    """The object at `module:attribute`. Raises `ConfigError` if it cannot be imported."""
    module_name, _, given = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, TypeError, ValueError) as e:  # the last two for names such as "../x" and ":x"
        raise ConfigError(
            f"{key}={path!r}: the module cannot be imported ({e}). Install its package, or correct the path."
        ) from e
    wanted = given or attribute
    if not wanted or not hasattr(module, wanted):
        raise ConfigError(f"{key}={path!r}: {module_name} has no {wanted or 'object'!r}. Write it as module:object.")
    return getattr(module, wanted)


def _is_path(name: str, known: list[str], key: str) -> bool:
    """Whether a name is a dotted path. Raises `ConfigError` for a plain name that is not known."""
    if "." not in name and ":" not in name and name not in known:
        reason = f"unknown name. Use one of {', '.join(known)}, or the dotted path of your own object."
        raise ConfigError(f"{key}={name!r}: {reason}")
    return name not in known
