"""The papers that a card cites: that of the method, and those of the criteria and repairs that were used."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files

METHOD = "lu2024reassessing"
# The key in `papers.bib`, by a stage's setting and its value.
USED = {
    ("criterion", "block_influence"): "men2024shortgpt",
    ("criterion", "angular_distance"): "gromov2024unreasonable",
    ("criterion", "taylor"): "kim2024shortened",
    ("repair", "linear"): "shopkhoev2025replaceme",
}


def bibtex(keys: Iterable[str]) -> str:
    """The entries of `papers.bib` with these keys, each once."""
    entries = files(__package__).joinpath("papers.bib").read_text(encoding="utf-8").strip().split("\n\n")
    by_key = {entry.partition("{")[2].partition(",")[0]: entry for entry in entries}
    return "\n\n".join(by_key[key] for key in dict.fromkeys(keys))
