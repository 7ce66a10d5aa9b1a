"""Repeat the cut of the base, hashing the files instead of writing them."""

from __future__ import annotations

import hashlib
import logging
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from ...cut.base import Base as Checkpoint
from ...cut.disk import plan_cut
from ...cut.header import read_header
from ...cut.lazy import load_pruned
from ...cut.plan import CheckpointPlan
from ...cut.write import fill
from ...errors import CheckpointError, boundary
from ...files.copy import LocalFile
from ...files.json_file import parse_json
from ...records.fingerprints import CONFIG, hash_files, holds_weights, is_inert, model_files, sha256_of
from ...records.history import History, Stage
from ...records.quantized import is_repeatable_method, method_of
from ...runtime.config_file import read_config_file
from ...runtime.loading import load_base, load_config
from .places import Base

logger = logging.getLogger(__name__)


class TensorHash(NamedTuple):
    """The type, the shape and the sha256 of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True)
class Expected:
    """The expected content of a pruned model.

    Args:
        files (`dict[str, str]`): The sha256 of each file that may affect the model's behaviour, by relative path.
        inside (`dict[str, dict[str, TensorHash]]`): The tensors of each weight file, by name.
        config (`dict[str, Any]`): The fields of the config, as loaded by its class.
        raw_config (`dict[str, Any]`): The fields in the config's file.
        unquantized (`dict[str, TensorHash]`, *optional*): The tensors before they were quantised, if they were.
        quantizer (`str`, *optional*): What quantised them, with its version.
        lacked (`tuple[str, ...]`): The other files of the base that were not in the copy that was cut, according to the
            lineage.
        notes (`dict[str, str]`): What the weight files of a quantised model say about their tensors, which decides how
            some of them are unpacked.
    """

    files: dict[str, str]
    inside: dict[str, dict[str, TensorHash]]
    config: dict[str, Any]
    raw_config: dict[str, Any]
    unquantized: dict[str, TensorHash] | None = None
    quantizer: str | None = None
    notes: dict[str, str] = field(default_factory=dict)
    lacked: tuple[str, ...] = ()

    @property
    def tensors(self) -> dict[str, TensorHash]:
        """All tensors, by name."""
        return {name: tensor for tensors in self.inside.values() for name, tensor in tensors.items()}


def rebuild(history: History, base: Base) -> Expected:
    """Repeat all cuts of a history as a single one, without writing the result.

    Raises:
        CheckpointError: No layers were dropped, the base is damaged or a different one, or the cut can't be repeated.
    """
    if not history.dropped:
        raise CheckpointError("lineage.json does not drop any layers")
    if base.packed or history.dtype is not None:
        return _converted(history, base)
    plan = plan_cut(Checkpoint.open(base.source, base.commit, token=base.token), history.dropped)
    if plan.cut.num_layers != history.num_base_layers:
        raise CheckpointError(
            f"the base has {plan.cut.num_layers} layers, but lineage.json says {history.num_base_layers}"
        )
    _check_bytes(plan, base.files)
    files = {name: hashlib.sha256(content).hexdigest() for name, content in plan.files.items()}
    companions = [name for name, _ in plan.companions if not is_inert(name)]
    had = history.lineage.base.get("companions", companions)
    files |= hash_files({name: plan.source / name for name in companions if name in had})
    inside: dict[str, dict[str, TensorHash]] = {}
    for shard in plan.shards:
        path = plan.source / shard.source
        if shard.whole:
            files[shard.target], inside[shard.target] = sha256_of(path), digest_file(path)
            continue
        with LocalFile(path) as source:
            parts = (part for offset, length in shard.spans() for part in source.chunks(offset, length))
            files[shard.target], inside[shard.target] = _hash(shard.header, parts)
    with tempfile.TemporaryDirectory(prefix="hf-layerprune-") as place:
        folder = Path(place, "cut")
        folder.mkdir()
        if history.quantized and is_repeatable_method(history.quantized.settings["quantization_config"]):
            fill(plan, folder)
        else:
            (folder / CONFIG).write_bytes(plan.files[CONFIG])
        told = load_config(folder).to_dict(), read_config_file(folder / CONFIG)
        lacked = tuple(name for name in companions if name not in had)
        return _quantized(history, folder, Expected(files, inside, *told, lacked=lacked))


def _quantized(history: History, folder: Path, cut: Expected) -> Expected:
    """What a cut becomes when it is quantised as its history says."""
    stage = history.quantized
    if stage is None:
        return cut
    told = stage.settings["quantization_config"]
    if not is_repeatable_method(told):
        # Its tensors can't be derived again, and are counted as the ones that it changed.
        return replace(cut, config=cut.config | {"quantization_config": told, "dtype": stage.settings.get("dtype")})
    target = folder.with_name("quantized")
    quantizer = _quantize_again(stage, folder, target)
    paths = {name: path for name, path in model_files(target).items() if holds_weights(name)}
    inside = {name: digest_file(path) for name, path in paths.items()}
    files = {name: sha256 for name, sha256 in cut.files.items() if not holds_weights(name)} | hash_files(paths)
    told = load_config(target).to_dict(), read_config_file(target / CONFIG)
    notes = notes_in(paths.values())
    return Expected(files, inside, *told, cut.tensors, quantizer, notes, cut.lacked)


def _quantize_again(stage: Stage, cut: Path, target: Path) -> str:
    """Quantise a cut on the CPU; return what did so, with its version, and the version used first if it differs."""
    import torch
    from transformers.quantizers.auto import AutoQuantizationConfig

    told, dtype = stage.settings["quantization_config"], getattr(torch, str(stage.settings.get("dtype")), None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"lineage.json says that a {stage.settings.get('dtype')!r} model was quantised")
    method = method_of(told)
    try:
        here, then = version(method), (stage.entry.get("versions") or {}).get(method)
    except PackageNotFoundError:
        raise CheckpointError(
            f"the model was quantised with {method}, which is needed to repeat that; install it: pip install {method}"
        ) from None
    logger.info("quantising the cut with %s, to compare", method)
    with boundary(f"{method} {here} can't repeat how the model was quantised"):
        settings: Any = AutoQuantizationConfig.from_dict(dict(told))
        load_base(cut, quantization_config=settings, dtype=dtype, device_map="cpu").save_pretrained(target)
    return f"{method} {here}" + (f" ({then} was used)" if then not in (None, here) else "")


def notes_in(paths: Iterable[Path]) -> dict[str, str]:
    """What a model's safetensors files say about their tensors, by name.

    Raises:
        CheckpointError: Two files contradict each other, or one is not a safetensors file.
    """
    notes: dict[str, str] = {}
    for path in paths:
        for name, text in (read_header(path).metadata or {}).items():
            if notes.setdefault(name, text) != text:
                raise CheckpointError(f"{path.name} and another weight file contradict each other on {name}")
    return notes


def _check_bytes(plan: CheckpointPlan, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Check the base's weights against their listed hashes, since file names in a cache prove nothing."""
    for name in {shard.source for shard in plan.shards}:
        listed = files.get(name, {}).get("sha256")
        if listed is not None and sha256_of(plan.source / name) != listed:
            raise CheckpointError(
                f"{plan.source / name} does not match its hash ({listed[:12]}); remove it from the cache to "
                "download it again"
            )


def loaded_tensors(history: History, base: Base, names: Collection[str]) -> dict[str, TensorHash]:
    """Tensors of the cut that its files hold otherwise, such as experts that loading joins, by their names in the model.

    Raises:
        CheckpointError: The cut can't be loaded.
    """
    from safetensors.torch import save_file

    model = load_pruned(base.source, history.dropped, revision=base.commit, token=base.token)
    found = {name: one.contiguous() for name, one in model.state_dict().items() if name in names}
    with tempfile.TemporaryDirectory(prefix="hf-layerprune-") as place:
        save_file(found, path := Path(place, "joined.safetensors"))
        return digest_file(path)


def _converted(history: History, base: Base) -> Expected:
    """Repeat a cut whose weights are dequantised or converted, in a temporary folder."""
    import torch

    from ...cut.memory import drop_layers
    from ...runtime.loading import load_tokenizer

    conversions = [
        one for one in history.stages if one.name == "prune" and one.settings.get("dtype", "auto") != "auto"
    ]
    if len(conversions) > 1:
        raise CheckpointError("the weights were converted more than once, which can't be verified")
    dtype = getattr(torch, history.dtype or "", None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(
            f"lineage.json says that the weights were converted to {history.dtype!r}, which is not a dtype"
        )
    with tempfile.TemporaryDirectory(prefix="hf-layerprune-") as place:
        folder = Path(place, "cut")
        model = load_base(base.source, revision=base.commit, dtype=dtype)
        drop_layers(model, history.dropped)
        model.save_pretrained(folder)
        with suppress(CheckpointError):  # a base may have no tokenizer
            load_tokenizer(base.source, revision=base.commit).save_pretrained(folder)
        paths = model_files(folder)
        inside = {name: digest_file(path) for name, path in paths.items() if holds_weights(name)}
        told = load_config(folder).to_dict(), read_config_file(folder / CONFIG)
        return _quantized(history, folder, Expected(hash_files(paths), inside, *told))


def digest_file(path: Path) -> dict[str, TensorHash]:
    """Hash the tensors of a safetensors file.

    Raises:
        CheckpointError: The file is not a valid safetensors file.
    """
    header = read_header(path)
    with LocalFile(path) as file:
        start = header.data_start
        return _hash(file.read(0, start), file.chunks(start, header.size - start))[1]


def _hash(header: bytes, data: Iterator[memoryview]) -> tuple[str, dict[str, TensorHash]]:
    """The sha256 of a valid safetensors file and of each of its tensors, from its header and the parts that follow it."""
    whole, part = hashlib.sha256(header), memoryview(b"")
    tensors: dict[str, TensorHash] = {}
    entries = parse_json(header[8:], "a safetensors header")  # strict: a loader may take the other of two equal names
    entries.pop("__metadata__", None)
    for name, told in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        own, left = hashlib.sha256(), told["data_offsets"][1] - told["data_offsets"][0]
        while left:
            part = part or next(data)
            for each in (own, whole):
                each.update(part[:left])
            left, part = left - len(part[:left]), part[left:]
        tensors[name] = TensorHash(told["dtype"], tuple(told["shape"]), own.hexdigest())
    return whole.hexdigest(), tensors
