"""The commands, a module each: `HELP`, `DESCRIPTION`, `Request` (a dataclass of options), and `run(request)`.

A module here turns a request into one call of the room that does the work; it imports that room inside `run`, so that
`--help` stays instant. To add a command, add its module and its name below, in the order in which people meet them.
"""

from __future__ import annotations

COMMANDS = ("prune", "inspect", "rank", "eval", "bench", "card", "push", "verify", "chat")
