"""Refuses a bad value, with key, value and reason."""

from __future__ import annotations

from nemo_srl.errors import ConfigError


def check(ok: bool, key: str, value: object, reason: str) -> None:
    """Raise `ConfigError` unless `ok`."""
    if not ok:
        raise ConfigError(f"{key}={value!r}: {reason}")
