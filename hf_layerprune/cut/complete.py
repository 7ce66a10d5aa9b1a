"""Does a checkpoint hold what its model asks for? Found out by transformers' own loader, from names and shapes alone.

A model that lacks a weight gets a random one, with no more than a warning. So the cut model is built without weights,
"loaded" from tensors without content, and what the loader finds missing, left over or of another shape is refused.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .. import families
from ..errors import CheckpointError
from ..families.layout import find_decoder_layers
from ..runtime.loading import check_complete

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_LAYER = re.compile(r"\.\d+\.")


def model_class_of(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], PreTrainedConfig] | None:
    """The class that `AutoModelForCausalLM` would pick, and the part of the config that it takes.

    Args:
        config (`PreTrainedConfig`): A model's config.

    Returns:
        `tuple[type[PreTrainedModel], PreTrainedConfig]`, *optional*: `None` where the config belongs to no causal
            language model.
    """
    import transformers
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.auto_factory import _get_model_class

    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        # The text part of a larger model, saved alone, may have no auto class; its config names its own.
        own: Any = getattr(transformers, (config.architectures or [""])[0], None)
        return (own, config) if getattr(own, "config_class", None) is type(config) else None
    model_class = _get_model_class(config, mapping)
    text_class = config.sub_configs.get("text_config")
    if text_class is None or getattr(model_class, "config_class", None) is not text_class:
        return model_class, config
    part = config.get_text_config()
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        part.quantization_config = quantization
    return model_class, part


def check_tensors(name: str, config: PreTrainedConfig, shapes: Mapping[str, Collection[int]], prefix: str) -> None:
    """Refuse a cut whose tensors are not those that the cut model asks for.

    Where every layer stores a weight in another form, such as packed, nothing can be said about it here; but what one
    layer has, the others of its kind must have too.

    Args:
        name (`str`): What to call the checkpoint.
        config (`PreTrainedConfig`): The config after the cut.
        shapes (`Mapping[str, Collection[int]]`): The shape of each tensor, by its name after the cut.
        prefix (`str`): What stands before a layer's index in a tensor's name.

    Raises:
        CheckpointError: A tensor is missing, has no place in the model, or has another shape.
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
        with _silence():
            loaded: Any = model_class.from_pretrained(
                None,
                config=part,
                state_dict=state,
                device_map={"": "meta"},
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
    except (RuntimeError, ValueError, KeyError) as error:
        gap = _gap(shapes)
        if packed or gap is None:  # not a form that the loader can take without its content
            return
        raise CheckpointError(
            f"{name} lacks {gap}; the checkpoint is incomplete, download or save it again"
        ) from error
    model, info = loaded
    forms = {_LAYER.sub(".#.", key) for key in shapes}
    modules = {key.rpartition(".")[0] for key in shapes}
    stem = prefix.rpartition(".")[0]
    missing = [
        key
        for key in info["missing_keys"]
        if not (packed and any(module.startswith(key.rpartition(".")[0]) for module in modules))
        and (not _LAYER.search(key) or _any_form(key, forms))
    ]
    whole = type(part) is type(config)
    decoder = find_decoder_layers(model).path + "."
    unexpected = [
        key
        for key in info["unexpected_keys"]
        if (whole or key.startswith(decoder)) and _is_odd(key, shapes, stem, families.layer_count(config))
    ]
    known = {"missing_keys": missing, "unexpected_keys": unexpected, "mismatched_keys": info["mismatched_keys"]}
    if packed:  # other names and shapes are what packing is
        known |= {"unexpected_keys": [], "mismatched_keys": []}
    check_complete(name, known, remark="names in the pruned model")


def _any_form(key: str, forms: Collection[str]) -> bool:
    """Whether another layer has such a tensor. The loader may know the checkpoint's names by another beginning."""
    form = _LAYER.sub(".#.", key)
    return any(form.endswith(other[other.find("#") :]) for other in forms if "#" in other)


def _is_odd(key: str, shapes: Collection[str], stem: str, num_layers: int) -> bool:
    """Whether a tensor is outside the layers, or in some of them and not in others."""
    match = _LAYER.search(key)
    if match is None or not stem:
        return True
    return any(f"{key[: match.start()]}.{index}.{key[match.end() :]}" not in shapes for index in range(num_layers))


def _gap(names: Collection[str]) -> str | None:
    """A tensor that numbered siblings, such as the experts of a layer, have and one of them lacks."""
    last: dict[str, set[int]] = {}
    groups: dict[tuple[str, str], set[int]] = {}
    for name in names:
        *_, match = [None, *_LAYER.finditer(name)]
        if match is not None:
            before, after, index = name[: match.start() + 1], name[match.end() - 1 :], int(match[0].strip("."))
            groups.setdefault((before, after), set()).add(index)
            last.setdefault(before, set()).add(index)
    for (before, after), indices in groups.items():
        if lost := last[before] - indices:
            return f"{before}{min(lost)}{after}"
    return None


@contextmanager
def _silence() -> Iterator[None]:
    """Keep the loader from reporting on a model that nobody will see."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
