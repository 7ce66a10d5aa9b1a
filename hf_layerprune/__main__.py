"""`hf-layerprune`, also as `python -m hf_layerprune`."""

from __future__ import annotations


def run() -> int:
    """Run the command line. Ctrl-C ends it without a traceback even while its modules are imported.

    Returns:
        `int`: The exit code.
    """
    try:
        from .cli import main

        return main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(run())
