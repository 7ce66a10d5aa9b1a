"""A lock for reading, changing and writing a record."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CheckpointError

TIMEOUT = 60.0


@contextmanager
def locked(path: Path, timeout: float = TIMEOUT) -> Iterator[None]:
    """Prevent other processes from changing a record. Meanwhile, there is a lock file next to it.

    Raises:
        CheckpointError: Another process holds the lock, or the folder is not writable.
    """
    from filelock import FileLock, Timeout

    lock_path = path.with_name(f".{path.name}.lock")
    lock = FileLock(lock_path)
    try:
        lock.acquire(timeout=timeout)
    except Timeout as error:
        raise CheckpointError(
            f"{path} has been locked by another process for more than {timeout:.0f} s; wait for it, or remove "
            f"{lock_path.name} if that process no longer exists"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be locked: {error.strerror or error}; write to a folder where you have permission"
        ) from error
    try:
        yield
    finally:
        with suppress(OSError):  # a waiting process notices that the lock file is gone and creates a new one
            lock_path.unlink()
        lock.release()
