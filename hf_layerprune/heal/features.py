"""Feature reconstruction: the layers before a cut learn to produce the dense model's hidden states after it.

Neither the layers after the cut nor the head run, so a step costs a fraction of one of distillation. LLM-Streamline
(arXiv:2403.19135) trains one layer that way; here it is a first phase, and training on the loss follows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CutError
from ..families import Cut
from ..runtime.prefix import Prefix, first_trained_layer
from .student import recorded_cut

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .config import HealConfig

# This phase's learning rate and the time of its steps, relative to the next phase (SmolLM2-135M, docs/experiments.md).
RATE, _COST = 2.5, 0.1
# The least mean square of a target to divide by; that of padding can be smaller.
_MIN_MEAN_SQUARE = 1e-12


def cut_boundaries(cut: Cut) -> dict[int, int]:
    """Where hidden states are compared: after each block of dropped layers with a layer before it.

    For each block, ascending: how many layers of the pruned model and of the dense model are before that place.
    """
    # The layers of a block have the same number of layers before them, so its last one decides.
    ends = {sum(kept < dropped for kept in cut.keep): dropped + 1 for dropped in cut.drop}
    return {front: dense for front, dense in ends.items() if front}


def trained_boundaries(cut: Cut, first: int) -> dict[int, int]:
    """The [`cut_boundaries`] after the first layer that is trained, an index in the pruned model.

    Raises:
        CutError: There are none.
    """
    boundaries = {front: dense for front, dense in cut_boundaries(cut).items() if first < front}
    if not boundaries:
        raise CutError(
            "features=... trains the layers before the cut, and there are none, or none of them is trained; use --method behind2 "
            'or cut2 in the recipe (tune_layers="cut" in Python), or features=0'
        )
    return boundaries


def feature_loss(states: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """How far states are from the dense model's: for each token, the mean squared error over RMS^1.5 of the target.

    The squared error alone would be that of the few tokens with enormous states (massive activations,
    arXiv:2402.17762). The relative error, over RMS^2, neglects them, although much of the attention goes to them: in
    one run they were lost after a thousand steps, which broke the model.
    """
    target = target.float()
    error = (states.float() - target).square().mean(-1)
    return error / target.square().mean(-1).clamp(min=_MIN_MEAN_SQUARE) ** 0.75


def allow_unused_parameters(args: HealConfig) -> None:
    """Prepare settings for steps in which a forward pass ends early and most parameters get no gradient.

    Raises:
        CutError: A setting rules that out.
    """
    recompute: Any = args.gradient_checkpointing_kwargs or {}
    if args.gradient_checkpointing and recompute.get("use_reentrant"):
        raise CutError(
            "features=... needs use_reentrant=False in gradient_checkpointing_kwargs; set it, or use features=0"
        )
    if args.ddp_find_unused_parameters is False:
        raise CutError("features=... needs ddp_find_unused_parameters=True; leave that out, or use features=0")
    if args.world_size > 1:
        args.ddp_find_unused_parameters = True


class FeaturePhase:
    """The phase for one model, the pruned one without PEFT's wrapper.

    Raises:
        CutError: No layer before the cut is trained, or the model was not pruned.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        cut = recorded_cut(model.config)
        if cut is None:
            raise CutError(
                "features=... reproduces what dropped layers did, and this model was not pruned; use features=0"
            )
        boundaries = trained_boundaries(cut, first_trained_layer(model))
        self._depths = tuple(boundaries)
        # After how many of its layers the dense model's states are wanted.
        self.teacher_depths = tuple(boundaries.values())
        self._front = Prefix(model, self._depths[-1])

    @torch.compiler.disable(recursive=False)
    def loss(
        self, run: Callable[..., Any], inputs: dict[str, Any], target: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """Run the layers before the last cut, and compare their states with the dense model's.

        The loss is summed over the tokens that count, and averaged over blocks. `run` is the model's forward method, and
        `inputs` its arguments. `target` are the dense model's states after each block, joined, `[batch, seq, blocks * hidden]`;
        the mask of the tokens that count is boolean `[batch, seq]`.
        """
        found = self._front.run(self._depths, forward=run, **inputs)
        parts = target.chunk(len(self._depths), -1)
        losses = [feature_loss(found[depth], part) for depth, part in zip(self._depths, parts, strict=True)]
        return torch.stack(losses).mean(0)[mask].sum()


def phased_schedule(schedule: Callable[..., float], first: int, steps: int, warmup: int) -> Callable[[int], float]:
    """A schedule of the learning rate for both phases.

    The first steps, those of this phase, count at their cost, and have a higher rate. The steps of the warm-up keep their number.
    """
    cost = _COST * first + steps - first

    def factor(step: int) -> float:
        done = _COST * min(step, first) + max(step - first, 0)
        return schedule(max(steps * done / cost, min(step, warmup))) * (RATE if step < first else 1.0)

    return factor
