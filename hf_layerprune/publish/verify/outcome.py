"""What `verify` finds, and the verdict that follows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from ...errors import sanitize
from ...records.lineage import FILE_NAME as LINEAGE

BASE = "base"  # the part that a line about the base names
_MAX_LINES = 20


@dataclass(frozen=True)
class Finding:
    """One finding: the part that was checked, whether it is good (`None` if that can't be checked), and the result."""

    good: bool | None
    what: str
    text: str


@dataclass
class Verification:
    """The outcome.

    Args:
        name (`str`): The model.
        lines (`list[Finding]`): The findings.
        recorded (`Counter[str]`): Number of tensors that can only be checked against the records, by the stages that
            changed them.
        accept_trained (`bool`): Whether to accept such tensors.
        without_weights (`bool`): Whether there are only records, and no model that they could prove.
        without_base (`bool`): Whether the base was not found, so that nothing could be compared with it.
        base (`str`): The base that it was compared with.
        same (`int`): Number of tensors that are the base's.
        lacked (`tuple[str, ...]`): Files of the base that the model lacks because, according to the records, the copy
            of the base that was cut lacked them.
    """

    name: str
    lines: list[Finding] = field(default_factory=list)
    recorded: Counter[str] = field(default_factory=Counter)
    accept_trained: bool = False
    without_weights: bool = False
    without_base: bool = False
    base: str = ""
    same: int = 0
    lacked: tuple[str, ...] = ()

    @property
    def consistent(self) -> bool:
        """Whether nothing contradicts the records."""
        return all(line.good is not False for line in self.lines)

    @property
    def good(self) -> bool:
        """Whether everything that affects the model's behaviour is accounted for."""
        proven = not self.recorded and not self.lacked
        return self.consistent and not self.without_weights and (proven or self.accept_trained)

    @property
    def verdict(self) -> str:
        """One line: yes, no, or in part, with the unproven part; or that there are only records, or no base."""
        if self.without_base and all(line.good is not False for line in self.lines if line.what != BASE):
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
        follows = f"{self.name} matches its records and its base, {self.base}"
        if not self.recorded and not self.lacked:
            return f"YES: {follows}"
        unproven = "; ".join(self._unproven())
        if self.accept_trained:
            return f"YES, as recorded: {follows}; {unproven}"
        rest = "the rest" if self.same else "none of the weights"
        return (
            f"IN PART: {rest} of {self.name} is proven to follow from its base, {self.base}; {unproven} "
            "(--accept-trained trusts the records)"
        )

    def _unproven(self) -> Iterator[str]:
        if count := self.recorded.total():
            stages = ", ".join(f"{name}: {count}" for name, count in sorted(self.recorded.items()))
            tensors, be = (f"{count} tensors", "are") if count > 1 else ("1 tensor", "is")
            of = "" if self.same else ", all that it has,"
            yield f"{tensors} ({stages}){of} can't be derived again and {be} taken as {LINEAGE} records"
        if self.lacked:
            yield f"{LINEAGE} says that the copy of the base that was cut lacked {', '.join(self.lacked)}"[:300]

    def add(self, good: bool | None, what: str, text: str) -> None:
        """Add a finding."""
        self.lines.append(Finding(good, what, sanitize(text)))

    def add_all(self, what: str, texts: list[str], otherwise: str) -> None:
        """Add the problems as findings, at most `_MAX_LINES`; without problems, add one good finding."""
        for text in texts[:_MAX_LINES]:
            self.add(False, what, text)
        if len(texts) > _MAX_LINES:
            self.add(False, what, f"and {len(texts) - _MAX_LINES} more")
        if not texts:
            self.add(True, what, otherwise)
