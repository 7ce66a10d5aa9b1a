"""Check with transformers' own loader that a cut checkpoint holds the weights of its model, without reading any.

transformers initialises a missing weight randomly and only warns. So the cut model is built on the meta device and
"loaded" from empty tensors of the same names and shapes; missing, unexpected and mismatched weights are then refused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, cause_of
from ..families.layout import find_decoder_layers
from ..runtime.loading import check_complete
from ..runtime.model_class import model_class_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_LAYER = re.compile(r"\.\d+\.")


def check_tensors(name: str, config: PreTrainedConfig, shapes: Mapping[str, Collection[int]], prefix: str) -> None:
    """Refuse a cut whose tensors (names after the cut, and shapes) are not those that the cut model needs.

    In a quantised checkpoint, weights are stored under other names and in other shapes. There, a packed weight is only
    known to be missing from a layer if another layer has it.

    Raises:
        CheckpointError: A tensor is missing, is not part of the model, or has the wrong shape.
    """
    import torch

    picked = model_class_of(copy.deepcopy(config))
    if picked is None:
        return
    model_class, part = picked
    packed = hasattr(part, "quantization_config")
    if packed:
        del part.quantization_config
    state = {key: torch.empty(tuple(shape), device="meta") for key, shape in shapes.items()}
    try:
        with _silence_loader():
            loaded: Any = model_class.from_pretrained(
                None,
                config=part,
                state_dict=state,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except NotImplementedError:  # this model's loader needs the content of some tensors
        if not packed:
            _check_names(name, model_class, part, shapes, prefix)
        return
    except (RuntimeError, ValueError, KeyError) as error:
        if packed:
            return
        raise CheckpointError(
            f"{name} does not hold the weights that its model is built from ({cause_of(error)}); the checkpoint is "
            "incomplete, or its config belongs to another one"
        ) from error
    model, info = loaded
    if packed:  # packed weights have other names and shapes
        inside = find_decoder_layers(model).path + "."
        names = [inside + key.removeprefix(prefix) if key.startswith(prefix) else key for key in shapes]
        _check_report(name, _exclude_packed(info["missing_keys"], names, model))
        return
    # If only the text part of a larger model is built, the weights of the other parts are not used.
    within = "" if type(part) is type(config) else find_decoder_layers(model).path + "."
    _check_report(name, info["missing_keys"], info["unexpected_keys"], info["mismatched_keys"], within)


def _check_names(
    name: str, model_class: type[PreTrainedModel], config: PreTrainedConfig, names: Collection[str], prefix: str
) -> None:
    """Compare names with those of an empty model, where the model names its layers as the checkpoint does."""
    import torch

    with _silence_loader(), torch.device("meta"):
        model = model_class(copy.deepcopy(config))
    if find_decoder_layers(model).path + "." != prefix:
        return
    missing = [key for key in model.state_dict() if key not in names and key not in model.all_tied_weights_keys]
    _check_report(name, _exclude_packed(missing, names, model))


def _check_report(
    name: str, missing: Collection[str], unexpected: Collection[str] = (), mismatched: Any = (), within: str = ""
) -> None:
    info = {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": mismatched}
    check_complete(name, info, within=within, remark="names in the pruned model")


def _exclude_packed(missing: Collection[str], names: Collection[str], model: PreTrainedModel) -> list[str]:
    """Of the weights that the loader misses in a quantised checkpoint, those that are not just stored in packed form.

    A module with any tensor in the checkpoint counts as packed. Of the other modules, a weight in a decoder layer is
    missing if some layer stores it, or if it is a vector, such as a norm's: vectors are never packed.
    """
    forms = {_LAYER.sub(".#.", name) for name in names}
    modules = {name.rpartition(".")[0] for name in names}
    parameters = dict(model.named_parameters())
    return [
        key
        for key in missing
        if not any(f"{module}.".startswith(key.rpartition(".")[0] + ".") for module in modules)
        and (
            not _LAYER.search(key)
            or _LAYER.sub(".#.", key) in forms
            or (key in parameters and parameters[key].ndim == 1)
        )
    ]


@contextmanager
def _silence_loader() -> Iterator[None]:
    """Silence the loader's reports and progress bars."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars
    from transformers.utils import logging

    level, bar, no_bars = logging.get_verbosity(), logging.is_progress_bar_enabled(), are_progress_bars_disabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
        if no_bars:  # which transformers has enabled with its own
            disable_progress_bars()
