"""Refuse settings that `recipes/sft_tail.py` does not have, before anything is computed."""

from __future__ import annotations

import difflib
import importlib.util
import sys
from functools import cache
from typing import Any

from plans import HERE, UsageError


def check_settings(plans: dict[str, dict[str, Any]]) -> None:
    """Check the names of settings.

    Args:
        plans (`dict[str, dict[str, Any]]`): Training settings, by row.

    Raises:
        UsageError: There is no such setting.
    """
    known = known_settings()
    for row, settings in plans.items():
        for name in settings:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise UsageError(f"{row} sets {name!r}, which recipes/sft_tail.py does not know{hint}")


@cache
def known_settings() -> frozenset[str]:
    """The names of all settings of the recipe."""
    spec: Any = importlib.util.spec_from_file_location("sft_tail", HERE.parent / "sft_tail.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("sft_tail", module)  # dataclasses look up their module there
    spec.loader.exec_module(module)
    return frozenset(name.dest for name in module.make_parser()._actions)
