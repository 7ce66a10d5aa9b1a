"""The heal station: from what was trained to a whole model folder, with its history."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from ..folders import new_folder
from ..loading import load_base, load_tokenizer
from ..publish.lineage import Lineage, fingerprint
from .student import Student

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def write_healed(
    student: Student,
    trained: Path,
    output: Path,
    entry: dict[str, Any],
    *,
    adapter: Path | None = None,
    force: bool = False,
) -> Path:
    """Merge what was trained into the pruned model, and write it as a plain one.

    Args:
        student ([`Student`]): What was trained.
        trained (`Path`): What the trainer saved: an adapter, or a whole model.
        output (`Path`): The folder to write.
        entry (`dict[str, Any]`): The station's, see [`~publish.lineage.station`]; it gets the names of the tensors
            that changed.
        adapter (`Path`, *optional*): Where to write the adapter, where it is one, in the model's own type.
        force (`bool`, defaults to `False`): Whether folders that exist are replaced.

    Returns:
        `Path`: The output.

    Raises:
        CheckpointError: Something can't be written.
    """
    if (trained / "adapter_config.json").is_file():
        from peft import PeftModel

        model = PeftModel.from_pretrained(load_base(student.folder, dtype="auto"), str(trained))
        if adapter is not None:
            with new_folder(adapter, force=force, apart_from=student.folder) as folder:
                model.save_pretrained(folder)
                _save_tokenizer(student, folder)
        merged: PreTrainedModel = model.merge_and_unload()
    else:
        merged = load_base(trained, dtype=load_base_dtype(student))
    merged.name_or_path = merged.config.name_or_path = str(student.folder)
    lineage = Lineage.of(student.folder) or Lineage(
        {"id": str(student.folder), "commit": None, "files": fingerprint(student.folder)}
    )
    with new_folder(output, force=force, apart_from=student.folder) as folder:
        merged.save_pretrained(folder)
        _save_tokenizer(student, folder)
        entry["changed_tensors"] = changed_tensors(student.folder, folder)
        entry["layers"] = {"base": student.cut.num_layers, "left": len(student.cut.keep)}
        lineage.record(folder, entry)
    logger.info("%d tensors of the model were trained; it is in %s", len(entry["changed_tensors"]), output)
    return output


def load_base_dtype(student: Student) -> torch.dtype:
    """The type of a pruned model's weights on disk."""
    return next(tensor.dtype for _, tensor in _tensors(student.folder))


def changed_tensors(before: Path, after: Path) -> list[str]:
    """Names of the tensors of a folder that another one has not, or has with other bytes.

    Args:
        before (`Path`): A model folder.
        after (`Path`): Another.

    Returns:
        `list[str]`: Ascending.
    """
    where = {name: path for path in before.glob("*.safetensors") for name in _names(path)}
    changed = []
    for name, tensor in _tensors(after):
        path = where.get(name)
        if path is None:
            changed.append(name)
            continue
        with safe_open(path, framework="pt") as file:
            other = file.get_tensor(name)
        if other.dtype != tensor.dtype or not torch.equal(other, tensor):
            changed.append(name)
    return sorted(changed)


def _names(path: Path) -> list[str]:
    with safe_open(path, framework="pt") as file:
        return list(file.keys())


def _tensors(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no mapping)
                yield name, file.get_tensor(name)


def _save_tokenizer(student: Student, folder: Path) -> None:
    load_tokenizer(student.folder).save_pretrained(folder)
