"""Make up for dropped layers in closed form, before anything is trained.

    repair = fit_repair(model, drop_layers, calibration, method="linear")

The dense model is walked once, layer by layer, with the calibration set; what is fitted at a cut goes into weights of
layers that stay, so the model keeps its size and its architecture. Behind a cut that was repaired, the next one is
fitted to the states that the repaired model really has.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm import tqdm

from ..errors import CutError
from ..families import check_stage
from ..families.layout import find_final_norm
from ..runtime.walk import Batch, LayerWalk
from .linear import Fit, NormalEquations, solve_ridge
from .magnitude import SizeRatio, scaled_writers
from .writers import Writer, find_writers, inputs, outputs, swapped

if TYPE_CHECKING:
    from ..calibration.rows import CalibrationSet

__all__ = [
    "FITTED",
    "METHODS",
    "Fit",
    "NormalEquations",
    "Repair",
    "Writer",
    "find_writers",
    "fit_repair",
    "solve_ridge",
    "swapped",
]

# Those that change the projection in front of a cut, and so need a layer there.
FITTED = ("linear", "refit")
METHODS = (*FITTED, "magnitude")
logger = logging.getLogger(__name__)

_PROBE_TOKENS = 32
_HELD_OUT = 5  # every fifth batch judges


@dataclass
class Repair:
    """New values for some weights of the layers that stay.

    Args:
        method (`str`): One of `METHODS`.
        tensors (`dict[tuple[int, str], torch.Tensor]`): By the layer's index in the base and the parameter's name in
            the layer, such as `(11, "mlp.down_proj.weight")`; in the dtype and shape of the old ones, on the CPU.
        cuts (`list[dict]`): What was fitted at each cut, for the record.
    """

    method: str
    tensors: dict[tuple[int, str], torch.Tensor] = field(default_factory=dict)
    cuts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def modules(self) -> list[tuple[int, str]]:
        """The modules that change: the layer's index in the base, and the module's name in it."""
        return sorted({(index, name.rpartition(".")[0]) for index, name in self.tensors})

    def apply(self, layers: Sequence[nn.Module], new_index: dict[int, int] | None = None) -> None:
        """Put the new values into a model's layers.

        Args:
            layers (`Sequence[nn.Module]`): The decoder layers.
            new_index (`dict[int, int]`, *optional*): Where a layer of the base is in `layers`; by default where it
                was.
        """
        for (index, name), value in self.tensors.items():
            parameter = layers[new_index[index] if new_index else index].get_parameter(name)
            parameter.data = value.to(parameter.device, parameter.dtype)


def blocks(layers: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring layers as blocks.

    Args:
        layers (`Sequence[int]`): Indices.

    Returns:
        `list[tuple[int, int]]`: The first layer of each block, and the one behind its last.
    """
    found: list[list[int]] = []
    for i in sorted(layers):
        if found and found[-1][1] == i:
            found[-1][1] += 1
        else:
            found.append([i, i + 1])
    return [(first, end) for first, end in found]


def fit_repair(
    model: nn.Module | LayerWalk, drop_layers: Sequence[int], calibration: CalibrationSet, method: str = "linear"
) -> Repair:
    """Fit what makes up for dropped layers.

    Args:
        model (`PreTrainedModel` or `LayerWalk`): The dense model. It is left as it is.
        drop_layers (`Sequence[int]`): The layers that are, or will be, dropped.
        calibration (`CalibrationSet`): Rows `[samples, seq]`; a fifth of them is held out to choose the ridge.
        method (`str`, defaults to `"linear"`): `"linear"`: the ridge map of ReplaceMe (arXiv:2505.02819, section 3),
            folded into the output projection of the MLP in front of each cut. `"refit"`: that projection itself, by
            the same least squares from what enters it, which is wider than what leaves it and so explains more; it
            wants more tokens than it has inputs. `"magnitude"`: the rescaling of Prune&Comp (arXiv:2507.18212).

    Returns:
        `Repair`: The new weights. [`~Repair.apply`] puts them in place.

    Raises:
        CutError: There is no layer in front of a cut, or no weight there that the map can be folded into.
        UnsupportedModelError: The layers can't be run one at a time.
    """
    check_stage((model.model if isinstance(model, LayerWalk) else model).config, "repair")
    walk = model if isinstance(model, LayerWalk) else LayerWalk(model)
    cuts = blocks(drop_layers)
    if cuts and cuts[0][0] == 0 and method in FITTED:
        raise CutError(
            f'repair="{method}" changes the layer in front of a cut, and layer 0 is dropped; keep layer 0 '
            '(protect_first=1), or use repair="magnitude"'
        )
    if method == "magnitude" and find_final_norm(walk.model, walk.stack) is None:
        raise CutError('repair="magnitude" needs a norm before the head, and this model has none; use repair="linear"')
    fitter = _Linear(walk, cuts, method) if method in FITTED else _Magnitude(walk, cuts)
    size = max(1, min(8, len(calibration.input_ids) // _HELD_OUT))
    if len(calibration.input_ids) < 2:
        raise CutError(
            "a repair needs two calibration rows or more: one to fit, one to judge; raise calibration_samples"
        )
    with torch.no_grad():
        fitter.run(calibration, size)
    repair = Repair(method, fitter.tensors, fitter.records)
    logger.info("repaired %s: %s", method, "; ".join(str(record) for record in repair.cuts) or "nothing to do")
    return repair


class _Fitter:
    """Walks the dense model once; knows which states enter and leave each cut."""

    def __init__(self, walk: LayerWalk, cuts: list[tuple[int, int]]) -> None:
        self.walk, self.cuts = walk, cuts
        self.tensors: dict[tuple[int, str], torch.Tensor] = {}
        self.records: list[dict[str, Any]] = []
        self.first_of = dict(cuts)
        self.end_of = {end: first for first, end in cuts}
        self.dropped = {i for first, end in cuts for i in range(first, end)}
        self.last = self.cuts[-1][1] if cuts else 0

    def run(self, calibration: CalibrationSet, size: int) -> None:
        walk = self.walk
        batches = [walk.begin(ids) for ids in calibration.batches(size)]
        probe = walk.begin(calibration.input_ids[:1, :_PROBE_TOKENS])
        for i in tqdm(range(self.last), desc="fitting the repair", unit="layer", disable=None):
            if i in self.first_of:
                self.enter(i, batches)
            with walk.layer(i) as run:
                self.step(i, run, batches, probe)
                for batch in (probe, *batches):
                    batch.hidden = run(batch.hidden, batch)
            if i + 1 in self.end_of:
                self.leave(self.end_of[i + 1], i + 1, batches)

    def enter(self, first: int, batches: list[Batch]) -> None: ...

    def step(self, i: int, run: Any, batches: list[Batch], probe: Batch) -> None: ...

    def leave(self, first: int, end: int, batches: list[Batch]) -> None: ...


class _Linear(_Fitter):
    """Fits what stands in for each block; from the first cut on, the repaired model's own states go along.

    Args:
        walk (`LayerWalk`): The dense model.
        cuts (`list[tuple[int, int]]`): Blocks of dropped layers.
        method (`str`): `"linear"`, from what the projection gives, or `"refit"`, from what enters it.
    """

    def __init__(self, walk: LayerWalk, cuts: list[tuple[int, int]], method: str) -> None:
        super().__init__(walk, cuts)
        self.method = method
        self.look = outputs if method == "linear" else inputs
        self.student: list[torch.Tensor] | None = None

    def step(self, i: int, run: Any, batches: list[Batch], probe: Batch) -> None:
        if i in self.dropped:
            return
        if i + 1 not in self.first_of:
            if self.student is not None:
                self.student = [run(state, batch) for state, batch in zip(self.student, batches, strict=True)]
            return
        writers = find_writers(self.walk.layers[i], run, probe)
        if not writers:
            raise CutError(
                f'repair="{self.method}" has nothing to fold its map into: no output projection of layer {i} writes '
                "into the hidden states directly (a norm, or a mixture of experts, stands in between); use "
                'repair=None and tune the layers beside the cut (tune_layers="cut")'
            )
        self.writer = writers[0]
        # The layer is run again when the block has ended, so that nothing as wide as an MLP is kept for all rows.
        if self.student is None:
            self.student = [batch.hidden for batch in batches]

    def leave(self, first: int, end: int, batches: list[Batch]) -> None:
        writer, features = self.writer, []
        fitted = held_out = None
        judging = max(2, min(_HELD_OUT, len(batches)))
        with self.walk.layer(first - 1) as run, self.look(writer.module, features.append):
            for number, (batch, entering) in enumerate(zip(batches, self.student, strict=True)):
                state = run(entering, batch).float()
                change, feature = batch.hidden.float() - state, features.pop()
                feature = feature.view(*state.shape[:-1], feature.shape[-1]).float() * writer.gain
                if fitted is None:
                    sizes = feature.shape[-1], self.walk.device, state.shape[-1]
                    fitted, held_out = NormalEquations(*sizes), NormalEquations(*sizes)
                (held_out if number % judging == judging - 1 else fitted).add(feature, change)
        fit = solve_ridge(fitted, held_out)
        if self.method == "linear":
            new = writer.folded(torch.eye(len(fit.change)).to(fit.change) + fit.change)
        else:
            new = writer.moved(fit.change)
        new = {f"{writer.name}.{name}": value for name, value in new.items()}
        self.tensors |= {(first - 1, name): value for name, value in new.items()}
        with self.walk.layer(first - 1) as run, swapped(self.walk.layers[first - 1], new):
            self.student = [run(state, batch) for state, batch in zip(self.student, batches, strict=True)]
        self.records.append(
            {
                "layers": [first, end - 1],
                "folded_into": f"{first - 1}.{writer.name}",
                "ridge": fit.strength if fit.strength != float("inf") else None,
                "unexplained_share": round(fit.unexplained, 4),
                "tokens": fitted.tokens,
                "held_out_tokens": held_out.tokens,
            }
        )


class _Magnitude(_Fitter):
    """Measures how a dropped block changes the size of the states, and scales the layers behind it."""

    def __init__(self, walk: LayerWalk, cuts: list[tuple[int, int]]) -> None:
        super().__init__(walk, cuts)
        self.factor = 1.0
        if any(end < walk.num_layers for _, end in cuts):
            self.last = walk.num_layers
        elif cuts:
            logger.warning('repair="magnitude" has nothing to do behind the last layers: the final norm undoes it')
            self.last = 0

    def enter(self, first: int, batches: list[Batch]) -> None:
        self.before = [batch.hidden for batch in batches]

    def step(self, i: int, run: Any, batches: list[Batch], probe: Batch) -> None:
        if i not in self.dropped and self.factor != 1.0:
            new = scaled_writers(i, self.walk.layers[i], run, probe, self.factor)
            self.tensors |= {(i, name): value for name, value in new.items()}

    def leave(self, first: int, end: int, batches: list[Batch]) -> None:
        ratio = SizeRatio()
        for before, batch in zip(self.before, batches, strict=True):
            ratio.add(before, batch.hidden)
        if end < self.walk.num_layers:
            self.factor /= ratio.value
        self.records.append({"layers": [first, end - 1], "size_ratio": round(ratio.value, 6)})
