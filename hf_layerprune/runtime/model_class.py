"""How a model is loaded: as a text model or a multimodal one, and whole or split over processes."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, UnsupportedModelError, boundary
from ..families import layer_count
from ..families.layout import find_decoder_layers, find_layer_prefix
from ..families.multimodal import TEXT_ONLY_TYPES
from ..families.types import ENCODER_DECODER

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel


def auto_class_for(model_type: str, architectures: Sequence[str] | None) -> Any:
    """The auto class that loads a checkpoint as what it is: `AutoModelForMultimodalLM` or `AutoModelForCausalLM`.

    Some types, such as llama4, have both a text model and a multimodal one. There the checkpoint's own `architectures`
    decide, so a multimodal checkpoint stays whole.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
    from transformers.models.auto import modeling_auto as names

    whole = names.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES.get(model_type)
    has_text_class = model_type in names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if whole and (not has_text_class or (whole in (architectures or ()) and model_type not in TEXT_ONLY_TYPES)):
        return AutoModelForMultimodalLM
    return AutoModelForCausalLM


def pipeline_tag_of(model_type: str, architectures: Sequence[str] | None) -> str | None:
    """The Hub's name for what a multimodal checkpoint does; `None` if it is loaded as a text model."""
    from transformers import AutoModelForMultimodalLM
    from transformers.models.auto import modeling_auto as names

    if auto_class_for(model_type, architectures) is not AutoModelForMultimodalLM:
        return None
    return f"{'image' if model_type in names.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES else 'audio'}-text-to-text"


def check_has_decoder(fields: Mapping[str, Any], name: str) -> None:
    """Refuse a model without a language decoder, with the reason in place of the list of all types that have one.

    Raises:
        CheckpointError: No auto class for language models loads it.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto import modeling_auto as names

    model_type = fields["model_type"]
    both = (names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, names.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
    if model_type not in CONFIG_MAPPING or any(model_type in known for known in both):
        return
    why = ENCODER_DECODER if fields.get("is_encoder_decoder") else "it has no language decoder of its own"
    raise CheckpointError(f"{name} is a {model_type} model, which can't be pruned by layers: {why}")


def auto_class_of(config: PreTrainedConfig) -> Any:
    """As `auto_class_for`, for a config."""
    return auto_class_for(config.model_type, config.architectures)


def model_class_of(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], PreTrainedConfig] | None:
    """The class that the auto class would choose, and the part of the config that it takes.

    `None` if the config does not belong to a language model.
    """
    import transformers
    from transformers.models.auto.auto_factory import _get_model_class

    mapping = auto_class_of(config)._model_mapping
    if type(config) not in mapping:
        # The text part of a larger model, saved alone, may have no auto class; its config names the class.
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


def model_without_weights(config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """The model that a config describes, on the meta device; further arguments are those of `from_config`.

    The config is copied, since transformers changes the data types in its sections.
    """
    import torch

    with torch.device("meta"):
        return auto_class_of(config).from_config(copy.deepcopy(config), trust_remote_code=False, **kwargs)


def stored_names(config: PreTrainedConfig, names: Collection[str]) -> dict[str, str]:
    """How a checkpoint names tensors that are known by their modules; transformers renames some types' while loading.

    Names that the model doesn't have, or does not store under one name, are left out.
    """
    return {name: parts[0] for name, parts in _stored_parts(config, names).items() if len(parts) == 1}


def tied_names(config: PreTrainedConfig) -> tuple[dict[str, str], dict[str, str]]:
    """By tensor, the one that it is tied to, and how a checkpoint names all of these. Most often, they are the head and the
    embeddings.

    A tied tensor need not be stored. One that was untied may have either name, as transformers renames what it has loaded.
    """
    with boundary("no model can be built from this config"):
        tied = model_without_weights(config).all_tied_weights_keys
        return tied, stored_names(config, [*tied, *tied.values()])


def _stored_parts(config: PreTrainedConfig, names: Collection[str]) -> dict[str, list[str]]:
    """As [`stored_names`], with the names of all parts, such as those of single experts."""
    from transformers.core_model_loading import revert_weight_conversion

    model = model_without_weights(config)
    state = model.state_dict()
    return {name: [*revert_weight_conversion(model, {name: state[name]})] for name in names if name in state}


def stored_tensors(config: PreTrainedConfig, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What a checkpoint stores for tensors that are known by their modules.

    It may be several for one, such as one for each expert of a layer, or one for several, such as queries, keys and
    values. Names that the model doesn't have stay as they are.
    """
    from transformers.core_model_loading import revert_weight_conversion

    model = model_without_weights(config)
    known = tensors.keys() & model.state_dict().keys()
    # It fails for experts that are stored together with those for images, which no text reaches.
    with boundary("can't convert the changed weights to what the checkpoint stores", "choose another repair"):
        stored = revert_weight_conversion(model, {name: tensors[name] for name in known})
    return {name: tensor for name, tensor in tensors.items() if name not in known} | stored


def stored_layer_prefix(model: PreTrainedModel) -> str:
    """What precedes the index of a decoder layer in the names of the tensors that saving a model writes."""
    from transformers.core_model_loading import revert_weight_conversion

    first = f"{find_decoder_layers(model).path}.0."
    tensors = {name: tensor.to("meta") for name, tensor in model.state_dict().items() if name.startswith(first)}
    return find_layer_prefix(revert_weight_conversion(model, tensors), 1)


def layer_prefix_of(names: Collection[str], config: PreTrainedConfig) -> str:
    """What precedes the layer index in a checkpoint's tensor names, as [`find_layer_prefix`] finds it.

    If the names leave several possible, because other stacks have as many layers, the structure of the model decides.

    Raises:
        UnsupportedModelError: No prefix, or more than one, has tensors for all layers.
    """
    try:
        return find_layer_prefix(names, layer_count(config))
    except UnsupportedModelError:
        with suppress(Exception):  # model classes raise exceptions of any type
            prefix = stored_layer_prefix(model_without_weights(config))
            if find_layer_prefix([name for name in names if name.startswith(prefix)], layer_count(config)) == prefix:
                return prefix
        raise


@contextmanager
def without_zero3() -> Iterator[None]:
    """Build and load models without splitting them, even under DeepSpeed ZeRO-3.

    There, transformers splits every new model over the processes, each of which has to take part; but rehearsals have no
    weights, and pruning and evaluation are the work of one process.
    """
    from transformers.integrations import deepspeed

    held = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = held


@without_zero3()
def layer_modules(config: PreTrainedConfig, tensors: Collection[str]) -> list[str]:
    """Full names of the modules that hold tensors of decoder layers, known by their names in the model or as stored."""
    model = model_without_weights(config)
    path = find_decoder_layers(model).path
    indices = {name_in_stack(name).partition(".")[0] for name in tensors}
    names = [name for name in model.state_dict() if name.startswith(tuple(f"{path}.{index}." for index in indices))]
    modules = {name_in_stack(name): name.rpartition(".")[0] for name in names}
    if not modules.keys() >= {name_in_stack(name) for name in tensors}:
        modules |= {
            name_in_stack(stored): name.rpartition(".")[0]
            for name, parts in _stored_parts(config, names).items()
            for stored in parts
        }
    return sorted({modules.get(name_in_stack(name), name.rpartition(".")[0]) for name in tensors})


def name_in_stack(name: str) -> str:
    """A tensor's name from the index of its layer on."""
    found = re.search(r"(?<![^.])\d+\..+", name)
    return found[0] if found else name
