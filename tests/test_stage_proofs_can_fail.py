"""Each stage's proof fails when the stage is broken on purpose.

The stages check themselves too, and refuse a model for which they are wrong. So each fault below is put in after that
check, and only the proof is left to find it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_layerprune.calibration import self_text
from hf_layerprune.cut import sizes
from hf_layerprune.cut.sizes import Sizes
from hf_layerprune.heal import losses, trainer
from hf_layerprune.measure import distance
from hf_layerprune.repair import linear, magnitude
from hf_layerprune.repair.fit import Repair
from hf_layerprune.runtime.divergence import Divergence, Reference, compute_divergence
from hf_layerprune.runtime.head import OutputHead
from hf_layerprune.runtime.parts import hook_scope
from hf_layerprune.runtime.walk import LayerWalk
from hf_layerprune.select import decode_times, taylor, trials

from .matrix import ProofError, cuts
from .stages import PROOFS
from .tiny_models import tiny_model

Fault = Callable[[pytest.MonkeyPatch], None]
FACTOR = 1.01


def after(monkeypatch: pytest.MonkeyPatch, owner: type, method: str, change: Callable[[Any], None]) -> None:
    """Change an object as soon as one of its methods has returned."""
    own = getattr(owner, method)

    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = own(self, *args, **kwargs)
        change(self)
        return result

    monkeypatch.setattr(owner, method, run)


def scaled(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, factor: float = FACTOR) -> None:
    """Multiply what a function returns."""
    own = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *args, **kwargs: own(*args, **kwargs) * factor)


# --- rank -----------------------------------------------------------------------------------------------


def layers_in_the_wrong_order(monkeypatch: pytest.MonkeyPatch) -> None:
    def exchange(walk: Any) -> None:
        own = walk.layer
        walk.layer = lambda index: own({2: 3, 3: 2}.get(index, index))

    after(monkeypatch, LayerWalk, "_check_layerwise", exchange)


def a_scale_in_the_head_of_the_walk(monkeypatch: pytest.MonkeyPatch) -> None:
    def scale(walk: Any) -> None:
        own = walk.logits
        walk.logits = lambda hidden: own(hidden) * FACTOR

    after(monkeypatch, LayerWalk, "_check_layerwise", scale)


def reversed_kl(logits: torch.Tensor, targets: torch.Tensor, reference: Reference | None = None) -> Divergence:
    """KL(model || reference) in place of KL(reference || model)."""
    right = compute_divergence(logits, targets, reference)
    if reference is None:
        return right
    return replace(right, kl=compute_divergence(reference.logits, targets, Reference(logits)).kl)


def kl_of_trials_with_swapped_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "compute_divergence", reversed_kl)


def a_dropped_layer_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    own = trials._run_trials
    undropped = lambda trial: replace(trial, drop=tuple(i for i in trial.drop if i != 5))  # noqa: E731
    monkeypatch.setattr(
        trials, "_run_trials", lambda walk, batches, tried, bar: own(walk, batches, [undropped(t) for t in tried], bar)
    )


def taylor_with_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taylor, "_sum_of_products", lambda weight, gradient: (weight * gradient).sum().item())


# --- repair ---------------------------------------------------------------------------------------------


def a_repair_that_is_not_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Repair, "apply", lambda *args: None)


def half_of_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    own = linear.solve_ridge

    def solve(*args: Any) -> linear.Fit:
        fit = own(*args)
        return replace(fit, change=fit.change / 2)

    monkeypatch.setattr(linear, "solve_ridge", solve)


def the_inverse_of_the_factor(monkeypatch: pytest.MonkeyPatch) -> None:
    own = magnitude.scale_writers
    monkeypatch.setattr(
        magnitude, "scale_writers", lambda i, layer, run, probe, factor: own(i, layer, run, probe, 1 / factor)
    )


# --- heal and evaluate ----------------------------------------------------------------------------------


def a_scale_in_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    def scale(output: Any) -> None:
        output._transform = replace(output._transform, scale=output._transform.scale * FACTOR)

    after(monkeypatch, OutputHead, "__init__", scale)


def distillation_with_swapped_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "Distillation", lambda *args: losses.Distillation(*args[:-1], "reverse"))


def gradients_of_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    scaled(monkeypatch, losses._TokenLosses, "gradient")


def kl_of_a_measurement_with_swapped_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distance, "compute_divergence", reversed_kl)


def agreement_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    def agreeing(*args: Any) -> Divergence:
        right = compute_divergence(*args)
        return right if right.agrees is None else replace(right, agrees=torch.ones_like(right.agrees))

    monkeypatch.setattr(distance, "compute_divergence", agreeing)


def targets_one_position_late(monkeypatch: pytest.MonkeyPatch) -> None:
    own = distance.compute_divergence
    monkeypatch.setattr(distance, "compute_divergence", lambda logits, targets, *of: own(logits, targets.roll(1), *of))


def text_that_is_not_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(self_text._Sampler, "__call__", lambda sampler, ids, scores: scores)


def layers_that_take_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_times, "hook_scope", lambda *hooks: hook_scope(*[hook.remove() for hook in hooks][:0]))


def parameters_of_the_base(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Sizes.parameters
    monkeypatch.setattr(Sizes, "parameters", lambda sizes, drop=(): own(sizes))


def a_cache_of_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    own = sizes._filled_bytes
    monkeypatch.setattr(sizes, "_filled_bytes", lambda model, context, batch: own(model, context, 1))


FAULTS: list[tuple[str, Fault, str]] = [
    ("rank", layers_in_the_wrong_order, "hidden states behind layer 2: off by"),
    ("rank", a_scale_in_the_head_of_the_walk, "logits: off by"),
    ("rank", kl_of_trials_with_swapped_arguments, "KL without layers"),
    ("rank", a_dropped_layer_that_runs, r"loss without layers \(5,\): off by"),
    ("rank", taylor_with_signs, "Taylor score of layer 0: off by"),
    ("repair", a_repair_that_is_not_applied, "repair linear: logits: off by"),
    ("repair", half_of_the_map, "repair linear: states behind layers .*: off by"),
    ("repair", the_inverse_of_the_factor, "repair magnitude: .* off by"),
    ("heal", a_scale_in_the_head, "ce of .*: loss: off by"),
    ("heal", distillation_with_swapped_arguments, "kd of full: loss: off by"),
    ("heal", gradients_of_another_size, "ce of .*: gradient of .* is off by"),
    ("evaluate", a_scale_in_the_head, "KL: off by"),
    ("evaluate", kl_of_a_measurement_with_swapped_arguments, "KL: off by"),
    ("evaluate", agreement_everywhere, "top-1 agreement: off by"),
    ("evaluate", targets_one_position_late, "log-likelihood of the model: off by"),
    ("evaluate", text_that_is_not_drawn, "text that the model writes: .* beside what was drawn"),
    ("evaluate", layers_that_take_no_time, r"decoding: layers \[0, 1, .*\] take no time"),
    ("evaluate", parameters_of_the_base, "parameters of the cut: .*, should be"),
    ("evaluate", a_cache_of_one_row, "cache of the cut: .*, should be"),
]


@pytest.mark.parametrize(
    ("stage", "fault", "message"), FAULTS, ids=[f"{stage}-{fault.__name__}" for stage, fault, _ in FAULTS]
)
def test_the_proof_fails(stage: str, fault: Fault, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_model("llama")
    fault(monkeypatch)
    with pytest.raises(ProofError, match=f"^{message}"):
        PROOFS[stage](dense, cuts("llama", dense.config))


def test_every_stage_has_a_fault() -> None:
    assert {stage for stage, _, _ in FAULTS} == set(PROOFS)
