"""The papers that a card cites: that of the method, and those of the criteria and repairs that were used."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Paper:
    """A paper on arXiv.

    Args:
        title (`str`): The title.
        authors (`str`): All authors, or the first one "and others".
        year (`int`): The year of the first version.
        arxiv (`str`): The arXiv identifier.
    """

    title: str
    authors: str
    year: int
    arxiv: str

    @property
    def key(self) -> str:
        """Its BibTeX key, such as `lu2024reassessing`."""
        words = [word for word in re.findall(r"\w+", self.title.lower()) if word not in ("a", "an", "the")]
        return f"{self.authors.partition(',')[0].lower()}{self.year}{words[0]}"

    def bibtex(self) -> str:
        """Its BibTeX entry."""
        fields = {
            "title": self.title,
            "author": self.authors,
            "year": str(self.year),
            "eprint": self.arxiv,
            "archivePrefix": "arXiv",
        }
        width = max(map(len, fields))
        lines = [f"  {name:<{width}} = {{{value}}}," for name, value in fields.items()]
        return "\n".join([f"@misc{{{self.key},", *lines, "}"])


METHOD = Paper(
    "Reassessing Layer Pruning in LLMs: New Insights and Methods",
    "Lu, Yao and Cheng, Hao and Fang, Yujie and Wang, Zeyu and Wei, Jiaheng and Xu, Dongwei and Xuan, Qi and "
    "Yang, Xiaoniu and Zhu, Zhaowei",
    2024,
    "2411.15558",
)
# By a stage's setting and its value.
USED = {
    ("criterion", "block_influence"): Paper(
        "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", "Men, Xin and others", 2024,
        "2403.03853",
    ),
    ("criterion", "angular_distance"): Paper(
        "The Unreasonable Ineffectiveness of the Deeper Layers", "Gromov, Andrey and others", 2024, "2403.17887"
    ),
    ("criterion", "taylor"): Paper(
        "Shortened LLaMA: Depth Pruning for Large Language Models with Comparison of Retraining Methods",
        "Kim, Bo-Kyeong and others", 2024, "2402.02834",
    ),
    ("repair", "linear"): Paper(
        "ReplaceMe: Network Simplification via Depth Pruning and Transformer Block Linearization",
        "Shopkhoev, Dmitriy and others", 2025, "2505.02819",
    ),
}  # fmt: skip
