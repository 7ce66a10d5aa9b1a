"""Repeat the cut of the base, hashing the files instead of writing them."""

from __future__ import annotations

import hashlib
import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from packaging.version import InvalidVersion, Version

from ... import families
from ...cut.base import Base as Checkpoint
from ...cut.disk import copy_companions, cut_config_file, execute_plan, plan_cut
from ...cut.header import FLOATS, read_header
from ...cut.plan import CheckpointPlan
from ...errors import CheckpointError, boundary
from ...files.copy import LocalFile
from ...files.json_file import read_object
from ...files.shards import INDEX, MAX_INDEX
from ...records.fingerprints import (
    CONFIG,
    GENERATION,
    QUANTISERS,
    hash_files,
    holds_weights,
    is_inert,
    model_files,
    sha256_of,
)
from ...records.history import History, Stage
from ...records.quantized import is_repeatable_method, quantization_method
from ...runtime.config_file import read_config_file
from ...runtime.loading import load_base, load_config
from ...runtime.mapping import load_mapped
from ...runtime.model_class import model_class_of
from .places import Base

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)


class TensorHash(NamedTuple):
    """The type, the shape and the sha256 of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class WeightFile:
    """The hashes of a safetensors file and its tensors, and its metadata.

    The metadata decides how some quantised tensors are unpacked.
    """

    sha256: str
    tensors: dict[str, TensorHash]
    notes: dict[str, str]

    @classmethod
    def read(cls, path: Path) -> WeightFile:
        """Hash a file and its tensors.

        Raises:
            CheckpointError: It is not a valid safetensors file.
        """
        header = read_header(path)
        with LocalFile(path) as file:
            start = header.data_start
            return cls.from_parts(file.read(0, start), file.chunks(start, header.size - start))

    @classmethod
    def from_parts(cls, header: bytes, data: Iterator[memoryview]) -> WeightFile:
        """Hash a valid file from its header and the parts that follow it."""
        whole, part = hashlib.sha256(header), memoryview(b"")
        tensors: dict[str, TensorHash] = {}
        entries = json.loads(header[8:])
        notes = entries.pop("__metadata__", None) or {}
        for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
            digest, left = hashlib.sha256(), entry["data_offsets"][1] - entry["data_offsets"][0]
            while left:
                part = part or next(data)
                for each in (digest, whole):
                    each.update(part[:left])
                left, part = left - len(part[:left]), part[left:]
            tensors[name] = TensorHash(entry["dtype"], tuple(entry["shape"]), digest.hexdigest())
        return cls(whole.hexdigest(), tensors, notes)


def notes_in(files: Iterable[WeightFile]) -> dict[str, str]:
    """What a model's weight files say about their tensors, by name.

    Raises:
        CheckpointError: Two files contradict each other.
    """
    notes: dict[str, str] = {}
    for file in files:
        for name, text in file.notes.items():
            if name != "format" and notes.setdefault(name, text) != text:
                raise CheckpointError(f"two weight files contradict each other on {name}")
    return notes


def inferred_dtype(files: Mapping[str, WeightFile], index: Mapping[str, Any] | None) -> object:
    """The data type in which transformers loads all weights if the config names none: that in the index, or that of the
    first tensor of the first file.
    """
    stated = (index or {}).get("metadata", {}).get("dtype")
    first = files[min(files)].tensors
    return stated or next((FLOATS[first[name].dtype] for name in sorted(first) if first[name].dtype in FLOATS), None)


@dataclass(frozen=True)
class Expected:
    """The expected content of a pruned model.

    Args:
        files (`dict[str, str]`): The sha256 of each file that may affect the model's behaviour, by relative path.
        weights (`dict[str, WeightFile]`): The weight files, by name.
        config (`dict[str, Any]`): The fields of the config, as loaded by its class.
        raw_config (`dict[str, Any]`): The fields in the config's file.
        index (`dict[str, Any]`, *optional*): The index, if there are several weight files.
        unquantized (`dict[str, TensorHash]`, *optional*): The tensors before they were quantised, if they were.
        quantizer (`str`, *optional*): What quantised them, with its version.
        lacked (`tuple[str, ...]`): The other files of the base that were not in the copy that was cut, according to the
            lineage.
        origins (`dict[str, tuple[Path, str]]`): Where the base has a tensor that the cut copies: its file, and its name there.
    """

    files: dict[str, str]
    weights: dict[str, WeightFile]
    config: dict[str, Any]
    raw_config: dict[str, Any]
    index: dict[str, Any] | None = None
    unquantized: dict[str, TensorHash] | None = None
    quantizer: str | None = None
    lacked: tuple[str, ...] = ()
    origins: dict[str, tuple[Path, str]] = field(default_factory=dict, repr=False)

    @classmethod
    def from_folder(
        cls, folder: Path, weights: dict[str, WeightFile] | None = None, others: dict[str, str] | None = None
    ) -> Expected:
        """What is in a folder, except for the weights and the hashes of other files where they are known already."""
        paths = model_files(folder)
        if weights is None:
            weights = {name: WeightFile.read(path) for name, path in paths.items() if holds_weights(name)}
        if others is None:
            others = hash_files({name: path for name, path in paths.items() if not holds_weights(name)})
        files = others | {name: file.sha256 for name, file in weights.items()}
        index = read_object(folder / INDEX, max_bytes=MAX_INDEX) if INDEX in paths else None
        return cls(files, weights, load_config(folder).to_dict(), read_config_file(folder / CONFIG), index)

    @cached_property
    def tensors(self) -> dict[str, TensorHash]:
        """All tensors, by name."""
        return {name: tensor for file in self.weights.values() for name, tensor in file.tensors.items()}

    @property
    def plain(self) -> dict[str, TensorHash]:
        """All tensors as they were before they were quantised."""
        return self.tensors if self.unquantized is None else self.unquantized

    @cached_property
    def model_config(self) -> PreTrainedConfig:
        """The config."""
        from transformers import CONFIG_MAPPING

        return CONFIG_MAPPING[self.config["model_type"]].from_dict(self.config)

    @cached_property
    def loaded_dtype(self) -> str:
        """The data type in which transformers loads most weights."""
        _, part = model_class_of(self.model_config) or (None, self.model_config)
        return str(part.dtype or inferred_dtype(self.weights, self.index)).removeprefix("torch.")

    def read_tensor(self, name: str) -> torch.Tensor | None:
        """The value of a tensor, if the cut copies it from the base."""
        from safetensors import safe_open

        if name not in self.origins:
            return None
        path, old = self.origins[name]
        with safe_open(path, "pt") as file:
            value: torch.Tensor = file.get_tensor(old)
        return value


def rebuild(history: History, base: Base) -> Expected:
    """Repeat all cuts of a history as a single one, without writing the result.

    Raises:
        CheckpointError: No layers were dropped, the base is damaged or a different one, or the cut can't be repeated.
    """
    if not history.dropped:
        raise CheckpointError("lineage.json does not drop any layers")
    with tempfile.TemporaryDirectory(prefix="hf-layerprune-") as temporary:
        folder = Path(temporary, "cut")
        folder.mkdir()
        cut = (_convert_cut if base.is_gguf or history.dtypes else _copy_cut)(history, base, folder)
        return _quantize_cut(history, folder, cut)


def _copy_cut(history: History, base: Base, folder: Path) -> Expected:
    """Repeat a cut that copies bytes; the weights are only written if they are to be quantised."""
    plan = plan_cut(Checkpoint.open(base.source, base.commit, token=base.token), history.dropped)
    if plan.cut.num_layers != history.num_base_layers:
        raise CheckpointError(
            f"the base has {plan.cut.num_layers} layers, but lineage.json says {history.num_base_layers}"
        )
    _check_bytes(plan, base.files)
    companions = [name for name, _ in plan.companions if not is_inert(name)]
    present = history.lineage.base.get("companions", companions)
    others = hash_files({name: plan.source / name for name in companions if name in present})
    plan.files[CONFIG] = _cut_config(history, plan.source, folder.with_name("config"))
    others |= {name: hashlib.sha256(content).hexdigest() for name, content in plan.files.items()}
    weights: dict[str, WeightFile] = {}
    origins: dict[str, tuple[Path, str]] = {}
    for shard in plan.shards:
        path = plan.source / shard.source
        origins |= {plan.tensor_names[old]: (path, old) for old in read_header(path).names if old in plan.tensor_names}
        if shard.whole:
            weights[shard.target] = WeightFile.read(path)
            continue
        with LocalFile(path) as source:
            parts = (part for offset, length in shard.spans() for part in source.chunks(offset, length))
            weights[shard.target] = WeightFile.from_parts(shard.header, parts)
    if history.quantized and is_repeatable_method(history.quantized.settings["quantization_config"]):
        execute_plan(plan, folder)
    else:
        for name, content in plan.files.items():
            (folder / name).write_bytes(content)
    lacked = tuple(name for name in companions if name not in present)
    return replace(Expected.from_folder(folder, weights, others), lacked=lacked, origins=origins)


def _cut_config(history: History, source: Path, folder: Path) -> bytes:
    """The config's file after all cuts, one at a time: what is rounded or fitted in each may differ from that of a single one."""
    content = (source / CONFIG).read_bytes()
    folder.mkdir()
    for dropped in history.cuts:
        (folder / CONFIG).write_bytes(content)
        config = load_config(folder)
        _, content = cut_config_file(folder, config, families.make_cut(config, dropped))
    return content


def _check_bytes(plan: CheckpointPlan, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Check the base's weights against their listed hashes, since file names in a cache prove nothing."""
    for name in {shard.source for shard in plan.shards}:
        listed = files.get(name, {}).get("sha256")
        if listed is not None and sha256_of(plan.source / name) != listed:
            raise CheckpointError(
                f"{plan.source / name} does not match its hash ({listed[:12]}); remove it from the cache to "
                "download it again"
            )


def _convert_cut(history: History, base: Base, folder: Path) -> Expected:
    """Repeat a cut whose weights are dequantised or converted."""
    from ...cut.memory import drop_layers
    from ...runtime.loading import load_tokenizer

    if not history.dtypes:
        raise CheckpointError(f"{base.source} is a GGUF file, and the model was cut from a folder")
    first, *later = map(_dtype, history.dtypes)
    model = load_mapped(base.source, revision=base.commit, dtype=first)
    for dropped in history.cuts:
        drop_layers(model, dropped)
    for number, dtype in enumerate(later):  # each conversion may round
        step = folder.with_name(f"step-{number}")
        model.save_pretrained(step)
        model = load_mapped(step, dtype=dtype)
    model.save_pretrained(folder)
    # The settings of generation name the version of transformers that wrote them, and may do so alone.
    written_by = history.stages[0].entry.get("versions", {}).get("transformers")
    with suppress(FileNotFoundError, InvalidVersion):  # of a text that is more than a version
        settings = (folder / GENERATION).read_text()
        versions = (version("transformers"), Version(str(written_by)))
        ours, theirs = (f'"transformers_version": "{one}"' for one in versions)
        (folder / GENERATION).write_text(settings.replace(ours, theirs))
    if base.is_gguf:
        with suppress(CheckpointError):  # it may have no tokenizer
            load_tokenizer(base.source, revision=base.commit).save_pretrained(folder)
        return Expected.from_folder(folder)
    source = Checkpoint.open(base.source, base.commit, token=base.token)
    names = [name for name, _ in source.companions() if name not in QUANTISERS and not is_inert(name)]
    present = history.lineage.base.get("companions", names)
    copy_companions(source.folder, folder, [name for name in names if name in present])
    return replace(Expected.from_folder(folder), lacked=tuple(name for name in names if name not in present))


def _quantize_cut(history: History, folder: Path, cut: Expected) -> Expected:
    """What a cut becomes when it is quantised as its history says."""
    stage = history.quantized
    if stage is None:
        return cut
    settings, layers, after = stage.settings["quantization_config"], history.num_base_layers, False
    for one in history.stages:
        if one.name == "prune":
            later = families.cut_without(one.settings["drop_layers"], layers)
            layers = len(later.keep)
            settings = families.cut_quantization(settings, cut.model_config, later) if after else settings
        after |= one is stage
    if not is_repeatable_method(settings):
        # Its tensors can't be derived again, and are counted as the ones that it changed.
        return replace(
            cut, config=cut.config | {"quantization_config": settings, "dtype": stage.settings.get("dtype")}
        )
    target = folder.with_name("quantized")
    quantizer = _quantize_again(stage, settings, folder, target)
    others = {name: sha256 for name, sha256 in cut.files.items() if not holds_weights(name)}
    return replace(
        Expected.from_folder(target, others=others), unquantized=cut.tensors, quantizer=quantizer, lacked=cut.lacked
    )


def _quantize_again(stage: Stage, settings: dict[str, Any], cut: Path, target: Path) -> str:
    """Quantise a cut on the CPU; return what did so, with its version, and the version used first if it differs."""
    from transformers.quantizers.auto import AutoQuantizationConfig

    dtype = _dtype(stage.settings.get("dtype"))
    method = quantization_method(settings)
    logger.info("quantising the cut with %s, to compare", method)
    with boundary(f"{method} can't repeat how the model was quantised", "install the version in its lineage.json"):
        here, then = version(method), (stage.entry.get("versions") or {}).get(method)
        config: Any = AutoQuantizationConfig.from_dict(dict(settings))
        load_base(cut, quantization_config=config, dtype=dtype, device_map="cpu").save_pretrained(target)
    return f"{method} {here}" + (f" ({then} was used)" if then not in (None, here) else "")


def _dtype(name: object) -> torch.dtype:
    import torch

    dtype = getattr(torch, str(name), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"lineage.json names the dtype {name!r}, which does not exist")
    return dtype
