"""What choosing layers results in."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .scores import Scores

if TYPE_CHECKING:
    from ..repair.fit import Repair


@dataclass
class Choice:
    """Which layers to drop, and why.

    Args:
        drop_layers (`list[int]`): Base indices, ascending.
        criterion (`str`): The criterion that chose them.
        why (`str`): The reason, in one sentence.
        scores (`list[Scores]`): The scores the choice is based on, one entry per round and criterion.
        details (`dict[str, Any]`): Further entries for the record, such as the short list of `auto`.
        repair (`Repair`, *optional*): The repair that the choice was judged with, if another would not be the same.
    """

    drop_layers: list[int]
    criterion: str
    why: str
    scores: list[Scores] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    repair: Repair | None = None

    def record(self) -> dict[str, Any]:
        """The entry for `lineage.json`."""
        record = {"criterion": self.criterion, "why": self.why} | self.details
        if len(self.scores) == 1 and self.scores[0].layers is not None:  # chosen in one round, by these scores
            record["scores"] = self.scores[0].record()
        return record
