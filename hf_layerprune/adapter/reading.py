"""Read an adapter of any PEFT method: its config, and its weights, which must be those that the config asks for.

[`save_adapter`] writes one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from ..errors import CheckpointError, boundary
from ..files.json_file import read_object
from ..records.declared import CARD
from ..records.fingerprints import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG
from ..runtime.loading import LOCATION_ARGUMENTS, as_path, check_complete


def find_adapter(base: str | Path, **kwargs: Any) -> PeftConfig | None:
    """The config of the adapter that a folder or a Hub id is, or `None` if it is a model.

    Of the keyword arguments, those that locate files are used.

    Raises:
        CheckpointError: It is an adapter whose config can't be read, or one without safetensors weights.
    """
    where = {name: kwargs[name] for name in LOCATION_ARGUMENTS if kwargs.get(name) is not None}
    path = as_path(base)
    name = str(path) if path.exists() else str(base)
    if path.is_file() or _find_file(name, CONFIG, where) is not None:
        return None
    config_path = _find_file(name, ADAPTER_CONFIG, where)
    if config_path is None:
        return None
    read_object(Path(config_path))
    with boundary(f"can't read the adapter {base}"):
        config = PeftConfig.from_pretrained(name, **where)
    if not isinstance(config.base_model_name_or_path, str | None):
        raise CheckpointError(
            f"{config_path} names {config.base_model_name_or_path!r} as its base, which is not a model's name; correct it"
        )
    return config


def _find_file(name: str, filename: str, where: dict[str, Any]) -> str | None:
    """Path of a file of a folder or a Hub repository, or `None`; loading the base then reports what is wrong."""
    try:
        return cached_file(name, filename, _raise_exceptions_for_missing_entries=False, **where)
    except (OSError, ValueError):
        return None


def load_adapter(base: PreTrainedModel, adapter: str, **where: Any) -> PeftModel:
    """Put an adapter's weights on its base, in place, and refuse an adapter that has too few or too many.

    Further arguments locate the adapter, as `PeftModel.from_pretrained` takes them.

    Raises:
        CheckpointError: The adapter can't be loaded, has no safetensors weights (a pickle can run code), or its
            weights are not those that its config asks for.
    """
    path = _find_file(adapter, ADAPTER_WEIGHTS, where)
    if path is None:
        raise CheckpointError(
            f"{adapter} has no {ADAPTER_WEIGHTS}, and pickled weights (.bin) are not read; save the adapter again with "
            "save_pretrained"
        )
    with boundary(f"can't load the adapter {adapter}"):
        _resize_vocabulary(base, path)
        device = "cpu" if base.device.type == "meta" else str(base.device)  # PEFT would take a GPU, used or not
        model = PeftModel.from_pretrained(base, adapter, torch_device=device, **where)
    _check_weights(model, path, adapter)
    return model


def _resize_vocabulary(base: PreTrainedModel, path: str) -> None:
    """Resize the token embeddings to those that an adapter was saved with, as PEFT does if tokens were added."""
    table: Any = base.get_input_embeddings()
    name = next((name for name, module in base.named_modules() if module is table), None)
    with safe_open(path, framework="pt") as file:
        names = {_unwrapped_name(key): key for key in sorted(file.keys())}
        key = names.get(f"base_model.model.{name}.weight")
        if key is None:
            return
        rows, *width = file.get_slice(key).get_shape()
    if rows != len(table.weight) and width == [*table.weight.shape[1:]]:
        base.resize_token_embeddings(rows, mean_resizing=False)


def _unwrapped_name(key: str) -> str:
    """The name of a weight without what PEFT's wrappers add to it."""
    return re.sub(r"\.(base_layer|original_module|modules_to_save)\.", ".", key)


def _check_weights(model: PeftModel, path: str, name: str) -> None:
    """Refuse adapter weights that are not those that the adapter's config asks for, of which PEFT only warns."""
    with boundary(f"can't read {path}"), safe_open(path, framework="pt") as file:
        actual = set(file.keys())
    with boundary(f"can't tell which weights the adapter {name} needs"):
        expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    # The base's own weights, such as embeddings, may be there as well, under the names that they have in the wrappers.
    plain = {_unwrapped_name(key) for key in model.state_dict()}
    info = {
        "missing_keys": expected - actual,
        "unexpected_keys": {key for key in actual - expected if _unwrapped_name(key) not in plain},
        "mismatched_keys": (),  # PEFT raises
    }
    check_complete(name, info)


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Save an adapter without the card that PEFT writes, a template that says nothing of the cut."""
    model.save_pretrained(str(folder))
    (folder / CARD).unlink(missing_ok=True)
