"""Create and replace folders atomically."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path

from ..errors import CheckpointError, ExistingOutputError, LayerPruneError
from .copy import check_no_overlap, sync_folder, write_error
from .json_file import read_object
from .locks import lock_folder, unlock_folder

# The names of licences, notices and use policies, without what may follow, for patterns that ignore case.
LICENCE = (
    r"((MODEL|THIRD[ _-]?PARTY|ACCEPTABLE)[ _-]?)?(LICEN[CS]ES?|NOTICES?|US(E|AGE)[ _-]?POLICY|COPYING|COPYRIGHT)"
)
# What transformers, PEFT, TRL and this package write into a model folder. Only a folder that holds nothing else may be
# replaced; any other file may be a user's own work.
_MODEL_FILES = re.compile(
    rf"""
    ((adapter|checkpoint-\d+|runs(/[\w.-]+)?|additional_chat_templates|assets|\.eval_results)/)?
    (
    (config|generation_config|adapter_config|tokenizer(\.\d[\d.]*)?|(audio_)?tokenizer_config|special_tokens_map|added_tokens
     |vocab(-src|-tgt)?|(target|entity)_vocab|tekken|byte_maps|emoji|normalizer|word_(pronunciation|shape)|chat_template
     |((image|video)_)?(pre)?processor_config|quant(ize)?_config|hf_quant_config
     |trainer_state|(all|train|eval)_results|lineage|metrics)\.json
    | (model|pytorch_model|adapter_model|consolidated)([-.][\w.-]+)?\.(safetensors|bin|gguf)(\.index(\.\w+)?\.json)?
    | model\.safetensors\.index(\.\w+)?\.json
    | (vocab|merges|dict)\.txt | vocab\.bpe | bpe\.codes | prophetnet\.tokenizer | [\w.-]+\.(model|tiktoken|spm)
    | tokenizer(\.mm)?\.model\.v\w+ | chat_template\.jinja | (?<=additional_chat_templates/)[^/]+\.jinja
    | (optimizer|scheduler|rng_state(_\d+)?|scaler)\.(pt|pth|bin) | training_args\.bin | events\.out\.tfevents\.[\w.-]+
    | {LICENCE}([ ._-][ .\w-]*)? | \.gitattributes
    )
    """,
    re.VERBOSE | re.IGNORECASE,
)
# Files next to the model that only folders written by this package hold: the card and its pictures and results.
_OUR_FILES = re.compile(r"README\.md|assets/[\w.-]+\.(png|svg)|\.eval_results/[\w.-]+\.yaml|[\w.-]+/README\.md")
_SCRATCH = re.compile(r"\.hf_layerprune\.scratch-[0-9a-f]{8}")
_MODEL_MARKERS = {"config.json", "adapter_config.json"}
_FILE_ENDINGS = (".gguf", ".safetensors", ".json")


@contextmanager
def new_folder(
    target: Path, *, force: bool | None = None, source: Path | None = None, replaces: re.Pattern[str] | None = None
) -> Iterator[Path]:
    """Create a folder under a temporary name next to the target, and rename it when the block succeeds.

    The temporary name is `.NAME.partial-1a2b3c4d`. Folders that killed runs left under such names are removed by the
    next run for the same target.

    Args:
        target (`Path`): The folder to create.
        force (`bool`, *optional*): Replace an existing model folder. It stays until the new one is complete and on
            disk. `None` where the user has no such option.
        source (`Path`, *optional*): A file or folder that must not be written to.
        replaces (`re.Pattern`, *optional*): For folders other than model folders, a pattern of the files that they may
            hold; a folder with other files is not replaced.

    Yields:
        `Path`: The folder to write into.

    Raises:
        CheckpointError: The target can't be replaced, or writing fails. The temporary folder is removed.
    """
    from safetensors import SafetensorError

    try:
        target = check_target(target.expanduser(), source, force, replaces)
        made = [parent for parent in target.parents if not parent.exists()]
        target.parent.mkdir(parents=True, exist_ok=True)
        _clean_up_leftovers(target, force)
        folder = _sibling(target, "partial")
        folder.mkdir()
        lock = lock_folder(folder)
        try:
            yield folder
            _move_into_place(folder, target, force, replaces)
        except LayerPruneError as error:  # name the target, not what stands in for it
            error.args = (str(error).replace(str(folder), str(target)),)
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            unlock_folder(lock)
            with suppress(OSError):  # they are not empty, unless it failed
                for parent in made:
                    parent.rmdir()
    except (OSError, SafetensorError) as error:
        raise write_error(target, error) from error


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """Create a folder that is deleted at the end; those that killed processes left in the parent are deleted now.

    Files in it that are mapped remain readable; a network file system keeps them until the process ends.

    Raises:
        OSError: It can't be created.
    """
    parent.mkdir(parents=True, exist_ok=True)
    for left in filter(_SCRATCH.fullmatch, os.listdir(parent)):
        with suppress(OSError):  # it is in use, or gone
            if (lock := lock_folder(parent / left)) is not None:
                shutil.rmtree(parent / left, ignore_errors=True)
                unlock_folder(lock)
    folder = _sibling(parent / "hf_layerprune", "scratch")
    new = folder.with_name(f"{folder.name}.new")  # others see it only once it is locked
    new.mkdir()
    lock = lock_folder(new)
    new.rename(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():  # else it stays locked until the process ends
            unlock_folder(lock)


def check_target(
    target: Path, source: Path | None, force: bool | None, replaces: re.Pattern[str] | None = None
) -> Path:
    """Check that a folder can be created without affecting any other file. Links in the folders above it are resolved.

    See [`new_folder`] for the arguments.

    Raises:
        CheckpointError: The target is or overlaps with the source, exists, is not a folder, or holds a file that does
            not belong to a model; or it is new, and its parent is not writable, or it has a file's name.
    """
    named = target
    target = Path(os.path.abspath(target))
    if target.is_symlink():
        raise CheckpointError(f"{named} is a symbolic link, and nothing is written through links; choose a new folder")
    target = Path(os.path.realpath(target.parent)) / target.name
    if source is not None and source.exists():
        check_no_overlap(target, source)
    if os.path.lexists(target):
        if not target.is_dir():
            raise CheckpointError(f"{named} is a file; specify a folder to create")
        if next(os.scandir(target), None) is not None:
            if not force:
                raise _existing_error(f"{named} exists and is not empty", force)
            _check_replaceable(named, target, replaces)
    else:
        like = get_close_matches(target.suffix.lower(), _FILE_ENDINGS, n=1, cutoff=0.75)
        if like and "-" not in target.suffix:  # that of Qwen3-0.6B-GGUF is .6B-GGUF
            raise CheckpointError(
                f"{named} would be a folder, but its name looks like that of a {like[0]} file; correct the ending, or leave it "
                "out"
            )
        parent = next(filter(os.path.lexists, target.parents))
        if parent.is_file() or not os.access(parent, os.W_OK | os.X_OK):
            raise CheckpointError(
                f"{parent} is not a writable folder, so {named} can't be created in it; choose another folder"
            )
    return target


def _existing_error(what: str, force: bool | None) -> ExistingOutputError:
    """`None` stands for no option to replace it."""
    way_out = "" if force is None else "replace it with force=True, or "
    return ExistingOutputError(f"{what}; {way_out}choose another folder")


def _check_replaceable(named: Path, folder: Path, replaces: re.Pattern[str] | None) -> None:
    """Check that a folder is of the kind to be written and holds no other files."""
    if replaces is None and not any((folder / name).is_file() for name in _MODEL_MARKERS):
        raise CheckpointError(
            f"{named} is not a model folder, so it is not replaced; remove it yourself, or choose another folder"
        )
    allowed = [replaces or _MODEL_FILES, *([_OUR_FILES] if replaces is None and _is_ours(folder) else [])]
    foreign: list[str] = []
    for root, folders, names in os.walk(folder):
        # Links to folders are listed as folders, and are the user's.
        foreign += [name for name in folders if Path(root, name).is_symlink()]
        paths = [Path(root, name).relative_to(folder).as_posix() for name in names]
        foreign += [path for path in paths if not any(pattern.fullmatch(path) for pattern in allowed)]
    if foreign:
        examples = ", ".join(sorted(foreign)[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
        raise CheckpointError(
            f"{named} is not replaced, since it holds files that may be yours: {examples}; move them away, or choose another "
            "folder"
        )


def _is_ours(folder: Path) -> bool:
    """Whether this package wrote a folder: it has a lineage, or its config lists the dropped layers."""
    if (folder / "lineage.json").is_file():
        return True
    for name in _MODEL_MARKERS:
        with suppress(CheckpointError):
            fields = read_object(folder / name, non_finite=True)
            if "layer_drop" in fields or fields.get("peft_type") == "LAYER_DROP":
                return True
    return False


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{secrets.token_hex(4)}")


def _clean_up_leftovers(target: Path, force: bool | None) -> None:
    """Remove what killed runs left of a folder, and restore one that was being replaced.

    Raises:
        CheckpointError: The target was restored, and may not be replaced, or is being written.
    """
    leftover = re.compile(rf"\.{re.escape(target.name)}\.(old|partial)-[0-9a-f]{{8}}")
    for path in sorted(target.parent.iterdir()):
        found = leftover.fullmatch(path.name)
        if not found or path.is_symlink() or not path.is_dir():
            continue
        if found[1] == "old" and not os.path.lexists(target):
            path.rename(target)
            if not force:
                raise _existing_error(f"{target} was restored after a killed run", force)
            continue
        try:
            lock = lock_folder(path)
        except BlockingIOError:
            raise CheckpointError(f"{target} is being written by another process; wait for it") from None
        if lock is not None:  # where nothing can be locked, it may be another process's
            shutil.rmtree(path, ignore_errors=True)
            unlock_folder(lock)


def _move_into_place(folder: Path, target: Path, force: bool | None, replaces: re.Pattern[str] | None) -> None:
    """Flush a folder to disk and rename it to the target.

    Where the target exists, this takes two renames; if the process is killed between them, the next run restores the
    old folder.

    Raises:
        CheckpointError: The target was created in the meantime.
        OSError: The rename failed.
    """
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_folder(path)
        elif path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    sync_folder(folder)
    try:
        os.rename(folder, target)
    except OSError as error:
        in_the_way = (errno.ENOTEMPTY, errno.EEXIST, errno.EACCES, errno.EPERM)
        if error.errno not in in_the_way or not target.is_dir():
            raise
        if not force:
            raise _existing_error(f"{target} was created in the meantime", force) from None
        check_target(target, None, force, replaces)  # its content may have changed in the meantime
        old = _sibling(target, "old")
        os.rename(target, old)
        try:
            os.rename(folder, target)
        except OSError:
            os.rename(old, target)
            raise
        sync_folder(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    sync_folder(target.parent)
