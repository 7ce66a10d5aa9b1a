"""One writer at a time: a record is read, changed and written under a lock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import CheckpointError

TIMEOUT = 60.0


@contextmanager
def locked(path: Path, timeout: float = TIMEOUT) -> Iterator[None]:
    """Keep other processes from changing a record.

    Args:
        path (`Path`): The record; a lock file lies beside it as long as the lock is held.
        timeout (`float`, defaults to 60): Seconds to wait for another process.

    Raises:
        CheckpointError: Another process kept the lock, or the folder can't be written to.
    """
    from filelock import FileLock, Timeout

    place = path.with_name(f".{path.name}.lock")
    lock = FileLock(place)
    try:
        lock.acquire(timeout=timeout)
    except Timeout as error:
        raise CheckpointError(
            f"{path} is being written by another process, for more than {timeout:.0f} s; wait for it, or remove "
            f"{place.name} if it was left by a machine that is gone"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} can't be locked: {error.strerror or error}; write where you may") from error
    try:
        yield
    finally:
        with suppress(OSError):  # a waiting process notices that its lock file is gone, and makes a new one
            place.unlink()
        lock.release()
