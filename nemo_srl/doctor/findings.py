"""A line of the doctor's report, and the rule that one bad check ends no other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from nemo_srl.errors import NemoSrlError


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was tried, what was found, and what to set. `remedy` is empty where nothing has to change.

    The findings on one machine have only `text`, with the remedy in it.
    """

    name: str
    ok: bool
    text: str
    tried: str = ""
    remedy: str = ""
    is_checked: bool = True
    """False: this could not be found out, or the recipe does not need it. `text` says why."""

    @property
    def state(self) -> str:
        """ok, WRONG, or "-" for what was not checked."""
        return "-" if not self.is_checked else "ok" if self.ok else "WRONG"


def not_checked(name: str, reason: str, *, tried: str = "", remedy: str = "") -> Finding:
    """A finding for what was left out. It counts neither as good nor as bad."""
    return Finding(name=name, ok=True, text=reason, tried=tried, remedy=remedy, is_checked=False)


def guarded(name: str, check: Callable[[], str]) -> Finding:
    """What a check of this machine returns or raises, as a finding."""
    try:
        return Finding(name=name, ok=True, text=check())
    except NemoSrlError as e:
        return Finding(name=name, ok=False, text=str(e))


def collected(name: str, check: Callable[[], Iterable[Finding]], *, tried: str, remedy: str) -> list[Finding]:
    """All findings of a check. What it raises becomes one more finding with this name, which says what was tried."""
    found: list[Finding] = []
    try:
        found.extend(check())
    except NemoSrlError as e:
        found.append(Finding(name=name, ok=False, text=str(e), tried=tried, remedy=remedy))
    except Exception as e:  # a mistake of this program, or what nobody foresaw, must not hide the other findings
        found.append(Finding(name=name, ok=False, text=f"{type(e).__name__}: {e}", tried=tried, remedy=remedy))
    return found
