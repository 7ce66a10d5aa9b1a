"""Read and copy ranges of files, and write files atomically."""

from __future__ import annotations

import errno
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..errors import CheckpointError, ExistingOutputError
from ..options import format_bytes
from .locks import lock_folder, unlock_folder

CHUNK = 1 << 20  # fits into the processor's cache
# Bytes to write before the system is asked to start flushing them, so that the final fsync has little left to do.
WRITEBACK = 32 << 20


class FileState(NamedTuple):
    """Identifies a version of a file, to detect later changes."""

    device: int
    inode: int
    size: int
    mtime_ns: int

    @classmethod
    def of_file(cls, file: int | Path) -> FileState:
        """The state of a file, given by path or descriptor; of a link, its own."""
        status = os.stat(file, follow_symlinks=isinstance(file, int))
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


class LocalFile:
    """A file, or a symbolic link to one, that is read by range and must not change while it is open.

    Raises:
        CheckpointError: The file is missing, unreadable, or not a regular file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            # Checked first, since opening a pipe would wait for a writer.
            if not path.is_file():
                what = "is not a file" if os.path.lexists(path) else "does not exist"
                raise CheckpointError(f"{path} {what}; is the download complete?")
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise CheckpointError(f"could not read {path}: {error.strerror or error}") from error
        self.version = FileState.of_file(self._file.fileno())
        self.size = self.version.size

    def __enter__(self) -> LocalFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def check_unchanged(self, version: FileState | None = None) -> None:
        """Check that the file has not changed since it was opened, or since another state.

        Raises:
            CheckpointError: The file has changed.
        """
        if FileState.of_file(self._file.fileno()) != (version or self.version):
            raise CheckpointError(
                f"{self.path} changed while it was being read; make sure that nothing else writes to it"
            )

    def read(self, offset: int, length: int) -> bytes:
        """Read exactly `length` bytes starting at `offset`.

        Raises:
            CheckpointError: The file is too short or can't be read.
        """
        return b"".join(bytes(part) for part in self.chunks(offset, length))

    def chunks(self, offset: int, length: int) -> Iterator[memoryview]:
        """Read a range in chunks. Each chunk is valid only until the next one is requested.

        Raises:
            CheckpointError: The file is too short or can't be read.
        """
        buffer = memoryview(bytearray(min(CHUNK, length)))
        try:
            self._file.seek(offset)
            while length:
                count = self._file.readinto(buffer[:length])
                if not count:
                    raise CheckpointError(
                        f"{self.path} became shorter while it was being read; make sure that nothing else writes to it"
                    )
                yield buffer[:count]
                length -= count
        except OSError as error:
            raise CheckpointError(f"could not read {self.path}: {error.strerror or error}") from error

    def copy_into(self, output: BinaryIO, offset: int, length: int) -> Iterator[int]:
        """Append a range of this file to a file open for writing; yields the size of each chunk once it is written.

        Raises:
            CheckpointError: This file has become shorter.
            OSError: Writing failed.
        """
        flushed = output.tell()
        for part in self.chunks(offset, length):
            output.write(part)
            yield len(part)
            if (end := output.tell()) - flushed >= WRITEBACK and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(output.fileno(), flushed, end - flushed, os.POSIX_FADV_DONTNEED)
                flushed = end


def check_inside(path: Path, folder: Path) -> None:
    """Refuse to copy a file that is a link out of its model folder, since the target may be private.

    Links into the Hub client's cache are allowed: its snapshots consist of them, as do folders that older versions of it
    downloaded to.

    Raises:
        CheckpointError: It is such a link.
    """
    real = Path(os.path.realpath(path))
    if Path(os.path.realpath(folder)) not in real.parents and not real.match("models--*/blobs/*"):
        raise CheckpointError(f"{path} is a link out of {folder}, and would be copied; put the file itself there")


def copy_model_file(path: Path, folder: Path, target: Path) -> None:
    """Copy a file of a model folder, in place of any that is there, unless it is or becomes a link out of the folder.

    Raises:
        CheckpointError: It can't be read, it is such a link, or it changed.
        OSError: Writing failed.
    """
    with LocalFile(path) as source:
        check_inside(path, folder)
        source.check_unchanged(FileState.of_file(Path(os.path.realpath(path))))
        target.unlink(missing_ok=True)  # not written through, since it may be a link
        with target.open("xb") as output:
            for _ in source.copy_into(output, 0, source.size):
                pass


def check_space(target: Path, needed: int, free: int) -> None:
    """Check that there is enough disk space for a file or folder, all in bytes.

    Raises:
        CheckpointError: There is not enough disk space.
    """
    if free < needed:
        raise CheckpointError(
            f"{target} needs {format_bytes(needed)}, but its disk has only {format_bytes(free)} free; free some space or "
            "write elsewhere"
        )


def write_error(target: Path, error: Exception) -> CheckpointError:
    """The error to raise for a failed write; that of safetensors is not an `OSError`, even when the disk is full."""
    why = (isinstance(error, OSError) and error.strerror) or error
    denied = isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS)
    return CheckpointError(
        f"could not write {target}: {why}; {'' if denied else 'free some space, or '}write elsewhere"
    )


def sync_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def check_no_overlap(target: Path, source: Path) -> None:
    """Check that a target and a source do not overlap: neither is the other, or inside it.

    Raises:
        CheckpointError: They overlap.
    """
    real, base = (Path(os.path.realpath(path)) for path in (target, source))
    if real == base or (source.is_file() and real.exists() and source.samefile(real)):
        raise CheckpointError(f"{target} is the source itself; write elsewhere")
    if base in real.parents:
        raise CheckpointError(f"{target} is inside {source}, which is only read; write elsewhere")
    for path in (source, *(source.iterdir() if source.is_dir() else ())):
        if real in Path(os.path.realpath(path)).parents:
            raise CheckpointError(f"{path}, which is only read, is inside {target}; write elsewhere")


def check_file_target(target: Path, *, force: bool, inside: Path | None = None, source: Path | None = None) -> None:
    """Check that a file can be written without affecting any other file.

    Args:
        target (`Path`): The file to write.
        force (`bool`): Whether it may replace an existing file.
        inside (`Path`, *optional*): A folder that must contain the target, also after links are resolved.
        source (`Path`, *optional*): A file that is only read, or a folder of such files.

    Raises:
        CheckpointError: The target is a link, a folder, a device or one of the files that are only read; it is outside
            `inside`; it exists; or its folder does not exist.
    """
    if not target.parent.is_dir():
        raise CheckpointError(f"the folder {target.parent} does not exist; create it first")
    if inside is not None and not Path(os.path.realpath(target.parent)).is_relative_to(os.path.realpath(inside)):
        raise CheckpointError(f"{target} leads out of {inside}, and nothing is written outside it; remove the link")
    if source is not None and source.exists():
        check_no_overlap(target, source)
    if target.is_symlink() or (target.exists() and not target.is_file()):
        raise CheckpointError(f"{target} is a link, a folder or a device; specify another file")
    if target.exists() and not force:
        raise ExistingOutputError(f"{target} exists; replace it with force=True, or choose another file")


@contextmanager
def new_file(
    target: Path, *, force: bool = False, inside: Path | None = None, source: Path | None = None
) -> Iterator[Path]:
    """Write a file under a temporary name next to the target, and rename it when the block succeeds.

    An existing file, which `force` allows to replace, stays until the new one is complete and on disk. The temporary
    file is empty when the block begins; those that killed runs left of the same target are removed. See
    [`check_file_target`] for the arguments.

    Raises:
        CheckpointError: The target can't be written or replaced, another process is writing it, which `force` allows,
            too, or writing fails. The temporary file is removed.
    """
    from safetensors import SafetensorError

    check_file_target(target, force=force, inside=inside, source=source)
    try:
        _clean_up_leftovers(target, force)
        with _partial_file(target) as partial:
            yield partial
            with partial.open("r+b") as file:
                os.fsync(file.fileno())
            if not force:
                _claim(target, partial)
            os.replace(partial, target)
            sync_folder(target.parent)
    except (OSError, SafetensorError) as error:
        raise write_error(target, error) from error


@contextmanager
def _partial_file(target: Path) -> Iterator[Path]:
    """An empty file, locked, under a temporary name next to a target; it is removed if it still has that name at the end."""
    while True:
        # A random name, so that no existing link or file is written to.
        partial = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
        partial.touch(exist_ok=False)
        # Until it is locked, another process may take it for what a killed run left.
        with suppress(BlockingIOError, FileNotFoundError):
            lock = lock_folder(partial)
            if partial.exists():
                break
            unlock_folder(lock)
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)
        unlock_folder(lock)


def _clean_up_leftovers(target: Path, force: bool) -> None:
    leftover = re.compile(rf"\.{re.escape(target.name)}\.partial-[0-9a-f]{{8}}")
    for path in [target.with_name(name) for name in os.listdir(target.parent) if leftover.fullmatch(name)]:
        if path.is_symlink() or not path.is_file():
            continue
        try:
            lock = lock_folder(path)
        except BlockingIOError:
            if force:
                continue
            raise CheckpointError(f"{target} is being written by another process; wait for it") from None
        except OSError:  # it has become the target, or is another user's
            continue
        if lock is not None:  # where nothing can be locked, it may be another process's
            with suppress(OSError):
                path.unlink()
            unlock_folder(lock)


def _claim(target: Path, partial: Path) -> None:
    """Claim a name that must not exist: unlike a rename, a hard link fails if it does."""
    try:
        os.link(partial, target)
    except OSError as error:  # not every file system has hard links
        if os.path.lexists(target):
            raise ExistingOutputError(f"{target} was created in the meantime; replace it with force=True") from error


def write_bytes(path: Path, data: bytes, *, inside: Path | None = None) -> None:
    """Write a file in an existing folder atomically: write a temporary file, flush it to disk, and rename it.

    Raises:
        CheckpointError: The file is a link, leads out of the folder `inside`, can't be replaced, or writing fails.
    """
    with new_file(path, force=True, inside=inside) as partial, partial.open("wb") as output:
        output.write(data)


def write_text(path: Path, text: str, *, inside: Path | None = None) -> None:
    """Write text as UTF-8, as `write_bytes` does."""
    write_bytes(path, text.encode(), inside=inside)
