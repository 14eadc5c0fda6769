"""The license of a base model: what its own directory says, or what is known of the model that is fetched.

`license_of` never guesses: it returns None where neither says anything.
"""

from __future__ import annotations

import re
from pathlib import Path

from nemo_srl.models import smollm2

_KNOWN = {smollm2.NAME: "apache-2.0"}
_FRONT_MATTER = re.compile(r"\A---\s*\n(.*?)\n---\s*\n", re.DOTALL)
_LICENSE = re.compile(r"^license:[ \t]*[\"']?([A-Za-z0-9._+-]+)[\"']?[ \t]*$", re.MULTILINE)


def license_of(name: str, model_dir: Path) -> str | None:
    """The Hub's identifier of the license, such as `apache-2.0`, of the model with this `model.path`."""
    if name in _KNOWN:
        return _KNOWN[name]
    card = model_dir / "README.md"
    if not card.is_file():
        return None
    front = _FRONT_MATTER.match(card.read_text(encoding="utf-8", errors="replace"))
    found = _LICENSE.search(front[1]) if front else None
    return found[1] if found else None
