"""Check a cut by running it: on a few tokens, the pruned model and the dense one with its dropped layers bypassed.

The tables in `families` say how a cut is made, and the test matrix proves them for some versions of transformers. This
check covers the installed version: it detects a release in which layers use their position differently.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .. import families
from ..errors import CutError, LayerPruneError
from ..families.layout import find_decoder_layers
from ..families.multimodal import path_to_text
from ..families.types import proven_versions
from ..runtime.parts import TrialError, evaluation_mode, hook_scope, probe_ids, trial, zero_masked
from ..versions import installed_version

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)

_TOKENS = 8
# Kernels round differently depending on the alignment of their operands. Relative to the largest logit:
_TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.005}
_DEFAULT_TOLERANCE = 1e-5
_warned_types: set[str] = set()


class WrongCutError(LayerPruneError):
    """A pruned model gives other logits than its base with the dropped layers bypassed."""


class CannotCheckError(LayerPruneError):
    """A model can't be run here to check a cut."""


def bypassed_logits(model: PreTrainedModel, layers: Sequence[int]) -> torch.Tensor:
    """Logits `[1, seq, vocab]` of a few tokens from the dense model, with some layers returning their input.

    Raises:
        CannotCheckError: The weights are quantised, not in memory or sharded across processes, the model needs other
            inputs than tokens, or its logits leave nothing to compare.
    """
    if getattr(model, "is_quantized", False):
        # bitsandbytes repacks 4-bit weights in a forward pass on a CPU, and what is saved afterwards is garbage.
        raise CannotCheckError("a forward pass can repack quantised weights")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise CannotCheckError(f"{name} is not in memory")
        if hasattr(parameter, "ds_id") or type(parameter).__name__ in ("DTensor", "FlatParameter"):
            raise CannotCheckError("the dense model's weights are sharded across processes")
    try:
        with trial(), _bypassed(model, layers):
            logits = probe_logits(model)
    except TrialError as error:
        raise CannotCheckError(f"the dense model does not run on tokens alone ({error})") from error
    compared = zero_masked(logits, logits)
    if compared is None or not compared[0].any():  # a wrong cut would have the same
        raise CannotCheckError(
            "the dense model's logits without these layers are all zero or not finite: it overflows "
            f"{str(logits.dtype).removeprefix('torch.')}, or its weights are damaged"
        )
    return logits


def probe_logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits of a few fixed tokens, `[1, seq, vocab]`, in evaluation mode and without a cache or gradients."""
    with evaluation_mode(model):
        return model(input_ids=probe_ids(model, _TOKENS), use_cache=False).logits


def check_logits(pruned: PreTrainedModel, expected: torch.Tensor) -> None:
    """Compare the logits of a pruned model with those that `bypassed_logits` gives for the dense one.

    Raises:
        WrongCutError: They differ by more than rounding, or the pruned model does not run.
    """
    try:
        with trial():
            logits = probe_logits(pruned)
    except TrialError as error:
        raise WrongCutError(_mismatch(pruned.config, f"the pruned model does not run ({error})")) from error
    expected = expected.to(logits.device)
    if logits.shape != expected.shape:
        raise WrongCutError(_mismatch(pruned.config, f"logits are {tuple(logits.shape)}, not {tuple(expected.shape)}"))
    if (compared := zero_masked(logits, expected)) is None:
        raise WrongCutError(_mismatch(pruned.config, "other logits are masked or infinite"))
    gap, scale = (compared[0] - compared[1]).abs().max().item(), compared[1].abs().max().item()
    if gap > _TOLERANCE.get(logits.dtype, _DEFAULT_TOLERANCE) * max(scale, 1e-6):
        raise WrongCutError(_mismatch(pruned.config, f"logits differ by {gap:.3g} where the largest is {scale:.3g}"))


def check_cut(dense: PreTrainedModel, pruned: PreTrainedModel) -> None:
    """Check a pruned model against its base.

    Args:
        dense (`PreTrainedModel`): The base. It is not changed.
        pruned (`PreTrainedModel`): The pruned model, neither repaired nor trained. It is not changed.

    Raises:
        WrongCutError: The pruned model gives other logits than the base with its dropped layers bypassed.
        CannotCheckError: The base can't be run here.
    """
    marker = getattr(pruned.config, families.MARKER, None)
    if not marker:
        raise CutError(
            "the pruned model's config has no layer_drop entry, so its dropped layers are not known; pass a model that "
            "hf-layerprune has pruned"
        )
    check_logits(pruned, bypassed_logits(dense, marker["drop_layers"]))


def warn_if_unproven(config: PreTrainedConfig) -> None:
    """Warn, once for each model type, if a cut is not proven with the installed version of transformers."""
    model_type = families.text_config(config).model_type
    version, proven = str(installed_version("transformers")), proven_versions(*_model_types(config))
    if version in proven or model_type in _warned_types:
        return
    _warned_types.add(model_type)
    logger.warning(
        "a cut of model type %s is not proven with transformers %s (proven with %s); compare it with its base: "
        "`hf-layerprune prune --check`, or hf_layerprune.cut.check.check_cut",
        model_type,
        version,
        ", ".join(proven) or "no listed version",
    )


def _model_types(config: PreTrainedConfig) -> list[str]:
    return [part.model_type for part in path_to_text(config)]


def _mismatch(config: PreTrainedConfig, what: str) -> str:
    part = families.text_config(config)
    proven = proven_versions(*_model_types(config))
    return (
        f"this cut of a {part.model_type} model is wrong with transformers {installed_version('transformers')}: {what}, against "
        f"the dense model with its dropped layers bypassed; nothing was kept. Cuts of this type are proven with "
        f"transformers {', '.join(proven) or 'no listed version'}; install one of these"
    )


@contextmanager
def _bypassed(model: PreTrainedModel, layers: Sequence[int]) -> Iterator[None]:
    """Let layers run, but return their input."""

    def return_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        if not isinstance(output, tuple | list):
            return hidden
        # Some layers pass on more than hidden states: any per-token tensor with the same position in inputs and outputs.
        inputs = args or (hidden,)
        count = 1
        while count < min(len(inputs), len(output)) and _is_passed_through(inputs[count], output[count], hidden):
            count += 1
        return (*inputs[:count], *output[count:])

    stack = find_decoder_layers(model).layers
    with hook_scope(*[stack[i].register_forward_hook(return_input, with_kwargs=True) for i in layers]):
        yield


def _is_passed_through(value: Any, returned: Any, hidden: torch.Tensor) -> bool:
    tensors = isinstance(value, torch.Tensor) and isinstance(returned, torch.Tensor)
    return tensors and value.shape == returned.shape and value.shape[:-1] == hidden.shape[:-1]
