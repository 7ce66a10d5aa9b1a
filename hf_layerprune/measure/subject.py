"""What is measured: a folder, a Hub id, an adapter or a GGUF file, and the hash of its weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapter.loading import load_model, load_tokenizer
from ..adapter.reading import find_adapter
from ..errors import CheckpointError, LayerPruneError, cause_of
from ..records.lineage import Lineage, fingerprint, sha256_of, weights_hash
from ..runtime.loading import is_hub_id, load_config, resolve_base
from ..versions import resolve_commit

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_ROLES = {"prune": "cut", "repair": "repaired", "heal": "healed"}
_ADAPTER = "adapter_model.safetensors"


@dataclass(frozen=True)
class Subject:
    """A model that can be measured, before it is loaded.

    Args:
        source (`str`): As the user named it.
        name (`str`): Its Hub id, or the name of its folder or file.
        weights (`str`): The hash of its weights, see [`~records.lineage.weights_hash`].
        role (`str`): `"cut"`, `"repaired"` or `"healed"` by the last stage in its history; `"model"` without one.
        lineage (`Lineage`, *optional*): Its history.
        folder (`Path`, *optional*): Its folder, where it is a local one.
        revision (`str`, *optional*): The commit on the Hub.
        bytes_on_disk (`int`): The size of its weight files; of an adapter, without those of its base.
    """

    source: str
    name: str
    weights: str
    role: str
    lineage: Lineage | None = None
    folder: Path | None = None
    revision: str | None = None
    bytes_on_disk: int = 0

    def load(self, dtype: str = "auto", device: str = "auto") -> PreTrainedModel:
        """Load the model.

        Args:
            dtype (`str`, defaults to `"auto"`): The name of a type, or `"auto"` for the checkpoint's own; of a GGUF
                file, that is bfloat16.
            device (`str`, defaults to `"auto"`): A device of torch; `"auto"` is a GPU if there is one, and `"all"`
                spreads the model over all there are.

        Returns:
            `PreTrainedModel`: In evaluation mode, adapters merged.
        """
        import torch

        from ..runtime.precision import warn_if_slow

        kwargs: dict[str, Any] = {} if self.revision is None else {"revision": self.revision}
        name = "bfloat16" if dtype == "auto" and self.source.endswith(".gguf") else dtype
        kwargs["dtype"] = name if name == "auto" else getattr(torch, name)
        device = pick_device(device)
        if device != "cpu":
            kwargs["device_map"] = "auto" if device == "all" else {"": device}
        model = load_model(self.source, **kwargs)
        if dtype == "auto":
            warn_if_slow(model, "--dtype float32 is faster, and needs twice the memory")
        return model

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load its tokenizer.

        Raises:
            CheckpointError: It has none.
        """
        kwargs = {} if self.revision is None else {"revision": self.revision}
        missing = f"{self.source} has no tokenizer that can be loaded; copy the tokenizer's files of its base into it"
        try:
            tokenizer = load_tokenizer(self.source, **kwargs)
        except CheckpointError as error:
            raise CheckpointError(missing) from error
        if not len(tokenizer):  # what transformers may make of a config alone
            raise CheckpointError(missing)
        return tokenizer

    def vocabulary(self) -> int | None:
        """How many tokens the model knows, from its config alone; `None` where that does not say."""
        kwargs = {} if self.revision is None else {"revision": self.revision}
        adapter = find_adapter(self.source, **kwargs)
        source = self.source if adapter is None else adapter.base_model_name_or_path
        try:
            config = load_config(source, **({} if adapter is not None else kwargs))
        except CheckpointError:
            return None  # loading the model says what is wrong with it
        return getattr(config.get_text_config(), "vocab_size", None)


def identify(source: str | Path, revision: str | None = None) -> Subject:
    """Find out what a model is, by its files alone.

    Args:
        source (`str` or `Path`): A Hub id, a model folder, an adapter's folder, or a GGUF file.
        revision (`str`, *optional*): Branch, tag or commit on the Hub.

    Returns:
        `Subject`: The model.

    Raises:
        CheckpointError: There is no such model, or it has no weights that can be hashed.
    """
    if is_hub_id(source):
        return _on_hub(str(source), revision)
    path = Path(source).expanduser()
    if not path.exists():
        raise CheckpointError(
            f"{source} does not exist; name a model folder, a .gguf file, or a Hub id such as org/name"
        )
    if not (path / "adapter_config.json").is_file():
        resolve_base(path)  # says what is wrong with what is no model
    files = fingerprint(path)
    if path.is_dir() and not any(name.endswith(".safetensors") for name in files):
        raise CheckpointError(f"{path} has no safetensors weights; save it with save_pretrained")
    lineage = Lineage.of(path) if path.is_dir() else None
    return Subject(
        source=str(path),
        name=path.resolve().name,
        weights=weights_hash(files),
        role=_role(lineage),
        lineage=lineage,
        folder=path if path.is_dir() else None,
        bytes_on_disk=_size(files),
    )


def _on_hub(repo: str, revision: str | None) -> Subject:
    adapter = find_adapter(repo, revision=revision)
    if adapter is not None:
        return _adapter_on_hub(repo, revision, adapter)
    from ..cut.remote import HubBase

    hub = HubBase.open(repo, revision)
    files = hub.fingerprint()
    for name, entry in files.items():
        if "sha256" not in entry:  # a small file that is not of LFS kind
            entry["sha256"] = sha256_of(_download(repo, name, hub.commit))
    lineage = Lineage.of(hub.folder)
    return Subject(
        repo, repo, weights_hash(files), _role(lineage), lineage, revision=hub.commit, bytes_on_disk=_size(files)
    )


def _adapter_on_hub(repo: str, revision: str | None, adapter: PeftConfig) -> Subject:
    commit = resolve_commit(repo, revision) or revision
    path = _download(repo, _ADAPTER, commit)
    files = {_ADAPTER: {"size": path.stat().st_size, "sha256": sha256_of(path)}}
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        lineage = Lineage.of(_download(repo, "lineage.json", commit).parent)
    except (EntryNotFoundError, LocalEntryNotFoundError, CheckpointError):
        lineage = None
    return Subject(
        repo, repo, weights_hash(files), _role(lineage), lineage, revision=commit, bytes_on_disk=_size(files)
    )


def _download(repo: str, name: str, revision: str | None) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(repo, name, revision=revision))
    except OSError as error:
        raise CheckpointError(f"can't get {name} of {repo}: {cause_of(error)}") from error


def _size(files: dict[str, dict[str, Any]]) -> int:
    return sum(entry["size"] for name, entry in files.items() if name.endswith((".safetensors", ".gguf")))


def _role(lineage: Lineage | None) -> str:
    if lineage is None or not lineage.entries:
        return "model"
    last = lineage.entries[-1]
    if last.get("stage") == "prune" and last.get("repair"):  # repaired on the way
        return "repaired"
    return _ROLES.get(str(last.get("stage")), "model")


def pick_device(name: str) -> str:
    """The device that a name stands for.

    Args:
        name (`str`): A device of torch, `"auto"` or `"all"`.

    Returns:
        `str`: A GPU for `"auto"`, if there is one.

    Raises:
        LayerPruneError: There is no such device.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return "cuda:0"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "all":
        return "all" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise LayerPruneError(f"{name!r} is no device; name cpu, cuda, cuda:1, mps, auto or all") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise LayerPruneError(f"this machine has {torch.cuda.device_count()} CUDA GPUs, so there is no {name}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise LayerPruneError("this machine has no MPS device; name cpu")
    return name if device.type != "cuda" or device.index is not None else "cuda:0"


def describe_device(model: PreTrainedModel) -> str:
    """What a model runs on, for a record of it."""
    import torch

    if model.device.type != "cuda":
        return model.device.type
    return f"cuda: {torch.cuda.get_device_name(model.device)}"


def describe_dtype(model: PreTrainedModel) -> str:
    """The type of a model's weights, for a record of it."""
    return str(model.dtype).removeprefix("torch.")
