"""Rules that make preference pairs of scored answers."""

from __future__ import annotations

LABELS: dict[str, str] = {
    "tied": "tied",
    "identical": "equal texts",
    "unscored": "no scores",
    "truncated": "all cut off",
}
"""How the report names the reasons for which a prompt gives no pair."""
