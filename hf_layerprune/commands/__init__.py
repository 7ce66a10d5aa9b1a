"""The commands, one module each: `HELP`, `DESCRIPTION`, `add_arguments(parser)` and `run(args)`.

A module here turns words into one call of the room that does the work; it imports that room inside `run`, so that
`--help` stays instant. To add a command, add its module and its name below, in the order in which people meet them.
"""

from __future__ import annotations

COMMANDS = (
    "prune",
    "inspect",
    "rank",
    "eval",
    "bench",
    "card",
    "push",
    "verify",
    "chat",
)
