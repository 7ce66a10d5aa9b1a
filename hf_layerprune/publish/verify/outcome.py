"""What `verify` finds, and the verdict that follows."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from ...errors import shown
from ...records.lineage import FILE_NAME as LINEAGE

BASE = "base"  # the part that a line about the base names
_MAX_LINES = 20


@dataclass(frozen=True)
class Line:
    """One finding.

    Args:
        good (`bool`): Whether the check passed.
        what (`str`): The part that was checked.
        text (`str`): The result.
    """

    good: bool
    what: str
    text: str


@dataclass
class Verified:
    """The outcome.

    Args:
        name (`str`): The model.
        lines (`list[Line]`): The findings.
        recorded (`Counter[str]`): Number of tensors that can only be checked against the records, by the stages that
            changed them.
        accept_trained (`bool`): Whether to accept such tensors.
        complete (`bool`): Whether all checks were made.
        without_weights (`bool`): Whether there are only records, and no model that they could prove.
        without_base (`bool`): Whether the base was not found, so that nothing could be compared with it.
    """

    name: str
    lines: list[Line] = field(default_factory=list)
    recorded: Counter[str] = field(default_factory=Counter)
    accept_trained: bool = False
    complete: bool = False
    without_weights: bool = False
    without_base: bool = False

    @property
    def consistent(self) -> bool:
        """Whether nothing contradicts the records."""
        return self.complete and all(line.good for line in self.lines)

    @property
    def good(self) -> bool:
        """Whether everything that affects the model's behaviour is accounted for."""
        return self.consistent and not self.without_weights and (not self.recorded or self.accept_trained)

    @property
    def verdict(self) -> str:
        """One line: yes, no, or in part, with the unproven part; or that there are only records, or no base."""
        if self.without_base and all(line.good for line in self.lines if line.what != BASE):
            return (
                f"NOT CHECKED: the base of {self.name} was not found, and its records have no other fault; specify it "
                "with --base"
            )
        if self.without_weights:
            agree = "agree" if self.consistent else "do NOT agree"
            return (
                f"RECORDS ONLY: {self.name} has no weights; its records {agree} with the base and with one another. "
                "Verify the model itself where its weights are"
            )
        if not self.consistent:
            return f"NO: {self.name} is not proven to match its records"
        if not self.recorded:
            return f"YES: {self.name} matches its records"
        stages = ", ".join(f"{name}: {count}" for name, count in sorted(self.recorded.items()))
        count = self.recorded.total()
        tensors, be = (f"{count} tensors", "are") if count > 1 else ("1 tensor", "is")
        told = f"{tensors} ({stages}) can't be derived again and {be} taken as {LINEAGE} records"
        if self.accept_trained:
            return f"YES, as recorded: {self.name} matches its records; {told}"
        return f"IN PART: the rest of {self.name} is proven; {told} (--accept-trained trusts the records)"

    def say(self, good: bool, what: str, text: str) -> None:
        """Add a finding."""
        self.lines.append(Line(good, what, shown(text)))

    def say_all(self, what: str, texts: list[str], otherwise: str) -> None:
        """Add the problems as findings, at most `_MAX_LINES`; without problems, add one good finding."""
        for text in texts[:_MAX_LINES]:
            self.say(False, what, text)
        if len(texts) > _MAX_LINES:
            self.say(False, what, f"and {len(texts) - _MAX_LINES} more")
        if not texts:
            self.say(True, what, otherwise)
