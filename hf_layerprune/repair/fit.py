"""Fit a repair: run the dense model once, layer by layer, on the calibration set.

A repair only changes weights of layers that stay, so the pruned model keeps its size and its architecture. Behind a
repaired block, the next one is fitted to the hidden states of the repaired model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import families
from ..errors import CutError, LayerPruneError
from ..families.multimodal import path_to_text
from ..layer_ranges import find_blocks
from ..runtime.parts import probe_ids
from ..runtime.walk import Batch, LayerWalk
from ..screen import progress_bar
from .registry import find_repair
from .writers import Run

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from ..calibration.rows import CalibrationSet

_BATCH_ROWS, _PROBE_TOKENS = 8, 32
HELD_OUT = 5  # every fifth batch is held out


@dataclass
class Repair:
    """New values for some weights of the layers that stay.

    Args:
        method (`str`): One of `REPAIRS`.
        tensors (`dict[tuple[int, str], torch.Tensor]`): The new values, by the layer's index in the base and the
            parameter's name in the layer, such as `(11, "mlp.down_proj.weight")`; same dtype and shape as the old
            values, on the CPU.
        cuts (`list[dict]`): A record of the fit at each dropped block.
    """

    method: str
    tensors: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    cuts: list[dict[str, Any]] = field(default_factory=list)

    def by_layer(self) -> dict[int, dict[str, torch.Tensor]]:
        """The new values, by the layer's index in the base and the parameter's name in the layer."""
        layers: dict[int, dict[str, torch.Tensor]] = {}
        for (index, name), value in self.tensors.items():
            layers.setdefault(index, {})[name] = value
        return layers

    def leave_out_unchanged(self, layers: Sequence[nn.Module]) -> None:
        """Forget values that the dense model's layers have already."""
        old = {(i, name): layers[i].get_parameter(name) for i, name in self.tensors}
        self.tensors = {key: new for key, new in self.tensors.items() if not torch.equal(new, old[key].to(new))}

    def apply(self, layers: Sequence[nn.Module], new_index: dict[int, int]) -> None:
        """Write the new values into a model's layers; `new_index` maps base indices to theirs."""
        for (index, name), value in self.tensors.items():
            parameter = layers[new_index[index]].get_parameter(name)
            parameter.data = value.to(parameter.device, parameter.dtype)


def check_repair(config: PreTrainedConfig, drop_layers: Sequence[int], rows: int, method: str) -> None:
    """Refuse what can't be repaired in a dense model, as far as that is known before there is calibration text.

    Raises:
        CutError: The repair does not exist, a block has no layer before it, or there are too few rows.
        UnsupportedModelError: The model type can't be repaired.
    """
    repair = find_repair(method)
    families.check_stage(config, "repair")
    proven = {name: stages.get("repair", ()) for name, stages in families.proven_stages().items()}
    for part in path_to_text(config):
        repairs = proven.get(part.model_type)
        if repairs and method not in repairs and any(method in others for others in proven.values()):
            raise CutError(
                f"model type {part.model_type!r} has no layer for repair={method!r}; it takes {', '.join(repairs)}"
            )
    if 0 in drop_layers and repair.needs_layer_before:
        raise CutError(
            f'repair="{method}" changes the layer before a dropped block, but layer 0 is dropped; keep it '
            '(protect_first=1, unless drop_layers names the layers), or use repair="magnitude"'
        )
    if rows < 2:
        raise CutError(
            "a repair needs two calibration rows or more, to fit and to hold out; raise calibration_samples"
        )


def fit_repair(
    model: PreTrainedModel | LayerWalk, drop_layers: Sequence[int], calibration: CalibrationSet, method: str = "linear"
) -> Repair:
    """Fit a repair for dropped layers.

    Args:
        model (`PreTrainedModel` or `LayerWalk`): The dense model; left unchanged.
        drop_layers (`Sequence[int]`): Base indices of the layers to drop.
        calibration (`CalibrationSet`): Rows `[samples, seq]`; a fifth of them is held out to choose the ridge.
        method (`str`, defaults to `"linear"`): One of `REPAIRS`.

    Returns:
        `Repair`: The new weights; [`~Repair.apply`] writes them into a model.

    Raises:
        CutError: The repair does not exist, a block has no layer before it, or that layer has no weight that
            the map can be folded into.
        UnsupportedModelError: The model type can't be repaired, or its layers can't be run one at a time.
    """
    dense = model.model if isinstance(model, LayerWalk) else model
    check_repair(dense.config, drop_layers, len(calibration), method)
    walk = model if isinstance(model, LayerWalk) else LayerWalk(model)
    fitter: Fitter = find_repair(method).load().fitter(walk, find_blocks(drop_layers), method)
    with torch.no_grad():
        fitter.run(calibration)
    return Repair(method, fitter.tensors, fitter.records)


@torch.no_grad()
def can_repair_every_cut(walk: LayerWalk, method: str) -> bool:
    """Whether every cut of a model can have a repair: no layer lacks the weights that it changes, as one with experts may."""
    try:
        check_repair(walk.model.config, [], HELD_OUT, method)
        fitter: Fitter = find_repair(method).load().fitter(walk, [], method)
        fitter.first_of = {i: i + 1 for i in range(1, walk.num_layers)}  # as if a block began after each of them
        probe = walk.begin(probe_ids(walk.model, _PROBE_TOKENS))
        for i in range(walk.num_layers - 1):
            with walk.layer(i) as run:
                fitter.before_layer(i, run, [], probe)
                probe.hidden = run(probe.hidden, probe)
    except LayerPruneError:
        return False
    return True


class Fitter:
    """Runs the dense model once and calls hooks at each dropped block. Each repair overrides the hooks it needs."""

    def __init__(self, walk: LayerWalk, cuts: list[tuple[int, int]]) -> None:
        self.walk, self.cuts = walk, cuts
        self.tensors: dict[tuple[int, str], torch.Tensor] = {}
        self.records: list[dict[str, Any]] = []
        self.first_of = dict(cuts)
        self.end_of = {end: first for first, end in cuts}
        self.dropped = {i for first, end in cuts for i in range(first, end)}
        self.stop = self.cuts[-1][1] if cuts else 0

    def run(self, calibration: CalibrationSet) -> None:
        """Run the dense model, and fit the repair."""
        walk = self.walk
        size = max(1, min(_BATCH_ROWS, len(calibration) // HELD_OUT))
        batches = [walk.begin(*given) for given in calibration.batches(size)]
        probe = walk.begin(*calibration.probe())
        for i in progress_bar(range(self.stop), desc="fitting the repair", unit="layer"):
            with walk.layer(i) as run:
                self.before_layer(i, run, batches, probe)
                with self.watch_layer(i, batches):
                    for batch in (probe, *batches):
                        batch.hidden = run(batch.hidden, batch)
            if i + 1 in self.end_of:
                self.after_block(self.end_of[i + 1], i + 1, batches)

    def before_layer(self, i: int, run: Run, batches: list[Batch], probe: Batch) -> None:
        """Called before layer `i` runs, with the states that enter it; `probe` holds a few tokens for trial runs."""

    def watch_layer(self, i: int, batches: list[Batch]) -> AbstractContextManager[None]:
        """Observe layer `i` while the probe and then all batches run through it."""
        return nullcontext()

    def after_block(self, first: int, end: int, batches: list[Batch]) -> None:
        """Called with the states that leave the dropped block, layers `first` to `end - 1`."""
