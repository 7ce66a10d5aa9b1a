"""Write a folder so that it appears whole or not at all."""

from __future__ import annotations

import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from .errors import CheckpointError
from .files import sync_folder, write_failed

logger = logging.getLogger(__name__)


@contextmanager
def new_folder(target: Path, *, force: bool = False, apart_from: Path | None = None) -> Iterator[Path]:
    """Make a folder under a temporary name, and give it its own when the block ends well.

    Args:
        target (`Path`): The folder to make.
        force (`bool`, defaults to `False`): Replace a folder that is there. It stays until the new one is complete.
        apart_from (`Path`, *optional*): A base that must not be written to: the target may neither be it, nor lie in
            it, nor hold it.

    Yields:
        `Path`: The folder to write into.

    Raises:
        CheckpointError: The target is in the way, or writing fails. Nothing of the new folder is left.
    """
    target = target.expanduser().absolute()
    if apart_from is not None and apart_from.exists():
        base, here = apart_from.resolve(), target.resolve()
        if base == here or base in here.parents or here in base.parents:
            raise CheckpointError(f"{target} is the base, or lies in it, or holds it; name a folder apart from {base}")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise CheckpointError(f"{target} exists and is not a folder; name another one")
    if target.is_dir() and any(target.iterdir()) and not force:
        raise CheckpointError(f"{target} is not empty; name another folder, or replace it with --force")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for leftover in target.parent.glob(f".{target.name}.*.partial"):
            logger.info("removing %s, left behind by a run that was killed", leftover.name)
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        temporary.mkdir()
    except OSError as error:
        raise write_failed(target, error) from error
    try:
        yield temporary
        _sync_files(temporary)
        _rename_over(temporary, target)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise write_failed(target, error) from error
    except SafetensorError as error:  # of its own kind, and no OSError, also when the disk is full
        shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(f"could not write {target}: {error}") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _sync_files(folder: Path) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)


def _rename_over(temporary: Path, target: Path) -> None:
    if not target.exists():
        os.rename(temporary, target)
    else:
        old = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
        os.rename(target, old)
        try:
            os.rename(temporary, target)
        except OSError:
            os.rename(old, target)
            raise
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(target.parent)
