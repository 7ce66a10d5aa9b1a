"""The types of the columns of JSON rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError
from .json_file import JSON_TYPES

if TYPE_CHECKING:
    from datasets import Features

MAX_COLUMNS = 1000
_MAX_INT = 2**63  # of Arrow's whole numbers
_MAX_EXACT_INT = 2**53  # as a float


class RowTypes:
    """Collects the types of rows, and refuses rows whose columns are not of one type.

    Inside lists and objects, types and keys may differ, as they do in the arguments of tool calls. Such a column can't
    have a type of Arrow's, and is stored as JSON.
    """

    def __init__(self) -> None:
        self.columns: dict[str, _Type] = {}

    def add_row(self, row: dict[str, Any], where: str) -> None:
        """Take a row into account; `where` names it in errors.

        Raises:
            CheckpointError: A column has another type than before, or a number is too large; or there are more than
                1,000 columns.
        """
        for name, value in row.items():
            column = self.columns.get(name)
            if column is None:
                if len(self.columns) == MAX_COLUMNS:
                    raise CheckpointError(f"{where}: with {name!r}, the rows have more than {MAX_COLUMNS:,} columns")
                if "\0" in name:
                    raise CheckpointError(f"{where}: the column {name!r} has a NUL in its name")
                column = self.columns[name] = _Type()
            if value is not None and column.kind is not None and JSON_TYPES[type(value)] != JSON_TYPES[column.kind]:
                now, then = JSON_TYPES[type(value)], JSON_TYPES[column.kind]
                raise CheckpointError(
                    f"{where}: {name} is {now}, but {then} in the rows before; a column needs one type"
                )
            _check_numbers(value, f"{where}: {name}")
            column.add_value(value)

    def features(self) -> Features:
        """The types, for `datasets`."""
        from datasets import Features, Json

        return Features({name: Json() if one.is_mixed() else one.feature() for name, one in self.columns.items()})

    def json_columns(self) -> tuple[str, ...]:
        """The names of the columns that are stored as JSON."""
        return tuple(name for name, column in self.columns.items() if column.is_mixed())


class _Type:
    """The type of what is found in one place."""

    __slots__ = ("differs", "inside", "kind", "large")

    def __init__(self) -> None:
        self.kind: type | None = None
        self.differs = False  # in its type, or in its keys
        self.large = False  # a whole number that no float holds was seen
        self.inside: dict[str, _Type] = {}  # of an object, by key; of a list, under ""

    def add_value(self, value: Any) -> None:
        if value is None or self.differs:
            return
        kind = type(value)
        if self.kind is None:
            self.kind = kind
            self.inside = {key: _Type() for key in value} if kind is dict else {"": _Type()} if kind is list else {}
        self.large |= kind is int and abs(value) > _MAX_EXACT_INT
        if kind is not self.kind:
            self.differs = {kind, self.kind} != {int, float}
            self.kind = float
        elif kind is dict:
            # Arrow has no object without keys, and ends a name at a NUL.
            self.differs = not value or value.keys() != self.inside.keys() or "\0" in "".join(value)
        self.differs |= self.large and self.kind is float
        if self.differs:
            self.inside = {}
        elif kind is dict:
            for key, part in value.items():
                self.inside[key].add_value(part)
        elif kind is list:
            for part in value:
                self.inside[""].add_value(part)

    def is_mixed(self) -> bool:
        return self.differs or any(part.is_mixed() for part in self.inside.values())

    def feature(self) -> Any:
        from datasets import List, Value

        if self.kind is dict:
            return {key: part.feature() for key, part in self.inside.items()}
        if self.kind is list:
            return List(self.inside[""].feature())
        names = {bool: "bool", int: "int64", float: "float64", str: "string"}
        return Value(names[self.kind] if self.kind else "null")


def _check_numbers(value: Any, where: str) -> None:
    if type(value) is int and not -_MAX_INT <= value < _MAX_INT:
        raise CheckpointError(f"{where} has a number of more than 64 bits; write it as text")
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_numbers(part, where)
