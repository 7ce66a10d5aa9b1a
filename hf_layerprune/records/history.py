"""Follow a lineage: which layers of the base are left, and which tensors each stage changed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from ..errors import CheckpointError
from ..layer_ranges import LIST_NAMES, NOT_TEXT
from .lineage import Lineage
from .names import base_name, hub_base, is_gguf_name, is_hub_name, last_part

# What precedes the index of a decoder layer, where no record says so.
_LISTS = rf".*?\b(?:{'|'.join(LIST_NAMES)})\."
# The stages in which other programs made the weights.
QUANTIZE, TRAIN = "quantize", "train"
OWN_TEXT = "text that the dense model wrote itself"
# Fields of a repair's record that are not settings.
_NOT_SETTINGS = ("changed_tensors", "input_weights", "seconds")


@dataclass(frozen=True)
class Stage:
    """One entry of a lineage: `prune`, `repair`, `heal`, ...

    The tensors that it changed have their names in the final model.
    """

    name: str
    entry: dict[str, Any] = field(repr=False)
    changed: frozenset[str]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that determine the result."""
        return self.entry.get("settings") or {}

    @property
    def layers_changed(self) -> set[int]:
        """Indices, in the final model, of the decoder layers that it changed."""
        prefix = _layer_prefix(self.entry)
        return {int(match["index"]) for name in self.changed if (match := _match_layer(name, prefix))}

    @property
    def data(self) -> list[dict[str, Any]]:
        """The data used for fitting or training."""
        texts = [
            one | {"name": OWN_TEXT} if one.get("name") == "self" else one for one in self.entry.get("data") or []
        ]
        calibration = self.entry.get("calibration")
        return texts + ([_calibration_data(calibration)] if calibration else [])


@dataclass(frozen=True)
class History:
    """The stages of a lineage, oldest first, and the base indices of the layers that are kept."""

    lineage: Lineage = field(repr=False)
    num_base_layers: int
    kept: tuple[int, ...]
    stages: tuple[Stage, ...]

    @property
    def dropped(self) -> tuple[int, ...]:
        """Base indices of the dropped layers."""
        return tuple(i for i in range(self.num_base_layers) if i not in set(self.kept))

    @property
    def cuts(self) -> list[list[int]]:
        """The layers that each cut dropped, as indices in the model that it began with."""
        cuts = (stage.settings.get("drop_layers") for stage in self.stages if stage.name == "prune")
        return [dropped for dropped in cuts if dropped]

    @property
    def form(self) -> str:
        """`model`, or `adapter` if only the plan and the tuned tail were saved."""
        forms = [one.settings["form"] for one in self.stages if one.name != TRAIN and one.settings.get("form")]
        return "adapter" if forms and forms[-1] == "adapter" else "model"

    @property
    def commit(self) -> str | None:
        """The commit of the base on the Hub."""
        return self.lineage.base.get("commit") or None

    @property
    def from_gguf(self) -> bool:
        """Whether the base is a GGUF file whose weights were dequantised."""
        return is_gguf_name(str(self.lineage.base.get("id")))

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes to which the weights were converted, oldest first, without repeats; empty if they kept the base's."""
        dtypes = [str(stage.settings.get("dtype") or "auto") for stage in self.stages if stage.name == "prune"]
        if self.from_gguf and dtypes and dtypes[0] == "auto":
            dtypes[0] = "bfloat16"
        return tuple(dtype for dtype, _ in groupby(dtype for dtype in dtypes if dtype != "auto"))

    @property
    def dtype(self) -> str | None:
        """The dtype to which the weights were converted last, or `None` if they kept the base's."""
        return self.dtypes[-1] if self.dtypes else None

    @property
    def quantized(self) -> Stage | None:
        """The stage that quantised the model, if there is one.

        Raises:
            CheckpointError: There are several, or it does not say how.
        """
        stages = [stage for stage in self.stages if stage.name == QUANTIZE]
        if len(stages) > 1:
            raise CheckpointError("the weights were quantised more than once, which can't be verified")
        if stages and not isinstance(stages[0].settings.get("quantization_config"), dict):
            raise CheckpointError("lineage.json does not say how the model was quantised")
        return stages[0] if stages else None

    @property
    def base_id(self) -> str:
        """The base as named in the lineage; for a local path, only the last part."""
        return base_name(self.lineage.base)

    @property
    def base_on_hub(self) -> str | None:
        """The Hub id of the base, or of the model that a local base is a copy of; `None` if none is recorded."""
        return hub_base(self.lineage.base)

    def changed(self) -> dict[str, list[str]]:
        """Every tensor that was changed according to the lineage, with the names of the stages that changed it."""
        by_tensor: dict[str, list[str]] = {}
        for stage in self.stages:
            for name in sorted(stage.changed):
                by_tensor.setdefault(name, []).append(stage.name)
        return by_tensor

    @property
    def since_last_cut(self) -> tuple[Stage, ...]:
        """The last cut, and the stages after it."""
        last = max((number for number, stage in enumerate(self.stages) if stage.name == "prune"), default=0)
        return self.stages[last:]

    def layers_changed(self, stage: str) -> set[int]:
        """Base indices of the layers that stages of this name changed."""
        indices = {index for one in self.stages if one.name == stage for index in one.layers_changed}
        return {self.kept[index] for index in indices if index < len(self.kept)}


def read_history(lineage: Lineage) -> History:
    """Follow a lineage from the base to the model.

    Raises:
        CheckpointError: The lineage contradicts itself.
    """
    n, kept, cuts = _follow_cuts(lineage.entries)
    stages = []
    for number, entry in enumerate(lineage.entries):
        later = [stay for at, stay in cuts.items() if at > number]
        for name, part in _with_repair(entry):
            names = _rename_after_cuts(later, part.get("changed_tensors") or [], _layer_prefix(part))
            stages.append(Stage(name, part, frozenset(names)))
    return History(lineage, n, tuple(kept), tuple(stages))


def _follow_cuts(entries: list[dict[str, Any]]) -> tuple[int, list[int], dict[int, list[int]]]:
    """The number of layers of the base, those that are kept, and for each cut, by its entry, the ones of its input."""
    n: int | None = None
    kept: list[int] = []
    cuts: dict[int, list[int]] = {}
    for number, entry in enumerate(entries):
        layers = entry.get("layers") or {}
        if n is None and layers.get("base"):
            n = int(layers["base"])  # to the schema, 30.0 is an integer
            kept = list(range(n))
        if entry.get("stage") != "prune":
            if n is not None and layers.get("left", len(kept)) != len(kept):
                raise CheckpointError("lineage.json does not say which layers were dropped; prune with hf-layerprune")
            continue
        drop = (entry.get("settings") or {}).get("drop_layers") or []
        if n is None or layers.get("base", len(kept)) != len(kept) or any(i >= len(kept) for i in drop):
            raise CheckpointError(
                f"lineage.json drops layers {drop} of {layers.get('base', '?')}, and {len(kept)} were left; it was edited or is "
                "damaged, so prune the model again"
            )
        cuts[number] = [i for i in range(len(kept)) if i not in set(drop)]
        kept = [kept[i] for i in cuts[number]]
        if layers.get("left", len(kept)) != len(kept):
            raise CheckpointError(
                f"lineage.json says that {layers['left']} layers were left and drops all but {len(kept)}; it was edited"
            )
    if n is None:
        raise CheckpointError("lineage.json does not say how many layers the base has; prune the model again")
    return n, kept, cuts


def is_repaired(entry: dict[str, Any]) -> bool:
    """Whether a stage repaired the model as well, and that changed something."""
    repair = entry.get("repair") or {}
    return bool(repair) and repair.get("changed_tensors") != []


def _with_repair(entry: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """An entry, followed by its repair as a separate stage, if there is one that changed something."""
    yield str(entry.get("stage")), entry
    if is_repaired(entry):
        repair = entry["repair"]
        settings = {name: value for name, value in repair.items() if name not in _NOT_SETTINGS}
        yield "repair", {"settings": settings} | {name: repair.get(name) for name in ("changed_tensors", "seconds")}


def _calibration_data(record: dict[str, Any]) -> dict[str, Any]:
    """A calibration set in the form in which the card lists data."""
    source = str(record.get("source") or "")
    name, _, part = source.partition(":")
    text: dict[str, Any] = {"name": last_part(source) or "unnamed"}
    if source == "self":
        text["name"] = OWN_TEXT
    elif "/" in name and is_hub_name(name):
        text |= {"id": name, "name": name} | ({"split": part} if part else {})
    if record.get("samples") and record.get("length"):
        samples = record["samples"]
        text |= {"rows": samples, "tokens": record.get("tokens") or samples * record["length"]}
    if record.get("fingerprint"):
        text["sha256"] = record["fingerprint"]
    return text


def _layer_prefix(entry: dict[str, Any]) -> str | None:
    """What precedes a decoder layer's index in the names of the tensors that a stage changed, as far as it is recorded."""
    return (entry.get("layers") or {}).get("prefix")


def _match_layer(name: str, prefix: str | None) -> re.Match[str] | None:
    """The parts of the name of a decoder layer's tensor; `None` for others, such as those of a vision tower's layers.

    Without a recorded prefix, as of a repair, which changes decoder layers alone, the words in a name decide.
    """
    before = _LISTS if prefix is None else re.escape(prefix)
    match = re.fullmatch(rf"(?P<before>{before})(?P<index>\d+)(?P<after>\..*)", name)
    return match if match and (prefix is not None or not NOT_TEXT.search(match["before"])) else None


def _rename_after_cuts(cuts: list[list[int]], names: list[str], prefix: str | None) -> Iterator[str]:
    """Names of tensors after further cuts, without those of dropped layers."""
    for name in names:
        for stay in cuts:
            match = _match_layer(name, prefix)
            if match is None:
                continue
            if int(match["index"]) not in stay:
                break
            name = f"{match['before']}{stay.index(int(match['index']))}{match['after']}"
        else:
            yield name
