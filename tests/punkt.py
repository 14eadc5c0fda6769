"""NLTK's sentence splitter without NLTK's data, which no package ships."""

from __future__ import annotations

from pathlib import Path


def make_punkt_tab(directory: Path) -> str:
    """A directory for NLTK_DATA with an untrained splitter in the format of `punkt_tab`: it knows no abbreviation."""
    tab = directory / "tokenizers" / "punkt_tab" / "english"
    tab.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        (tab / name).write_text("")
    return str(directory)
