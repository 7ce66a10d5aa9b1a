"""Making a folder so that it appears whole, and replacing one so that either the old or the new one is there."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from ..errors import CheckpointError
from .copy import sync_folder, write_failed

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
# What a folder must hold one of to be replaced: nobody's home is deleted by a slip of the keyboard.
_MODEL_FILES = ("config.json", "adapter_config.json")


@contextmanager
def new_folder(
    target: Path, *, force: bool = False, apart_from: Path | None = None, replaces: Collection[str] = _MODEL_FILES
) -> Iterator[Path]:
    """Make a folder under a temporary name, and give it its own when the block ends well.

    Args:
        target (`Path`): The folder to make.
        force (`bool`, defaults to `False`): Replace a model folder that is there. It stays until the new one is
            complete and on disk.
        apart_from (`Path`, *optional*): A file or folder that must not be written to.
        replaces (`Collection[str]`): A folder must hold one of these files to be replaced.

    Yields:
        `Path`: The folder to write into.

    Raises:
        CheckpointError: The target is in the way, or writing fails. Nothing of the new folder is left.
    """
    try:
        target = check_target(target.expanduser(), apart_from, force, replaces)
        with NewFolder(target, force) as folder:
            yield folder.path
            folder.publish()
    except OSError as error:
        raise write_failed(target, error) from error
    except SafetensorError as error:  # of its own kind, and no OSError, also when the disk is full
        raise CheckpointError(f"could not write {target}: {error}") from error


def check_target(target: Path, source: Path | None, force: bool, replaces: Collection[str] = _MODEL_FILES) -> Path:
    """Refuse a target that can't be made without touching something else.

    Args:
        target (`Path`): The folder to make.
        source (`Path`, *optional*): The file or folder that is read, if it is one.
        force (`bool`): Whether the target may be replaced.
        replaces (`Collection[str]`): A folder must hold one of these files to be replaced.

    Returns:
        `Path`: The target without any link on the way to it.

    Raises:
        CheckpointError: It is the source or overlaps with it, exists, or is no folder.
    """
    named = target
    target = Path(os.path.abspath(target))
    if target.is_symlink():
        raise CheckpointError(f"{named} is a symbolic link, and nothing is written through one; name a new folder")
    target = Path(os.path.realpath(target.parent)) / target.name
    if source is not None and source.exists():
        _check_apart(named, target, source)
    if not target.name:
        raise CheckpointError(f"{named} can't be replaced; name a new folder")
    if os.path.lexists(target):
        if not target.is_dir():
            raise CheckpointError(f"{named} is a file; name a folder to make")
        names = os.listdir(target)
        if names and not force:
            raise CheckpointError(
                f"{named} exists and is not empty; replace it with --force (force=True), or name another folder"
            )
        if names and not set(replaces) & set(names):
            raise CheckpointError(
                f"{named} holds no {' or '.join(replaces)}, so it is not replaced; remove it yourself, or name another"
            )
    for parent in target.parents:
        if os.path.lexists(parent):
            if not parent.is_dir():
                raise CheckpointError(f"{parent} is a file, so {named} can't be made in it; name another folder")
            break
    return target


def _check_apart(named: Path, target: Path, source: Path) -> None:
    base = Path(os.path.realpath(source))
    if target == base:
        raise CheckpointError(f"{named} is the source itself; write to another folder")
    if base in target.parents:
        raise CheckpointError(f"{named} is inside the source {source}; write to a folder outside it")
    if target in base.parents:
        raise CheckpointError(f"the source {source} is inside {named}; write to another folder")
    for file in source.iterdir() if source.is_dir() else ():
        if target in Path(os.path.realpath(file)).parents:
            raise CheckpointError(f"{file} of the source is a link into {named}; write to another folder")


class NewFolder:
    """A folder that is filled under a temporary name beside the target, and then takes the target's place.

    The temporary name is `.NAME.partial-XXXX`. What killed runs left under such names is removed by the next run
    for the same target.

    Args:
        target (`Path`): Where the folder will be.
        force (`bool`): Whether it may replace one that is there.
    """

    def __init__(self, target: Path, force: bool) -> None:
        self._target = target
        self._force = force
        self._lock: int | None = -1
        self.path = self._sibling("partial")

    def _sibling(self, kind: str) -> Path:
        return self._target.with_name(f".{self._target.name}.{kind}-{secrets.token_hex(4)}")

    def _siblings(self, kind: str) -> list[Path]:
        name = re.compile(rf"\.{re.escape(self._target.name)}\.{kind}-[0-9a-f]{{8}}")
        with os.scandir(self._target.parent) as entries:
            return [
                self._target.parent / entry.name
                for entry in entries
                if name.fullmatch(entry.name) and entry.is_dir(follow_symlinks=False)
            ]

    def __enter__(self) -> NewFolder:
        self._target.parent.mkdir(parents=True, exist_ok=True)
        self._clear_up()
        self.path.mkdir()
        self._lock = _lock(self.path)
        return self

    def __exit__(self, *exception: object) -> None:
        if self.path.exists():
            shutil.rmtree(self.path, ignore_errors=True)
        if self._lock is not None and self._lock >= 0:
            os.close(self._lock)

    def _clear_up(self) -> None:
        """Remove what killed runs left, and put back a target that was on its way out."""
        for old in self._siblings("old"):
            if not os.path.lexists(self._target):
                old.rename(self._target)
                if not self._force:
                    raise CheckpointError(
                        f"{self._target} was put back after a killed run; replace it with --force (force=True)"
                    )
            else:
                shutil.rmtree(old)
        for partial in self._siblings("partial"):
            lock = _lock(partial)
            if lock is None:
                raise CheckpointError(f"{self._target} is being written by another process; wait for it")
            shutil.rmtree(partial, ignore_errors=True)
            if lock >= 0:
                os.close(lock)

    def publish(self) -> None:
        """Bring the folder to disk and let it take the target's place.

        Raises:
            CheckpointError: The target has appeared meanwhile.
            OSError: The file system refused.
        """
        for path in self.path.rglob("*"):
            if path.is_dir():
                sync_folder(path)
            elif path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        sync_folder(self.path)
        try:
            os.rename(self.path, self._target)
        except OSError as error:
            if (
                error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES, errno.EPERM)
                or not self._target.is_dir()
            ):
                raise
            if not self._force:
                raise CheckpointError(
                    f"{self._target} has appeared meanwhile; replace it with --force (force=True)"
                ) from None
            self._replace()
        sync_folder(self._target.parent)

    def _replace(self) -> None:
        if _exchange(self.path, self._target):
            # What is under the temporary name now is the old folder; leaving removes it.
            return
        old = self._sibling("old")
        os.rename(self._target, old)
        try:
            os.rename(self.path, self._target)
        except OSError:
            os.rename(old, self._target)
            raise
        sync_folder(self._target.parent)
        shutil.rmtree(old, ignore_errors=True)


def _lock(folder: Path) -> int | None:
    """Lock a folder while this process lives; `None` where another process has it."""
    try:
        import fcntl
    except ImportError:  # not a POSIX system
        return -1
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        # Some network file systems know no locks.
        with suppress(OSError):
            os.close(descriptor)
        return -1
    return descriptor


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names at once, where the system can."""
    if sys.platform != "linux":
        return False
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (OSError, AttributeError):
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0
