"""Push a model while the Hub fails in many ways; `publish_flow.py` runs this.

Each case causes a fault, pushes, removes the fault, and pushes again. It records what readers could see in between.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.folders import snapshot
from tests.hub_server import HubServer
from tests.publish_child import TOKEN, files

if TYPE_CHECKING:
    from pathlib import Path

    from hf_layerprune.publish.requests import PushRequest

MANY = 9999


@dataclass(frozen=True)
class Case:
    """One way to fail.

    Args:
        name (`str`): What fails.
        fail (`Callable[[HubServer], object]`): Causes the fault.
        error (`str`): Part of the expected error; empty if the push should succeed in spite of the fault.
        known (`bool`): Whether the repository already has an older version of the model.
    """

    name: str
    fail: Callable[[HubServer], object]
    error: str = ""
    known: bool = False


def _commit(hub: HubServer, code: int, times: int = 1, **headers: str) -> None:
    hub.status("/commit/main", code, times, method="POST", **headers)


UNREACHABLE = "run the same command again"
REFUSED = {"errors": [{"message": '"license" must be one of [apache-2.0, ...]'}]}
CASES = [
    # A temporary fault that the Hub's client survives.
    Case("asking where to store: 503", lambda hub: hub.status("/objects/batch", 503)),
    Case("storing: 503 twice", lambda hub: hub.status("", 503, 2, prefix="/upload/")),
    Case("storing: cut off in the middle", lambda hub: hub.hang_up("", 20_000, prefix="/upload/")),
    Case("storing: the answer is lost", lambda hub: hub.lose("", prefix="/upload/")),
    Case("reading the card that is there: 500", lambda hub: hub.status("/README.md", 500), known=True),
    Case("everything is slow", lambda hub: hub.delay("", 0.05, MANY)),
    # Any other fault: the push reports it, and the next push continues.
    Case("reading the card that is there: 503 all the time",
         lambda hub: hub.status("/README.md", 503, MANY), UNREACHABLE, known=True),
    Case("asking who: 500", lambda hub: hub.status("whoami-v2", 500), UNREACHABLE),
    Case("asking who: a log-in page", lambda hub: hub.status("whoami-v2", 200, body="<html>Log in"), r"not the Hub's.*\(<html>Log"),
    Case("asking who: nothing", lambda hub: hub.status("whoami-v2", 200, body=""), r"not as expected \(Expecting value"),
    Case("looking for the repository: 503", lambda hub: hub.status("/api/models/org/model", 503), UNREACHABLE),
    Case("making it: 500", lambda hub: hub.status("/repos/create", 500), UNREACHABLE),
    Case("making it: the answer is lost", lambda hub: hub.lose("/repos/create"), UNREACHABLE),
    Case("checking the card: 429", lambda hub: hub.status("/validate-yaml", 429, Retry_After="5"), "wait 5 s, and then"),
    Case("storing: 500 all the time", lambda hub: hub.status("", 500, MANY, prefix="/upload/"), UNREACHABLE),
    Case("storing: cut off all the time", lambda hub: hub.hang_up("", 20_000, MANY, prefix="/upload/"), UNREACHABLE),
    Case("storing: a bit is flipped on the way", lambda hub: hub.garble(), "nothing was pushed to org/model: "),
    Case("storing: the address has run out", lambda hub: hub.status("", 403, MANY, prefix="/upload/"), "localhost answers 403 for org/model; run the same"),
    Case("committing: 503 all the time", lambda hub: _commit(hub, 503, MANY), UNREACHABLE),
    Case("committing: done, but the answer is lost",
         lambda hub: hub.lose("/commit/main", method="POST"), "can't reach the Hub"),
    Case("committing: cut off all the time",
         lambda hub: hub.hang_up("/commit/main", 0, MANY, method="POST"), "can't reach the Hub"),
    Case("committing: somebody was faster", lambda hub: _commit(hub, 412), "somebody else changed"),
    Case("committing: 400", lambda hub: _commit(hub, 400), "nothing was pushed to org/model: "),
    Case("committing: 500 all the time, to what is there", lambda hub: _commit(hub, 500, MANY), UNREACHABLE, known=True),
    Case("the card's YAML is refused", lambda hub: hub.status("/validate-yaml", 400, MANY, body=REFUSED),
         r"metadata of README.md \(\"license\" must be one of"),
    Case("checking the card: 400 without a reason", lambda hub: hub.status("/validate-yaml", 400, body={"errors": []}),
         r"metadata of README.md \(it gives no reason\)"),
    Case("checking the card: 400 of a proxy", lambda hub: hub.status("/validate-yaml", 400, body="<html>Blocked</html>"),
         "not the Hub's.*Blocked.*a proxy"),
    # Permissions.
    Case("the token is not known", lambda hub: hub.writers.clear(), "not valid, or has expired"),
    Case("the token runs out after the first answer", lambda hub: hub.expire(TOKEN, 1), "not valid"),
    Case("the token runs out while storing", lambda hub: hub.expire(TOKEN, 8), "not valid"),
    Case("the token may only read", lambda hub: (hub.writers.clear(), hub.tokens.update({TOKEN: None})), "may only read"),
    Case("the token is for another organisation",
         lambda hub: hub.writers.update({TOKEN: ["team"]}), "this token may not write to org/model .*under the namespace"),
    Case("the repository belongs to others", lambda hub: hub.writers.update({TOKEN: ["team"]}),
         "this token may not write to org/model", known=True),
    Case("a paid plan is needed", lambda hub: hub.status("/repos/create", 402, MANY), "nothing was pushed to org/model: "),
]  # fmt: skip


def contents(hub: HubServer) -> dict[str, bytes] | None:
    """The files on main, or `None` if there is no repository."""
    return files(hub, "org/model") if "org/model" in hub.repos else None


def commits(hub: HubServer) -> int:
    """The number of commits on main, without the initial one."""
    repo, count = hub.repos.get("org/model"), -1
    commit = repo.at("main") if repo else None
    while commit:
        count, commit = count + 1, repo.at(commit.parent) if commit.parent else None
    return count


def run(case: Case, hub: HubServer, request: PushRequest, older: PushRequest) -> dict[str, Any]:
    """Run one case, starting from an empty Hub."""
    from hf_layerprune.errors import LayerPruneError
    from hf_layerprune.publish.hub.push import push

    hub.reset()
    hub.repos.pop("org/model", None)
    hub.writers, hub.tokens = {TOKEN: None}, {}
    if case.known:
        push(older)
        hub.reset()
    before, found = contents(hub), {}
    case.fail(hub)
    begun = time.monotonic()
    try:
        push(request)
        found["error"] = ""
    except LayerPruneError as error:
        found["error"] = str(error)
    found["seconds"] = time.monotonic() - begun
    after, made = contents(hub), commits(hub) - case.known
    found["old or new"] = after in (before, before or {}, snapshot(request.model))
    found["commits"] = made
    found["stored"] = stored = [one.path for one in hub.log if one.method == "PUT" and one.status == 200]
    hub.reset()
    hub.writers, hub.tokens = {TOKEN: None}, {}
    push(request)
    sent = [one.path for one in hub.log if one.method == "PUT" and one.status == 200]
    found["sent twice"] = len(set(stored) & set(sent)) + len(sent) - len(set(sent))
    found["commits in all"] = commits(hub) - case.known
    found["the same"] = contents(hub) == snapshot(request.model)
    return found


def run_all(hub: HubServer, place: Path) -> dict[str, dict[str, Any]]:
    """Run all cases; the findings of each by its name."""
    from dataclasses import replace

    from hf_layerprune.publish.requests import PushRequest
    from tests.publish_models import pruned_from_hub

    request = PushRequest(pruned_from_hub(hub, place, "new", drop=2), "org/model")
    older = replace(request, model=pruned_from_hub(hub, place, "old", drop=3))
    found = {case.name: run(case, hub, request, older) for case in CASES}
    hub.repos.pop("org/model")
    return found
