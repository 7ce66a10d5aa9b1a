"""Copying ranges of files without passing them through Python, and writing so that nothing is half written.

Both kinds of checkpoint (`checkpoint/` for safetensors folders, `gguf/`) are cut by copying byte ranges into
a temporary sibling of the target, bringing it to disk and renaming it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import sys
from collections.abc import Hashable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, Protocol

from ..errors import CheckpointError

# One call of the kernel's own copying. It stays interruptible, and a progress bar moves a few times a second.
KERNEL_CHUNK = 64 << 20
# Reading into memory and writing again is fastest while the chunk fits a processor's cache.
BUFFER_CHUNK = 1 << 20
# Two ranges can share blocks on disk where both start at the same place within a page.
PAGE = 4096
_SYNC_FILE_RANGE_WRITE = 2
# The errors by which the kernel says that it can't copy between these two files in this way at all.
_NOT_THIS_WAY = {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF, errno.ENOTSOCK}


class FileState(NamedTuple):
    """What tells whether a file is still the one that was looked at."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: int | Path) -> FileState:
        """The state of a file, by path or descriptor."""
        found = os.stat(file)
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


class Source(Protocol):
    """Something that bytes are cut from: a local file, or a remote one."""

    name: str
    size: int

    @property
    def version(self) -> Hashable:
        """What changes when the content does."""

    def read(self, offset: int, length: int) -> bytes:
        """Exactly these bytes, or a `CheckpointError`."""

    def copy_into(self, output: int, offset: int, length: int) -> Iterator[int]:
        """Append these bytes to an open file descriptor, yielding the size of each chunk once it is written."""


class LocalFile:
    """A `Source` in the file system, from which the kernel copies.

    Args:
        path (`Path`): The file, or a symbolic link to it.

    Raises:
        CheckpointError: It is missing, unreadable or no regular file.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.path = path
        try:
            # Looked at first: opening a pipe would wait for a writer.
            if not path.is_file():
                what = "is not a file" if os.path.lexists(path) else "does not exist"
                raise CheckpointError(f"{path} {what}; is the download complete?")
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise CheckpointError(f"could not read {path}: {error.strerror or error}") from error
        self.size = os.fstat(self._file).st_size

    @property
    def version(self) -> FileState:
        """What changes when the content does."""
        return FileState.of(self._file)

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._file)

    def read(self, offset: int, length: int) -> bytes:
        """Read a range.

        Args:
            offset (`int`): Where it starts.
            length (`int`): How long it is.

        Returns:
            `bytes`: Exactly that many bytes.

        Raises:
            CheckpointError: The file ends before, or can't be read.
        """
        parts: list[bytes] = []
        try:
            while length:
                part = os.pread(self._file, length, offset)
                if not part:
                    raise _shorter(self.name)
                parts.append(part)
                offset, length = offset + len(part), length - len(part)
        except OSError as error:
            raise CheckpointError(f"could not read {self.name}: {error.strerror or error}") from error
        return b"".join(parts)

    def copy_into(self, output: int, offset: int, length: int) -> Iterator[int]:
        """Append a range of this file to another.

        Args:
            output (`int`): Descriptor of a file that is open for writing.
            offset (`int`): Where the range starts here.
            length (`int`): How long it is.

        Yields:
            `int`: The size of each chunk, once it is written.

        Raises:
            CheckpointError: This file got shorter meanwhile.
            OSError: Writing failed.
        """
        yield from Copier(self._file, output, name=self.name).copy(offset, length)


class Copier:
    """Copies ranges of one open file to the end of another, in the fastest way that the kernel offers.

    Args:
        source (`int`): Descriptor to read from.
        output (`int`): Descriptor to write to, at its position.
        name (`str`): What to call the source in errors.
        chunk (`int`, *optional*, defaults to `KERNEL_CHUNK`): The most that is copied at once.
    """

    def __init__(self, source: int, output: int, *, name: str, chunk: int = KERNEL_CHUNK) -> None:
        self._source = source
        self._output = output
        self._name = name
        self._chunk = chunk
        self._ways = [_copy_file_range, _sendfile]

    def copy(self, offset: int, length: int) -> Iterator[int]:
        """Copy a range, yielding the size of each chunk that is done."""
        end = offset + length
        if length >= PAGE and (lead := -offset % PAGE) and lead == -os.lseek(self._output, 0, os.SEEK_CUR) % PAGE:
            # From a page's start on, file systems with reflinks can share the blocks instead of copying them.
            yield from self._copy_all(offset, offset + lead)
            offset += lead
        yield from self._copy_all(offset, end)

    def _copy_all(self, offset: int, end: int) -> Iterator[int]:
        while offset < end:
            count = self._copy_chunk(offset, min(end - offset, self._chunk))
            offset += count
            yield count

    def _copy_chunk(self, offset: int, length: int) -> int:
        while self._ways:
            try:
                if count := self._ways[0](self._source, self._output, offset, length):
                    return count
            except OSError as error:
                if error.errno not in _NOT_THIS_WAY:
                    raise
            # Not possible here, or the file has ended: the next way, or reading, tells which.
            del self._ways[0]
        data = os.pread(self._source, min(length, BUFFER_CHUNK), offset)
        if not data:
            raise _shorter(self._name)
        write_all(self._output, data)
        return len(data)


def _copy_file_range(source: int, output: int, offset: int, length: int) -> int:
    if not hasattr(os, "copy_file_range"):
        return 0
    return os.copy_file_range(source, output, length, offset)


def _sendfile(source: int, output: int, offset: int, length: int) -> int:
    # Elsewhere than on Linux, it only sends to sockets.
    if sys.platform != "linux":
        return 0
    return os.sendfile(output, source, offset, length)


def _shorter(name: str) -> CheckpointError:
    return CheckpointError(f"{name} got shorter while it was read; make sure that nothing else writes it")


def write_all(output: int, data: bytes | memoryview) -> None:
    """Write all of the data to a descriptor."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(output, view) :]


class Writeback:
    """Has the system write a growing file to disk while it grows, so that little is left to wait for at its end.

    Args:
        output (`int`): Descriptor of the file.
    """

    def __init__(self, output: int) -> None:
        self._output = output
        self._begun = self._written = 0
        self._start = None
        if sys.platform == "linux":
            with suppress(OSError, AttributeError):
                self._start = ctypes.CDLL(None).sync_file_range
                self._start.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]

    def add(self, count: int) -> None:
        """Say that this many bytes more were written."""
        self._written += count
        if self._start and self._written - self._begun >= KERNEL_CHUNK:
            # A hint: whether it is taken up changes nothing but the time.
            self._start(self._output, self._begun, self._written - self._begun, _SYNC_FILE_RANGE_WRITE)
            self._begun = self._written


def check_space(target: Path, needed: int, free: int) -> None:
    """Refuse to start what can't fit.

    Raises:
        CheckpointError: The disk has less than the needed bytes free.
    """
    if free < needed:
        raise CheckpointError(
            f"{target} needs {needed} bytes, and its disk has {free} free; make room or write elsewhere"
        )


def write_failed(target: Path, error: OSError) -> CheckpointError:
    """The error to raise for a failed write, with the way out where it is known."""
    advice = {
        errno.ENOSPC: "; make room or write elsewhere",
        errno.EDQUOT: "; make room or write elsewhere",
        errno.EROFS: "; write elsewhere",
        errno.EACCES: "; write where you may",
    }.get(error.errno or 0, "")
    return CheckpointError(f"could not write {target}: {error.strerror or error}{advice}")


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to disk."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a file so that it is there whole or as it was: a temporary sibling, brought to disk, and renamed.

    Args:
        path (`Path`): The file; its folder exists.
        text (`str`): Its content.

    Raises:
        CheckpointError: The file system refused.
    """
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        with partial.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        sync_folder(path.parent)
    except OSError as error:
        raise write_failed(path, error) from error
    finally:
        partial.unlink(missing_ok=True)
