"""A push that cannot half-happen: the Hub fails in every way, and main shows the old state or the whole new one."""

from __future__ import annotations

import re
from typing import Any

import pytest

from .publish_child import run_child
from .publish_faults import CASES, Case


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All cases, and that none of them let the token into any log."""
    return run_child("tests.publish_faults", tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_push(found: dict[str, Any], case: Case) -> None:
    outcome = found[case.name]
    if case.error:
        assert re.search(case.error, outcome["error"]), outcome["error"]
        assert len(outcome["error"]) < 500
        assert "\n" not in outcome["error"]
        assert outcome["old or new"]
        assert outcome["commits"] <= (1 if "done, but" in case.name else 0)
    else:
        assert outcome["error"] == ""
        assert outcome["commits"] == 1
    # Then, with nothing failing any more: all of it, by one commit in all, and nothing sent that was there.
    assert outcome["the same"]
    assert outcome["commits in all"] == 1
    assert outcome["sent twice"] == 0
    assert outcome["seconds"] < 15
