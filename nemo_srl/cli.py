"""What the programs in `recipes/` share: options, Hydra's schemas, logging, and errors as one line.

Small programs take their options as `key=value` (`read_options`). `iterate`, `evaluate` and others take the whole
configuration through Hydra. In both cases a `NemoSrlError` ends the program with its message, without a traceback.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from omegaconf import DictConfig, OmegaConf

from nemo_srl import registry
from nemo_srl.config import BACKENDS, Config, load
from nemo_srl.errors import ConfigError, NemoSrlError, explained

T = TypeVar("T")


def read_options(schema: type[T], arguments: Sequence[str]) -> T:
    """An instance of the dataclass `schema` with the values of `arguments`. Fields that are `MISSING` must be given.

    Raises `ConfigError` for an unknown key, a missing key, or a value of the wrong type.
    """
    structure = OmegaConf.structured(schema)
    names = ", ".join(structure)
    for argument in arguments:
        if "=" not in argument:
            raise ConfigError(f"{argument!r}: write each option as key=value; the keys are {names}")
    try:
        merged = OmegaConf.merge(structure, OmegaConf.from_dotlist(list(arguments)))
    except Exception as e:
        if not _is_of_hydra(e):
            raise
        reason = " ".join(str(getattr(e, "msg", None) or getattr(e, "problem", None) or e).split())
        raise ConfigError(f"{' '.join(arguments)}: {reason}; the keys are {names}") from e
    if missing := sorted(OmegaConf.missing_keys(merged)):
        raise ConfigError(f"{missing[0]}=???: must be given, as {missing[0]}=...; the keys are {names}")
    options = OmegaConf.to_object(merged)
    assert isinstance(options, schema)
    return options


def register_schemas(arguments: Sequence[str], **schemas: type[Config]) -> None:
    """Tell Hydra the types of all settings.

    `schemas` are the root schemas, by their names in YAML files. Every backend gets an entry `<name>_schema` in its
    group. A user's own backend gets an entry if `arguments` choose it by its dotted path, such as
    `engine=my_package.my_engine`. A path that cannot be imported ends the program with a message.
    """
    from hydra.core.config_store import ConfigStore

    store = ConfigStore.instance()
    for name, schema in schemas.items():
        node = OmegaConf.structured(schema)
        for section, (_, default) in BACKENDS.items():
            if default:  # The group of this name fills it. A merge instead would keep the type of the default backend.
                node[section] = "???"
        store.store(name=name, node=node)
    for package in ("engines", "trainers", "launchers"):
        group = package.removesuffix("s")
        for name in registry.names(package):
            store.store(group=group, name=f"{name}_schema", node=registry.load(package, name).settings)
        for path in _chosen_paths(arguments, group):
            with one_line_errors():
                settings = registry.load(package, path, key=group).settings
            # From the class, not from an object of it, because a required setting has no value yet.
            node = OmegaConf.structured(settings)
            node.name = path
            store.store(group=group, name=path, node=node)


def _chosen_paths(arguments: Sequence[str], group: str) -> Iterator[str]:
    """Dotted paths that command line arguments choose in a group: `engine=a.b` and `+engine@judge.engine=a.b`."""
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key.lstrip("+").partition("@")[0] == group and ("." in value or ":" in value):
            yield value


def fail(message: str) -> NoReturn:
    """End the program with a message for the user, and exit status 2. A traceback ends it with 1."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the program with a message for what the user can correct: a `NemoSrlError`, a file that cannot be used, and
    Hydra's complaint about a setting."""
    try:
        yield
    except Exception as e:
        if (message := _for_the_user(e)) is None:
            raise
        fail(message)


def _for_the_user(error: Exception) -> str | None:
    """The message of an error that the user can correct. None for others."""
    if isinstance(error, NemoSrlError):
        return str(error)
    if _is_of_hydra(error):
        return " ".join(str(error).split())
    return explained(error) if isinstance(error, OSError) else None


def _is_of_hydra(error: Exception) -> bool:
    """Whether Hydra or what it uses raised the error. These programs give it nothing but the user's arguments."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    module = "" if place is None else str(place.tb_frame.f_globals.get("__name__"))
    return module.partition(".")[0] in ("hydra", "omegaconf", "antlr4", "yaml")


def log_to_stderr(form: str = "%(message)s") -> None:
    """Set up logging for a program."""
    logging.basicConfig(level=logging.INFO, format=form, stream=sys.stderr, force=True)


def run_program(schema: type[T], main: Callable[[T], Any], arguments: Sequence[str] | None = None) -> None:
    """Run a small program: read its options, set up logging, and print an error as one line."""
    log_to_stderr()
    with one_line_errors():
        main(read_options(schema, sys.argv[1:] if arguments is None else arguments))


def run_composed(cfg: DictConfig, schema: type[T], main: Callable[[T], Any], *, form: str = "%(message)s") -> None:
    """Run a program with the configuration that Hydra composed: check its types, and print an error as one line."""
    log_to_stderr(form)
    with one_line_errors():
        main(load(cfg, schema))


def start(main: Callable[[], Any]) -> None:
    """Run a program that `hydra.main` made."""
    # Hydra then raises its errors. Otherwise it prints them, with a traceback or without, and ends the program itself.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    with one_line_errors():
        main()
