"""Fetching the weight files of a plan from the Hub, so that a run that breaks off is taken up by the next one.

The files grow in `.NAME.download-HASH` beside the target, where the hash stands for the repository, the commit and the
plan. A journal there lists the ranges that are on disk. When everything is there, the files move into the new folder
and the rest is removed; until then, nothing of them is under the target's name.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from ..errors import CheckpointError
from ..files.copy import sync_folder, write_all
from .plan import CheckpointPlan, Rows, ShardPlan, Span
from .ranges import BrokenDownloadError, WrongAnswerError
from .write import take_columns

if os.name == "posix":
    import fcntl

logger = logging.getLogger(__name__)

# One request. Large enough that the time to the first byte doesn't count, small enough to share out evenly.
CHUNK = 16 << 20
# Rows of which only some columns stay are held in memory whole, by each of the workers.
ROWS_CHUNK = 4 << 20
WORKERS = 8
_JOURNAL = "journal"
_LINE = re.compile(rb"(\d{1,5}) (\d{1,20}) (\d{1,20})")
_to_disk = getattr(os, "fdatasync", os.fsync)


class _Task(NamedTuple):
    """What one worker fetches at once: which file, where in it, and what."""

    shard: int
    at: int
    piece: Span | Rows


class Download:
    """The weight files of a plan that are on the Hub, on their way into a folder.

    Opening it removes what other plans left for the same target.

    Args:
        plan (`CheckpointPlan`): What to fetch.
        parent (`Path`): The folder in which the target will be.
        name (`str`): The target's name.

    Raises:
        CheckpointError: Another process is at it.
        OSError: The folder can't be written.
    """

    def __init__(self, plan: CheckpointPlan, parent: Path, name: str) -> None:
        self._plan = plan
        self._shards = [shard for shard in plan.shards if shard.source in plan.remote]
        self._key = _fingerprint(plan, self._shards)
        self.folder = parent / f".{name}.download-{self._key[:16]}"
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._done: list[list[tuple[int, int]]] = [[] for _ in self._shards]
        _remove_others(parent, name, self.folder)
        self.folder.mkdir(exist_ok=True)
        if self.folder.is_symlink():
            raise CheckpointError(f"{self.folder} is a link, and nothing is written through one; remove it")

    @property
    def size(self) -> int:
        """How many bytes the files will have."""
        return sum(shard.size for shard in self._shards)

    @property
    def _header_bytes(self) -> int:
        return sum(len(shard.header) for shard in self._shards)

    @property
    def done(self) -> int:
        """How many bytes of them are on disk."""
        return sum(end - start for ranges in self._done for start, end in ranges)

    def __enter__(self) -> Download:
        self._stack = ExitStack()
        with self._stack:
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
            self._journal = self._open(_JOURNAL, flags | os.O_APPEND)
            if os.name == "posix":
                try:
                    fcntl.flock(self._journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise CheckpointError(f"{self.folder} is being written by another process; wait for it") from None
            self._files = [self._open(shard.target, flags) for shard in self._shards]
            self._read_journal()
            for file, shard in zip(self._files, self._shards, strict=True):
                os.ftruncate(file, shard.size)
                _write_at(file, shard.header, 0)
            sync_folder(self.folder)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *rest: object) -> None:
        self._stack.close()
        # What a server that can't be trusted has sent is not built upon, and next to nothing is not kept.
        if isinstance(error, WrongAnswerError) or (kind and self.done <= self._header_bytes):
            shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self, name: str, flags: int) -> int:
        descriptor = os.open(self.folder / name, flags, 0o666)
        self._stack.callback(os.close, descriptor)
        return descriptor

    def _read_journal(self) -> None:
        """Take up what the journal lists and the files can hold; begin a new one if it is another plan's."""
        lines = os.pread(self._journal, os.fstat(self._journal).st_size, 0).split(b"\n")
        if lines[0] != self._key.encode():
            os.ftruncate(self._journal, 0)
            write_all(self._journal, self._key.encode() + b"\n")
            return
        found: list[list[tuple[int, int]]] = [[] for _ in self._shards]
        for match in map(_LINE.fullmatch, lines[1:-1]):
            number, start, end = map(int, match.groups()) if match else (len(found), 0, 0)
            if number < len(found) and start < end <= self._shards[number].size:
                found[number].append((start, end))
        if lines[-1]:  # torn by a crash; what follows must start on a line of its own
            write_all(self._journal, b"\n")
        for number, ranges in enumerate(found):
            if os.fstat(self._files[number]).st_size == self._shards[number].size:
                self._done[number] = _joined(ranges)

    def fetch(self, advance: Callable[[int], object], workers: int = WORKERS) -> None:
        """Fetch what is missing.

        Args:
            advance (`Callable[[int], object]`): Called with the size of each part that is written.
            workers (`int`, *optional*, defaults to `WORKERS`): How many requests run at once.

        Raises:
            BrokenDownloadError: Something stays missing. What is there is kept for the next run.
            CheckpointError: The server can't be trusted, or refuses.
            OSError: Writing failed.
        """
        for number, shard in enumerate(self._shards):
            self._record(number, 0, len(shard.header))
        tasks = list(self._tasks())
        logger.info(
            "fetching %d bytes in %d requests, %d at once; the base has %d, and %d are here from an earlier run",
            sum(_fetched(task.piece) for task in tasks),
            len(tasks),
            workers,
            self._plan.source_bytes,
            self.done - self._header_bytes,
        )

        def locked_advance(count: int) -> None:
            with self._lock:
                advance(count)

        locked_advance(self.done)
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(self._fetch, task, locked_advance) for task in tasks]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException as error:
                self._stop.set()
                pool.shutdown(wait=True, cancel_futures=True)
                if isinstance(error, BrokenDownloadError):
                    raise BrokenDownloadError(
                        f"{error}; {self.size - self.done} of {self.size} bytes are missing: run the same command "
                        "again, and it goes on where it stopped"
                    ) from error
                raise

    def _tasks(self) -> Iterator[_Task]:
        for number, shard in enumerate(self._shards):
            at = len(shard.header)
            for piece in shard.pieces:
                for part in self._parts(piece):
                    for start, end in _missing(self._done[number], at, at + part.length):
                        if isinstance(part, Rows):
                            yield _Task(number, at, part)
                            break
                        yield _Task(number, start, Span(part.offset + start - at, end - start))
                    at += part.length

    @staticmethod
    def _parts(piece: Span | Rows) -> Iterator[Span | Rows]:
        if isinstance(piece, Span):
            for start in range(0, piece.length, CHUNK):
                yield Span(piece.offset + start, min(CHUNK, piece.length - start))
            return
        # Of a matrix that loses columns, whole rows are fetched: a request for each stretch of each row would cost
        # far more than the bytes that go unused.
        at_once = max(1, ROWS_CHUNK // piece.row_bytes)
        for row in range(0, piece.rows, at_once):
            count = min(at_once, piece.rows - row)
            yield Rows(piece.offset + row * piece.row_bytes, count, piece.row_bytes, piece.columns)

    def _fetch(self, task: _Task, advance: Callable[[int], object]) -> None:
        number, at, piece = task
        source, output = self._plan.remote[self._shards[number].source], self._files[number]
        parts = source.stream(piece.offset, _fetched(piece), self._stop)
        if isinstance(piece, Rows):
            parts = iter([take_columns(b"".join(parts), piece)])
        try:
            for data in parts:
                _write_at(output, data, at)
                at += len(data)
                advance(len(data))
                if self._stop.is_set():
                    break
        finally:
            if at > task.at:
                _to_disk(output)
                self._record(number, task.at, at)

    def _record(self, number: int, start: int, end: int) -> None:
        """Note that a range is on disk."""
        with self._lock:
            if not _missing(self._done[number], start, end):
                return
            self._done[number] = _joined([*self._done[number], (start, end)])
            write_all(self._journal, b"%d %d %d\n" % (number, start, end))
            _to_disk(self._journal)

    def move_into(self, folder: Path) -> None:
        """Give the files to a folder, when all of them are complete.

        Args:
            folder (`Path`): The folder, on the same file system.

        Raises:
            CheckpointError: Something is missing.
        """
        if self.done != self.size:
            raise CheckpointError(f"{self.folder} did not come out as planned; delete it and run the command again")
        for shard in self._shards:
            os.rename(self.folder / shard.target, folder / shard.target)
        shutil.rmtree(self.folder)


def _fingerprint(plan: CheckpointPlan, shards: list[ShardPlan]) -> str:
    """What a download is told apart by: the content that it reads, and where each byte goes."""
    repos = {plan.remote[shard.source].repo for shard in shards}
    files = [
        (shard.source, repr(shard.version), shard.target, hashlib.sha256(shard.header).hexdigest(), repr(shard.pieces))
        for shard in shards
    ]
    return hashlib.sha256(json.dumps([sorted(repos), files]).encode()).hexdigest()


def _remove_others(parent: Path, name: str, mine: Path) -> None:
    pattern = re.compile(rf"\.{re.escape(name)}\.download-[0-9a-f]{{16}}")
    with os.scandir(parent) as entries:
        found = [Path(entry.path) for entry in entries if pattern.fullmatch(entry.name)]
    for folder in found:
        if folder != mine and folder.is_dir() and not folder.is_symlink():
            logger.info("removing %s, which another cut left unfinished", folder)
            shutil.rmtree(folder, ignore_errors=True)


def _fetched(piece: Span | Rows) -> int:
    return piece.length if isinstance(piece, Span) else piece.rows * piece.row_bytes


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted, without overlaps and seams."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def _missing(ranges: list[tuple[int, int]], start: int, end: int) -> list[tuple[int, int]]:
    """What of a range is not among sorted ranges."""
    missing = []
    for there, until in ranges:
        if until <= start or there >= end:
            continue
        if start < there:
            missing.append((start, there))
        start = max(start, until)
    if start < end:
        missing.append((start, end))
    return missing


def _write_at(output: int, data: bytes | memoryview, at: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(output, view, at)
        view, at = view[count:], at + count
