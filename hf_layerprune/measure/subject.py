"""Models to be measured: a folder, a Hub id, an adapter or a GGUF file, and the hash of its weights."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapter.loading import load_model, load_tokenizer
from ..adapter.reading import find_adapter
from ..errors import CheckpointError
from ..files.hub import Repo
from ..records.fingerprints import (
    ADAPTER_WEIGHTS,
    CONFIG,
    Identity,
    base_of_adapter,
    compute_identity,
    hash_hub_files,
    holds_weights,
    identity_from_hashes,
    is_model_file,
    model_files,
)
from ..records.history import is_repaired
from ..records.lineage import Lineage
from ..runtime.devices import pick_device
from ..runtime.loading import is_hub_id, load_config, load_processor, resolve_base

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

_ROLES = {"prune": "cut", "repair": "repaired", "heal": "healed", "train": "trained", "quantize": "quantized"}


@dataclass(frozen=True)
class Subject:
    """A model that can be measured, before it is loaded.

    Args:
        source (`str`): The model as the user named it.
        name (`str`): Its Hub id, or the name of its folder or file.
        identity (`Identity`): The hashes of its weights and of all other files that affect its behaviour.
        lineage (`Lineage`, *optional*): Its history.
        folder (`Path`, *optional*): Its folder, if it is local.
        revision (`str`, *optional*): The commit on the Hub.
        bytes_on_disk (`int`): The size of its weight files; 0 for an adapter, which takes its base as well.
    """

    source: str
    name: str
    identity: Identity
    lineage: Lineage | None = None
    folder: Path | None = None
    revision: str | None = None
    bytes_on_disk: int = 0

    @property
    def weights(self) -> str:
        """The hash of its weights."""
        return self.identity.weights

    @property
    def role(self) -> str:
        """By the last stage in its history, `"cut"`, `"repaired"`, `"healed"`, `"trained"` or `"quantized"`; or else `"model"`."""
        last = self.lineage.entries[-1] if self.lineage and self.lineage.entries else {}
        if last.get("stage") == "prune" and is_repaired(last):  # repaired while pruning
            return "repaired"
        return _ROLES.get(str(last.get("stage")), "model")

    @property
    def known_weights(self) -> set[str]:
        """The hashes of its weights and of those in its history."""
        return {self.weights} | (self.lineage.known_weights() if self.lineage else set())

    def load(self, dtype: str = "auto", device: str = "auto", *, mapped: bool = False) -> PreTrainedModel:
        """Load the model in evaluation mode, with adapters merged.

        With `dtype="auto"`, it has the checkpoint's own type, or bfloat16 if it or its base is a GGUF file. The device
        `"auto"` is a GPU if there is one, and `"all"` spreads the model over all GPUs. With `mapped`, the layers may stay on disk
        if it is the CPU, see `load_mapped`.
        """
        import torch

        from ..runtime.precision import warn_if_slow

        kwargs: dict[str, Any] = self._revision_kwargs | {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
        device = pick_device(device, spread=True)
        if device != "cpu":
            kwargs["device_map"] = "auto" if device == "all" else {"": device}
        model = load_model(self.source, mapped=mapped and device == "cpu", **kwargs)
        if dtype == "auto":
            warn_if_slow(model)
        return model

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer."""
        return load_tokenizer(self.source, **self._revision_kwargs)

    def processor(self) -> ProcessorMixin:
        """Load what turns text and images into inputs; that of an adapter is its base's."""
        name, where = self._base_location()
        return load_processor(name, **where)

    def config(self) -> PreTrainedConfig:
        """Load the config; that of an adapter is its base's.

        Raises:
            CheckpointError: The config can't be read, or the model needs code from its repository.
        """
        name, where = self._base_location()
        return load_config(name, **where)

    def vocabulary(self) -> int | None:
        """The vocabulary size in the config; `None` if it has none. Raises as `config` does."""
        return getattr(self.config().get_text_config(), "vocab_size", None)

    @property
    def _revision_kwargs(self) -> dict[str, Any]:
        return {} if self.revision is None else {"revision": self.revision}

    def _base_location(self) -> tuple[str, dict[str, Any]]:
        """Where the model is, or the base of an adapter."""
        adapter = find_adapter(self.source, **self._revision_kwargs)
        if adapter is None:
            return self.source, self._revision_kwargs
        return adapter.base_model_name_or_path or "", {"revision": adapter.revision}


def identify(source: str | Path, revision: str | None = None) -> Subject:
    """Identify a model by its files, without loading it: a Hub id, a model folder, an adapter's folder, or a GGUF file.

    Raises:
        CheckpointError: The model does not exist, or has no weights that can be hashed.
    """
    if is_hub_id(source):
        return _identify_on_hub(str(source), revision)
    path = Path(source).expanduser()
    adapter = find_adapter(path) if path.is_dir() else None
    if adapter is None:
        resolve_base(source)  # raises if it is not a model
    files = {path.name: path} if path.is_file() else model_files(path)
    if adapter is not None:
        _check_adapter(adapter, path, files)
    sizes = [file.stat().st_size for name, file in files.items() if holds_weights(name)]
    if not sizes:
        raise CheckpointError(f"{path} has no safetensors weights; save it with save_pretrained")
    lineage, folder = (Lineage.load(path), path) if path.is_dir() else (None, None)
    return Subject(
        str(path), path.resolve().name, compute_identity(path), lineage, folder, None, 0 if adapter else sum(sizes)
    )


def _identify_on_hub(repo: str, revision: str | None) -> Subject:
    hub = Repo.open(repo, revision)
    adapter = find_adapter(repo, revision=hub.commit)
    if adapter is not None:
        _check_adapter(adapter, repo, hub.files)
    names = [name for name in hub.files if is_model_file(name)]
    hashes, folder = hash_hub_files(hub, names)
    model = identity_from_hashes(hashes, base_of_adapter(folder) if adapter is not None else None)
    size = 0 if adapter else sum(hub.files[name].size for name in names if holds_weights(name))
    return Subject(repo, repo, model, Lineage.load(folder), None, hub.commit, size)


def _check_adapter(adapter: PeftConfig, source: str | Path, files: Container[str]) -> None:
    if ADAPTER_WEIGHTS not in files:
        raise CheckpointError(f"{source} has no {ADAPTER_WEIGHTS}, and pickled weights are not read; save it again")
    name = adapter.base_model_name_or_path
    if not name:
        raise CheckpointError(f"{source} is an adapter that does not name its base; merge it first")
    if is_hub_id(name):
        # The Hub client resolves the base's commit, so that the identity is that of the base that will be loaded.
        Repo.open(name, adapter.revision).get(CONFIG)


def describe_placement(model: PreTrainedModel) -> dict[str, str]:
    """The data type and the device of a model, as recorded in `metrics.json`."""
    import torch

    device = model.device.type
    if device == "cuda":
        device = f"cuda: {torch.cuda.get_device_name(model.device)}"
    return {"dtype": str(model.dtype).removeprefix("torch."), "device": device}
