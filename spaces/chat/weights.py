"""Loads the pruned model, and its dense base if memory allows; the two share equal tensors."""

from __future__ import annotations

import copy
import json
import os
import re
import threading
from itertools import chain
from pathlib import Path
from typing import Any

import psutil
import torch
from about import format_bytes
from answers import Side
from images import auto_class
from source import CannotLoad, Source, explain, model_arguments, weights_size
from transformers import AutoConfig, PreTrainedModel
from transformers.utils.hub import cached_file

ZERO_GPU = bool(os.environ.get("SPACES_ZERO_GPU"))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONTAINER = Path("/sys/fs/cgroup")
NUMBER = re.compile(r"\.\d+\.")  # of a layer, within the name of a tensor
NO_BASE = "No dense model was specified. In a terminal, pass it with --base; in a Space, set the variable BASE_ID."
HEADROOM = 1.2  # memory relative to the weights: also the key-value cache and activations


class Models:
    """The loaded models. They are loaded in the background, so that the page appears at once."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.sides: dict[str, Side] = {}
        self.error: str | None = None
        self.no_dense: str | None = None if source.base else NO_BASE
        self.done = threading.Event()

    def load(self) -> None:
        """Load the models that fit; sets `sides`, `error` and `no_dense`."""
        try:
            self._load()
        except Exception as error:  # the page shows any error
            self.error = str(error) if isinstance(error, CannotLoad) else explain(self.source.model, error)
            self.no_dense = self.error
        self.done.set()

    def _load(self) -> None:
        source, adapter = self.source, self.source.adapter
        dense_size = self._size_of_dense()
        if adapter and adapter.peft_type == "LAYER_DROP" and dense_size is not None:
            from hf_layerprune.adapter.reading import load_adapter as put_on

            dense = load(source.base)
            # The cut is made in a second tree of modules over the same tensors, so only tuned tensors exist twice.
            tensors = {id(t): t for t in chain(dense.parameters(), dense.buffers())}
            pruned = put_on(copy.deepcopy(dense, tensors), source.model).merge_and_unload()
            self.sides["pruned"] = Side(source.model, pruned)
            self._add_dense(dense)
            return
        if HEADROOM * source.size > (free := free_bytes()):
            raise CannotLoad(
                f"{source.model} needs {format_bytes(HEADROOM * source.size)}, but only {format_bytes(free)} are free here."
            )
        pruned = load_adapter(source.model) if adapter else load(source.model)
        self.sides["pruned"] = Side(source.model, pruned)
        if dense_size is not None:
            try:
                dense = load(source.base)
            except (OSError, ValueError, RuntimeError) as error:
                self.no_dense = explain(source.base, error)
                return
            share_equal_weights(pruned, dense, (source.records.layers() or (0, []))[1])
            self.sides["pruned"] = Side(source.model, pruned)
            self._add_dense(dense)

    def _add_dense(self, model: PreTrainedModel) -> None:
        dense = self.sides["dense"] = Side(self.source.base, model)
        pruned = self.sides["pruned"]
        shared = dense.tensors.keys() & pruned.tensors.keys()
        dense.shared_bytes = pruned.shared_bytes = sum(dense.tensors[pointer] for pointer in shared)

    def _size_of_dense(self) -> int | None:
        """The size of the dense model; `None` if there is none, or both together do not fit into memory."""
        if not self.source.base:
            return None
        try:
            size = weights_size(self.source.base)
        except (OSError, ValueError) as error:
            self.no_dense = explain(self.source.base, error)
            return None
        needed, free = HEADROOM * (size + self.source.size), free_bytes()
        if needed > free:
            self.no_dense = f"Loading {self.source.base} as well needs {format_bytes(needed)}, but {format_bytes(free)} are free here."
            return None
        return size


def load(model: str) -> PreTrainedModel:
    """Load a whole model onto the device."""
    settings: dict[str, Any] = {"dtype": "auto"}
    config = AutoConfig.from_pretrained(**model_arguments(model), trust_remote_code=False)
    if DEVICE == "cpu" and config.dtype == torch.float16:
        settings["dtype"] = torch.bfloat16  # faster on CPUs
    if DEVICE != "cpu":
        settings["device_map"] = DEVICE
    if os.path.isfile(model):  # a file on this machine, and so is the package
        from hf_layerprune.versions import gguf_options

        settings |= gguf_options() | {"dtype": torch.bfloat16}
    else:
        settings["use_safetensors"] = True  # a pickle can run code
        check_names(model, getattr(config, "transformers_weights", None))
    made, info = auto_class(config).from_pretrained(
        **model_arguments(model), trust_remote_code=False, output_loading_info=True, **settings
    )
    check_complete(model, made, info)
    return made


def check_names(model: str, chosen: str | None) -> None:
    """Refuse weight files other than safetensors files beside the config: transformers reads any that an index names, or
    the config (`chosen`).
    """
    if_any = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    index = cached_file(model, "model.safetensors.index.json", **if_any)
    shards = json.loads(Path(index).read_bytes())["weight_map"].values() if index else ()
    for name in {chosen or "model.safetensors", *shards}:
        if not re.fullmatch(r"[^/\\]+\.safetensors", name):
            raise CannotLoad(f"{model} names {name!r}, which is not a .safetensors file beside its config.")


def check_complete(name: str, model: PreTrainedModel, info: dict[str, Any]) -> None:
    """Refuse incomplete weights, of which transformers only warns (in `info`): missing tensors would be random."""
    if missing := sorted(info["missing_keys"]):
        raise CannotLoad(
            f"{name} lacks {missing[0]}, so its checkpoint is incomplete. Upload all of its weight files."
        )
    # Unexpected tensors outside the layers are fine: a checkpoint may have other parts, such as an image encoder.
    lists = {NUMBER.split(key, maxsplit=1)[0] for key in model.state_dict() if NUMBER.search(key)}
    if stray := sorted(key for key in info["unexpected_keys"] if NUMBER.split(key, maxsplit=1)[0] in lists):
        raise CannotLoad(f"{name} has {stray[0]}, which does not fit its config.json. One of the two is wrong.")


def load_adapter(model: str) -> PreTrainedModel:
    """Load and merge an adapter, without reading the layers of the base that it drops."""
    from hf_layerprune.adapter.loading import load_model

    return load_model(model, dtype="auto", **({} if DEVICE == "cpu" else {"device_map": DEVICE}))


def share_equal_weights(pruned: PreTrainedModel, dense: PreTrainedModel, kept: list[int]) -> None:
    """Make the pruned model use the dense one's tensors wherever the values are equal; its layer `i` was `kept[i]` there."""
    if ZERO_GPU:  # it moves the tensors of each model separately
        return
    originals, number = dict(dense.named_parameters()), dict(enumerate(kept))
    for name, parameter in pruned.named_parameters():
        layer = re.search(r"\.(\d+)\.", name)
        if layer and int(layer[1]) in number:
            name = f"{name[: layer.start(1)]}{number[int(layer[1])]}{name[layer.end(1) :]}"
        original = originals.get(name)
        if original is not None and original.dtype == parameter.dtype and torch.equal(original, parameter):
            parameter.data = original.data


def free_bytes() -> int:
    """The memory available for weights in bytes."""
    if ZERO_GPU:
        return 60 << 30  # of the GPU that is assigned for each call; this process has none
    if DEVICE == "cuda":
        return torch.cuda.mem_get_info()[0]
    free = psutil.virtual_memory().available
    try:  # a container may have a lower limit
        used = re.search(r"^anon (\d+)$", (CONTAINER / "memory.stat").read_text(), re.MULTILINE)
        free = min(free, int((CONTAINER / "memory.max").read_text()) - int(used[1]))
    except (OSError, ValueError, TypeError):
        pass
    return free
