"""Locks on folders and files that last as long as the process that took them."""

from __future__ import annotations

import os
from pathlib import Path


def lock_folder(folder: Path, *, shared: bool = False) -> int | None:
    """Lock a folder, or a file, for the lifetime of this process, if the system supports it.

    With `shared`, others may hold a shared lock at the same time. Returns what [`unlock_folder`] takes.

    Raises:
        BlockingIOError: Another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None  # some network file systems do not support locks
    return descriptor


def unlock_folder(descriptor: int | None) -> None:
    """Unlock a folder, for processes that were forked meanwhile, too."""
    if descriptor is not None:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)
