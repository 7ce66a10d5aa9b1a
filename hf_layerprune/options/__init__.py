"""Options: each is declared once, with its type, default, choices, help and check. Importing this imports no torch.

A dataclass whose fields are options is all that a config, a request and a command line need:

    @dataclass(kw_only=True)
    class PruneRequest(CutOptions):
        dtype: str = option("auto", "Type of the weights", choices=DTYPES)

    add(parser, PruneRequest)             # --drop, --criterion, ..., --dtype
    request = gather(args, PruneRequest)  # checked, as PruneRequest(drop=...) is

`docs/options.md` is made from the same declarations (`make docs`).
"""

from .amount import AMOUNTS, BUDGETS, COUNTED_BY, DEFAULT_DROP, AmountOptions, just
from .command_line import add, arguments, gather, words_of
from .declare import bind, check, declared, documented, find, option, refuse_unused, take
from .kinds import (
    DROP,
    DTYPES,
    LAYERS,
    MODEL,
    MODEL_HELP,
    MODEL_OR_ADAPTER_HELP,
    PATH,
    Kind,
    checked,
    many,
    whole,
)
from .quantities import listed, plural, spell_bytes, spell_count, spell_share
from .shared import AnswerOptions, CalibrationOptions, ChoiceOptions, CutOptions, Options, ScreenOptions, TuningOptions

__all__ = [
    "AMOUNTS", "BUDGETS", "COUNTED_BY", "DEFAULT_DROP", "DROP", "DTYPES", "LAYERS", "MODEL", "MODEL_HELP", "MODEL_OR_ADAPTER_HELP",
    "PATH", "AmountOptions", "AnswerOptions", "CalibrationOptions", "ChoiceOptions", "CutOptions", "Kind", "Options",
    "ScreenOptions", "TuningOptions", "add", "arguments", "bind", "check", "checked", "declared", "documented", "find",
    "gather", "just", "listed", "many", "option", "plural", "refuse_unused", "spell_bytes", "spell_count", "spell_share", "take", "whole",
    "words_of",
]  # fmt: skip
