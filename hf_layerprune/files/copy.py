"""Reading and copying ranges of files, and writing a file so that it is there whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..errors import CheckpointError

# Reading into one buffer and writing it again is fastest while the buffer fits a processor's cache.
CHUNK = 1 << 20
# How much is written before the system is asked to start bringing it to disk, so that the final fsync has little to do.
WRITEBACK = 32 << 20


class FileState(NamedTuple):
    """Tells whether a file is still the one that was looked at."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of(cls, file: int | Path) -> FileState:
        """The state of a file, by path or descriptor."""
        status = os.stat(file)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class LocalFile:
    """A file that is read by range, and that must not change meanwhile.

    Args:
        path (`Path`): The file, or a symbolic link to it.

    Raises:
        CheckpointError: It is missing, unreadable, or not a regular file.
    """

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self.path = path
        self._lock = threading.Lock()
        try:
            # Looked at first: opening a pipe would wait for a writer.
            if not path.is_file():
                what = "is not a file" if os.path.lexists(path) else "does not exist"
                raise CheckpointError(f"{path} {what}; is the download complete?")
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise CheckpointError(f"could not read {path}: {error.strerror or error}") from error
        self.version = self._state()
        self.size = self.version.size

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def _state(self) -> FileState:
        return FileState.of(self._file.fileno())

    def check_unchanged(self) -> None:
        """Make sure that the file is the one that was opened.

        Raises:
            CheckpointError: It has changed.
        """
        if self._state() != self.version:
            raise self.changed()

    def changed(self) -> CheckpointError:
        """The error to raise where the file is no longer the one that was planned for."""
        return CheckpointError(f"{self.name} changed while it was read; make sure that nothing else writes it")

    def read(self, offset: int, length: int) -> bytes:
        """Read exactly `length` bytes from `offset` on.

        Raises:
            CheckpointError: The file ends before, or can't be read.
        """
        return b"".join(bytes(part) for part in self.chunks(offset, length))

    def chunks(self, offset: int, length: int) -> Iterator[memoryview]:
        """Read a range piece by piece. Each piece is only good until the next one is asked for.

        Raises:
            CheckpointError: The file ends before, or can't be read.
        """
        buffer = memoryview(bytearray(min(CHUNK, length)))
        try:
            while length:
                with self._lock:
                    self._file.seek(offset)
                    count = self._file.readinto(buffer[:length])
                if not count:
                    raise CheckpointError(
                        f"{self.name} got shorter while it was read; make sure that nothing else writes it"
                    )
                yield buffer[:count]
                offset, length = offset + count, length - count
        except OSError as error:
            raise CheckpointError(f"could not read {self.name}: {error.strerror or error}") from error

    def copy_into(self, output: BinaryIO, offset: int, length: int) -> Iterator[int]:
        """Append a range of this file to a file that is open for writing.

        Yields:
            `int`: The size of each piece, once it is written.

        Raises:
            CheckpointError: This file got shorter meanwhile.
            OSError: Writing failed.
        """
        for part in self.chunks(offset, length):
            write_all(output, part)
            yield len(part)


class _NewFile(io.FileIO):
    """An unbuffered file that is brought to disk while it is written, where the system can be asked to do so."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "x")
        self._asked = self._written = 0

    def write(self, data: Any) -> int:
        """Write some of the data, and return how many bytes."""
        count = super().write(data)
        self._written += count
        if self._written - self._asked >= WRITEBACK and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fileno(), self._asked, self._written - self._asked, os.POSIX_FADV_DONTNEED)
            self._asked = self._written
        return count


def write_all(output: BinaryIO, data: bytes | memoryview) -> None:
    """Write all of the data to an unbuffered file."""
    view = memoryview(data).cast("B")
    while view:
        view = view[output.write(view) :]


@contextmanager
def open_new(path: Path) -> Iterator[BinaryIO]:
    """Open a file that must not exist yet, not even as a link. `new_file` and `new_folder` bring it to disk later."""
    with _NewFile(path) as output:
        yield output


def check_space(target: Path, needed: int, free: int) -> None:
    """Refuse to start what can't fit.

    Args:
        target (`Path`): What is written, for the message.
        needed (`int`): How many bytes it takes.
        free (`int`): How many bytes its disk has left.

    Raises:
        CheckpointError: The disk has too little room.
    """
    if free < needed:
        raise CheckpointError(
            f"{target} needs {needed} bytes, and its disk has {free} free; make room or write elsewhere"
        )


def write_failed(target: Path, error: OSError) -> CheckpointError:
    """The error to raise for a failed write, with the way out where it is known."""
    advice = {
        errno.ENOSPC: "; make room or write elsewhere",
        getattr(errno, "EDQUOT", None): "; make room or write elsewhere",
        errno.EROFS: "; write elsewhere",
        errno.EACCES: "; write to a place where you have permission",
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


def check_file_target(
    target: Path, *, force: bool, inside: Path | None = None, apart_from: Path | None = None
) -> None:
    """Refuse a file that can't be written without touching something else.

    Args:
        target (`Path`): The file to write.
        force (`bool`): Whether it may replace a file that is there.
        inside (`Path`, *optional*): A folder that it must not lead out of, by a link or otherwise.
        apart_from (`Path`, *optional*): A file that is only read, or a folder of such files.

    Raises:
        CheckpointError: The target is a link, a folder, a device or one of the files that are read; it leads out of
            `inside`; it exists; or its folder does not.
    """
    if not target.parent.is_dir():
        raise CheckpointError(f"the folder {target.parent} does not exist; make it first")
    if inside is not None:
        plain = os.path.normpath(os.path.join(os.path.realpath(inside), os.path.relpath(target.parent, inside)))
        if os.path.realpath(target.parent) != plain or not os.path.realpath(plain).startswith(
            os.path.realpath(inside)
        ):
            raise CheckpointError(f"{target} leads out of {inside}, and nothing is written there; remove the link")
    real = Path(os.path.realpath(target))
    if apart_from is not None and apart_from.exists():
        source = Path(os.path.realpath(apart_from))
        if real == source or (real.exists() and apart_from.is_file() and apart_from.samefile(real)):
            raise CheckpointError(f"{target} is the source itself; write to another file")
        if source in real.parents:
            raise CheckpointError(f"{target} is inside {apart_from}, which is only read; write to another folder")
    if target.is_symlink():
        raise CheckpointError(f"{target} is a symbolic link, and nothing is written through one; name another file")
    if target.is_dir():
        raise CheckpointError(f"{target} is a folder; name a file to write")
    if target.exists() and not target.is_file():
        raise CheckpointError(f"{target} is not a regular file; name another one")
    if target.exists() and not force:
        raise CheckpointError(f"{target} exists; replace it with --force (force=True), or name another file")


@contextmanager
def new_file(
    target: Path, *, force: bool = False, inside: Path | None = None, apart_from: Path | None = None
) -> Iterator[Path]:
    """Write a file under a temporary name beside the target, and give it its own when the block ends well.

    Args:
        target (`Path`): The file to write.
        force (`bool`, *optional*, defaults to `False`): Replace a file that is there. It stays until the new one is
            complete and on disk.
        inside (`Path`, *optional*): A folder that the target must not lead out of, by a link or otherwise.
        apart_from (`Path`, *optional*): A file or folder that is only read.

    Yields:
        `Path`: The file to write; it does not exist yet.

    Raises:
        CheckpointError: The target is in the way, or writing fails. Nothing of the new file is left.
    """
    check_file_target(target, force=force, inside=inside, apart_from=apart_from)
    # A name of its own, so that nothing that lies there already, a link or anybody's file, is written to.
    partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        yield partial
        with partial.open("r+b") as file:
            os.fsync(file.fileno())
        if not force:
            _claim(target, partial)
        os.replace(partial, target)
        sync_folder(target.parent)
    except OSError as error:
        raise write_failed(target, error) from error
    finally:
        partial.unlink(missing_ok=True)


def _claim(target: Path, partial: Path) -> None:
    """Take a name that must still be free: a hard link, unlike a rename, fails where it is not."""
    try:
        os.link(partial, target)
    except OSError as error:  # not every file system has hard links
        if os.path.lexists(target):
            raise CheckpointError(f"{target} has appeared meanwhile; replace it with --force (force=True)") from error


def write_bytes(path: Path, data: bytes, *, inside: Path | None = None) -> None:
    """Write a file so that it is there whole or as it was: a temporary sibling, brought to disk, and renamed.

    Args:
        path (`Path`): The file; its folder exists.
        data (`bytes`): Its content.
        inside (`Path`, *optional*): A folder that the file must not lead out of.

    Raises:
        CheckpointError: The file is a link or in the way, or the file system refused.
    """
    with new_file(path, force=True, inside=inside) as partial, open_new(partial) as output:
        write_all(output, data)


def write_text(path: Path, text: str, *, inside: Path | None = None) -> None:
    """As `write_bytes`, for text in UTF-8."""
    write_bytes(path, text.encode(), inside=inside)
