"""Options: each is declared once, with its type, default, choices, help and check. Importing this imports no torch.

A dataclass whose fields are options is all that a config, a request and a command line need:

    @dataclass(kw_only=True)
    class PruneRequest(CutOptions):
        dtype: str = option("auto", "Type of the weights", choices=DTYPES)

    add_options(parser, PruneRequest)                # --drop, --criterion, ..., --dtype
    request = options_from_args(args, PruneRequest)  # validated, as PruneRequest(drop=...) is

`docs/options.md` is made from the same declarations (`make docs`).
"""

from .amount import AMOUNTS, BUDGETS, DEFAULT_DROP, TARGET_SETTINGS, AmountOptions, drop_exactly
from .command_line import add_options, argument_dataclass, option_flags, options_from_args, to_arguments
from .declare import (
    check_choice,
    check_options,
    copy_fields,
    documented,
    option,
    option_fields,
    refuse_unused,
    set_choices,
)
from .kinds import (
    ANY_MODEL_HELP,
    DROP,
    DTYPES,
    LAYERS,
    MODEL,
    MODEL_HELP,
    PATH,
    Kind,
    check_value,
    integer,
    tuple_of,
)
from .quantities import format_bytes, format_count, format_percent, join_words, pluralize
from .shared import (
    CalibrationOptions,
    CutOptions,
    DisplayOptions,
    Options,
    ResultOptions,
    SelectionOptions,
    TuningOptions,
)
from .spelling import spell_options

__all__ = [
    "AMOUNTS", "ANY_MODEL_HELP", "BUDGETS", "DEFAULT_DROP", "DROP", "DTYPES", "LAYERS", "MODEL", "MODEL_HELP",
    "PATH", "TARGET_SETTINGS", "AmountOptions", "CalibrationOptions", "CutOptions", "DisplayOptions", "Kind",
    "Options", "ResultOptions", "SelectionOptions", "TuningOptions", "add_options", "argument_dataclass",
    "check_choice", "check_options", "check_value", "copy_fields", "documented", "drop_exactly", "format_bytes",
    "format_count", "format_percent", "integer", "join_words", "option", "option_fields", "option_flags",
    "options_from_args", "pluralize", "refuse_unused", "set_choices", "spell_options", "to_arguments", "tuple_of"
]  # fmt: skip
