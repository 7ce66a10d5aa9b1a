"""The proof of a repair: its new weights fit its definition, and the saved model has them."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from hf_layerprune import families
from hf_layerprune.calibration.rows import CalibrationSet
from hf_layerprune.errors import LayerPruneError
from hf_layerprune.families.layout import find_decoder_layers
from hf_layerprune.repair.fit import Repair, fit_repair
from hf_layerprune.repair.registry import REPAIRS
from hf_layerprune.repair.writers import swap_parameters
from hf_layerprune.runtime.parts import hook_scope

from .comparing import TOLERANCE, cut_of, same
from .matrix import ProofError, identities, load, logits
from .tiny_models import tiny_input


def prove_repair(dense: Any, proven_cuts: dict[str, tuple[int, ...]]) -> list[str]:
    """Prove every repair that the type accepts; returns their names."""
    refusals = {method: _prove_method(dense, method, proven_cuts["middle"], repair_rows(method)) for method in REPAIRS}
    proven = [method for method, refusal in refusals.items() if refusal is None]
    if not proven:
        raise next(iter(refusals.values()))
    return proven


def repair_rows(method: str) -> CalibrationSet:
    """Rows to fit a repair to. For `borrow`, they must be many: a layer's own neurons explain a few tokens completely."""
    length = 120 if method == "borrow" else 16
    return CalibrationSet.from_ids(tiny_input(seed=2, batch=5, length=length), "random tokens")


def _prove_method(dense: Any, method: str, middle: tuple[int, ...], rows: CalibrationSet) -> LayerPruneError | None:
    """Prove a repair at the first cut that it accepts; returns the refusal if it accepts none."""
    refusal = None
    for drop in chain((middle,), _single_layers(dense)):
        try:
            repair = fit_repair(dense, drop, rows, method)
        except LayerPruneError as error:
            refusal = refusal or error
            continue
        (fitted_as_written if REPAIRS[method].needs_layer_before else _scaled_as_written)(dense, repair, drop, rows)
        _same_when_saved(dense, repair, drop)
        return None
    return refusal


def _single_layers(dense: Any) -> Iterator[tuple[int, ...]]:
    """Cuts of single layers: if one follows a layer of experts, another may follow a plain layer."""
    n, protected = families.layer_count(dense.config), families.protected_layers(dense.config)
    for i in range(1, n - 1):
        try:
            families.cut_config(dense.config, families.make_cut(dense.config, [i]))
        except LayerPruneError:
            continue
        if i not in protected:
            yield (i,)


def fitted_as_written(dense: Any, repair: Repair, drop: tuple[int, ...], rows: CalibrationSet) -> None:
    """Each map is the ridge solution on the fitted rows, given what the model's own forward does there."""
    layers = find_decoder_layers(dense).layers
    ids, fitted = rows.input_ids, slice(0, 4)  # the fifth row judges
    for cut in repair.cuts:
        first, last = cut["layers"]
        index, _, name = cut["folded_into"].partition(".")
        module, before = layers[int(index)].get_submodule(name), int(index)
        earlier = [i for i in drop if i < first]
        folded = repair.by_layer()
        wanted = _leaving(dense, last, ids)
        with ExitStack() as stack:
            stack.enter_context(identities(dense, earlier))
            for i, values in folded.items():
                if i < before:
                    stack.enter_context(swap_parameters(layers[i], values))
            cut_plainly = _leaving(dense, before, ids)
            refitted = (name, cut.get("norm", "").partition(".")[2])
            start = _borrowed(layers[before], refitted, folded[before]) if repair.method == "borrow" else {}
            stack.enter_context(swap_parameters(layers[before], start))
            entering: list[torch.Tensor] = []
            keep = lambda m, args, output, entering=entering: entering.extend((args[0], output.clone()))  # noqa: E731
            with hook_scope(module.register_forward_hook(keep)):
                plain = _leaving(dense, before, ids)
            with hook_scope(module.register_forward_hook(lambda m, args, output: torch.zeros_like(output))):
                written = plain - _leaving(dense, before, ids)
            with swap_parameters(layers[before], folded[before]):
                mine = _leaving(dense, before, ids)
        features, output = (x.double().view(*plain.shape[:-1], -1) for x in entering)
        missing = wanted.double() - plain.double()
        added = added_by_fit(repair.method, cut, layers[before], features, output, written, missing, fitted)
        same(f"{_name(repair)}: states behind layers {first} to {last}", mine, plain.double() + added, 1e-3)
        errors = [(wanted - states)[fitted].double().square().sum().item() for states in (mine, cut_plainly)]
        if not errors[0] <= errors[1] * (1 + TOLERANCE):
            raise ProofError(f"{_name(repair)}: error {errors[0]} on the fitted rows, plainly cut {errors[1]}")


def added_by_fit(
    method: str,
    cut: dict[str, Any],
    layer: Any,
    features: torch.Tensor,
    output: torch.Tensor,
    written: torch.Tensor,
    missing: torch.Tensor,
    fitted: slice = slice(None),
) -> torch.Tensor:
    """What a fit adds to the hidden states after a layer, by its definition.

    Args:
        method (`str`): `linear`, or one that fits from the input of the projection.
        cut (`dict`): The record of the fit.
        layer (`nn.Module`): The layer before the fit.
        features (`torch.Tensor`): The projection's input `[..., in]`.
        output (`torch.Tensor`): Its output `[..., hidden]`.
        written (`torch.Tensor`): Its contribution to the hidden states after the layer.
        missing (`torch.Tensor`): What the dropped layers added.
        fitted (`slice`): The rows that were fitted.
    """
    norm = _Norm(layer.get_submodule(cut["norm"].partition(".")[2]), output) if "norm" in cut else None
    output = output if norm is None else norm.output
    gain = (written.double() * output).sum() / output.square().sum()
    same(f"repair {method}: what {cut['folded_into']} writes", gain * output, written, 1e-3)
    x = gain * (output if method == "linear" else features if norm is None else features / norm.divisor)
    added = x @ _ridge(x[fitted], missing[fitted], cut["ridge"])
    if norm is None or cut["ridge"] is None:
        return added
    new, old = gain * norm.again(output + added / gain), gain * output
    factor = (new * (missing + old))[fitted].sum() / new[fitted].square().sum()
    return factor * new - old


class _Norm:
    """The definition of an RMS norm, applied to the output of a projection."""

    def __init__(self, module: Any, x: torch.Tensor) -> None:
        self.epsilon = getattr(module, "variance_epsilon", None) or module.eps
        self.divisor = (x.square().mean(-1, keepdim=True) + self.epsilon).sqrt()
        self.output = module(x.float()).double()
        self.scale = (self.output * self.divisor).flatten(0, -2).norm(dim=0) / x.flatten(0, -2).norm(dim=0)

    def again(self, y: torch.Tensor) -> torch.Tensor:
        """The output for the input that would give `y` with the divisor of before."""
        wide = y * self.divisor
        return wide / ((wide / self.scale).square().mean(-1, keepdim=True) + self.epsilon).sqrt()


def _borrowed(layer: Any, refitted: tuple[str, str], values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights that a fit starts from: new neurons before the projection write nothing yet."""
    start = {name: value for name, value in values.items() if name.rpartition(".")[0] not in refitted}
    if not start:
        return {}

    def by_output(name: str, value: torch.Tensor) -> torch.Tensor:
        module = layer.get_submodule(name.rpartition(".")[0])
        return value.T if value.ndim == 2 and isinstance(module, Conv1D) else value

    weight = by_output(f"{refitted[0]}.weight", layer.get_parameter(f"{refitted[0]}.weight")).clone()
    new = torch.zeros(weight.shape[1], dtype=torch.bool)
    for name, value in start.items():
        differs = by_output(name, value) != by_output(name, layer.get_parameter(name))
        new |= (
            differs.flatten(1).any(1).view(-1, len(new)).any(0)
            if differs.ndim > 1
            else differs.view(-1, len(new)).any(0)
        )
    weight[:, new] = 0
    return start | {f"{refitted[0]}.weight": by_output(f"{refitted[0]}.weight", weight)}


def _name(repair: Repair) -> str:
    """For messages."""
    return f"repair {repair.method}"


def _ridge(x: torch.Tensor, y: torch.Tensor, strength: float | None) -> torch.Tensor:
    x, y = x.flatten(0, -2).double(), y.flatten(0, -2).double()
    if strength is None:
        return torch.zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    gram = x.T @ x
    scale = gram.diagonal().mean()  # the mean eigenvalue
    return torch.linalg.solve(gram + strength * scale * torch.eye(len(gram)), x.T @ y)


def _leaving(model: Any, index: int, ids: torch.Tensor) -> torch.Tensor:
    """The output of a layer in the model's own forward pass."""
    seen: list[torch.Tensor] = []
    keep = lambda module, args, output: seen.append(output[0] if isinstance(output, tuple | list) else output)  # noqa: E731
    with hook_scope(find_decoder_layers(model).layers[index].register_forward_hook(keep)):
        logits(model, ids)
    return seen[0]


def _scaled_as_written(dense: Any, repair: Repair, drop: tuple[int, ...], rows: CalibrationSet) -> None:
    """What the layers after a cut write is divided by the factor by which the dropped block enlarged the states."""
    layers, factor = find_decoder_layers(dense).layers, 1.0
    factors = [1.0] * len(layers)
    for cut in repair.cuts:
        first, last = cut["layers"]
        before, after = (_leaving(dense, i, rows.input_ids).abs().sum(-1) for i in (first - 1, last))
        same("repair magnitude: size ratio", cut["size_ratio"], (after / before).mean())
        factor /= (after / before).mean().item()
        for i in range(last + 1, len(layers)):
            factors[i] = factor
    if not repair.tensors:
        raise ProofError("repair magnitude changes nothing behind a cut in the middle")
    for (i, name), value in repair.tensors.items():
        same(f"repair magnitude: {i}.{name}", value, layers[i].get_parameter(name) * factors[i])
    _multiplied_at_the_cuts(dense, repair, drop, rows.input_ids)


def _multiplied_at_the_cuts(dense: Any, repair: Repair, drop: tuple[int, ...], ids: torch.Tensor) -> None:
    """The result equals that of Prune&Comp's own procedure, which multiplies the states at the cut by the ratio."""
    layers = find_decoder_layers(dense).layers
    with identities(dense, drop), ExitStack() as stack:
        for cut in repair.cuts:

            def multiply(module: Any, args: Any, kwargs: Any, ratio: float = cut["size_ratio"]) -> Any:
                if args:
                    return (args[0] * ratio, *args[1:]), kwargs
                return args, kwargs | {"hidden_states": kwargs["hidden_states"] * ratio}

            handle = layers[cut["layers"][0]].register_forward_pre_hook(multiply, with_kwargs=True)
            stack.callback(handle.remove)
        wanted = logits(dense, ids)
    with identities(dense, drop), ExitStack() as stack:
        for i, values in repair.by_layer().items():
            stack.enter_context(swap_parameters(layers[i], values))
        same("repair magnitude: logits", logits(dense, ids), wanted, 1e-2)  # norms add a little to what they divide by


def _same_when_saved(dense: Any, repair: Repair, drop: tuple[int, ...]) -> None:
    ids = tiny_input(seed=3)
    pruned = copy.deepcopy(cut_of(dense, drop))
    cut = families.make_cut(dense.config, drop)
    repair.apply(find_decoder_layers(pruned).layers, cut.new_index)
    mine = logits(pruned, ids)
    layers = find_decoder_layers(dense).layers
    with ExitStack() as stack:
        stack.enter_context(identities(dense, drop))
        for i, values in repair.by_layer().items():
            stack.enter_context(swap_parameters(layers[i], values))
        same(f"{_name(repair)}: logits", mine, logits(dense, ids))
    with tempfile.TemporaryDirectory() as folder:
        pruned.save_pretrained(folder)
        again, lost = load(folder, dense)
    if lost or not torch.equal(logits(again, ids), mine):
        raise ProofError(f"{_name(repair)}: saved and reloaded, it differs ({lost})")
