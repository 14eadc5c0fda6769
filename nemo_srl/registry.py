"""What varies is found by name: a part of this package by a plain name, a user's own by a dotted path."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any, TypeVar

from nemo_srl.errors import ConfigError

T = TypeVar("T")


def load(package: str, name: str) -> Any:
    """The `BACKEND` of `nemo_srl.<package>.<name>`, or of the user's module that a dotted `name` gives.

    `my.module:THING` gives another object of that module. Raises `ConfigError`, with the names that there are.
    """
    root = importlib.import_module(f"nemo_srl.{package}")
    known = [module.name for module in pkgutil.iter_modules(root.__path__)]
    path = name if "." in name or ":" in name else f"nemo_srl.{package}.{name}"
    return _imported(path if ":" in path else f"{path}:BACKEND", name, key=f"{package[:-1]}.name", known=known)


def named(entries: Mapping[str, T], name: str, *, key: str, kind: type) -> T:
    """The entry of that name, or the user's own object that `my.module:thing` gives.

    Raises `ConfigError` for a name that is neither, or an object that is no `kind`.
    """
    if name in entries:
        return entries[name]
    found: T = _imported(name, name, key=key, known=list(entries))
    if not isinstance(found, kind):
        raise ConfigError(f"{key}={name!r}: this is a {type(found).__name__}, and a {kind.__name__} is needed")
    return found


def _imported(path: str, name: str, *, key: str, known: list[str]) -> Any:
    module, _, attribute = path.partition(":")
    try:
        if not attribute:
            raise AttributeError("it is no dotted path")
        return getattr(importlib.import_module(module), attribute)
    except (ModuleNotFoundError, AttributeError) as error:
        # A module that is there, and itself needs one that is not, shows its own error.
        if isinstance(error, ModuleNotFoundError) and not f"{module}.".startswith(f"{error.name}."):
            raise
        raise ConfigError(
            f"{key}={name!r}: there is none of this name ({error}). Use one of {known}, or the dotted path of your "
            "own, my.module:object, in a module that Python can import."
        ) from error
