"""Find and load a base: a Hub id, a folder, or a GGUF file."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

# What a checkpoint is made of: never pickles, nor the same weights in other formats.
CHECKPOINT_FILES = [
    "*.json",
    "*.jinja",
    "*.txt",
    "*.model",
    "*.tiktoken",
    "*.safetensors",
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
]


def resolve_base(base: str | Path, gguf_file: str | None = None) -> tuple[str, str | None]:
    """Tell a GGUF file from a folder or a Hub id.

    Args:
        base (`str` or `Path`): What the user named.
        gguf_file (`str`, *optional*): A GGUF file inside it.

    Returns:
        `tuple[str, str | None]`: What `from_pretrained` takes, and the GGUF file in it.

    Raises:
        CheckpointError: A path that does not exist, or a folder without a config.
    """
    path = Path(base).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise CheckpointError(f"{path} is a file; name a model folder, a Hub id, or a .gguf file")
        return str(path.parent), path.name
    if path.is_dir():
        if gguf_file is None and not (path / "config.json").is_file():
            raise CheckpointError(
                f"{path} has no config.json, so it is not a model folder; name a folder that has one"
            )
        return str(path), gguf_file
    if _looks_like_a_path(str(base)) or path.suffix == ".gguf":
        raise CheckpointError(
            f"{path} does not exist; name a model folder, a .gguf file, or a Hub id such as org/name"
        )
    return str(base), gguf_file


def is_hub_id(base: str | Path) -> bool:
    """Whether a base is on the Hub rather than in the file system.

    Args:
        base (`str` or `Path`): What the user named.

    Returns:
        `bool`: Whether it is neither a file or folder that exists, nor looks like the path of one that doesn't.
    """
    path = Path(base).expanduser()
    return not (isinstance(base, Path) or path.exists() or _looks_like_a_path(str(base)) or path.suffix == ".gguf")


def _looks_like_a_path(base: str) -> bool:
    return Path(base).is_absolute() or base.startswith(("~", ".")) or base.count("/") > 1


def load_config(base: str | Path, **kwargs: Any) -> PreTrainedConfig:
    """Load only the config of a base.

    Raises:
        CheckpointError: There is no such model, or its config can't be read.
    """
    from transformers import AutoConfig

    name, gguf_file = resolve_base(base, kwargs.pop("gguf_file", None))
    if gguf_file is not None:
        kwargs["gguf_file"] = gguf_file
    try:
        return AutoConfig.from_pretrained(name, **kwargs)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"no model config at {base}: {first_line(error)}") from error


def load_base(base: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a base as a causal language model.

    Args:
        base (`str` or `Path`): A Hub id, a folder, or a GGUF file.
        kwargs: For `from_pretrained`: `dtype`, `device_map`, `attn_implementation`, `revision`, `gguf_file`, ...

    Returns:
        `PreTrainedModel`: In evaluation mode.

    Raises:
        CheckpointError: There is no such model, or it can't be loaded.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils.hub import resolve_revision

    name, gguf_file = resolve_base(base, kwargs.pop("gguf_file", None))
    lookup = {key: kwargs[key] for key in ("token", "cache_dir", "local_files_only") if key in kwargs}
    if gguf_file is not None:
        kwargs["gguf_file"] = gguf_file
        # Packed weights can be neither tuned nor saved by transformers.
        kwargs.setdefault("quantization_config", GgufConfig(dequantize=True))
    else:
        kwargs["use_safetensors"] = True  # a pickle can run code
    try:
        commit = getattr(resolve_revision(name, kwargs.get("revision"), **lookup), "resolved", None)
        model = AutoModelForCausalLM.from_pretrained(name, **kwargs)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"can't load {base}: {first_line(error)}") from error
    if commit is not None:
        model.config._commit_hash = commit
    if gguf_file is not None:
        model.name_or_path = str(base)  # the file, not its folder, is the base
    return model


def load_model(model: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load what a user may call a model: a folder, a Hub id, an adapter of any PEFT method, or a GGUF file.

    Args:
        model (`str` or `Path`): A Hub id, a folder, or a GGUF file.
        kwargs: For `from_pretrained`, see `load_base`. `revision` and `subfolder` are those of `model` itself.

    Returns:
        `PreTrainedModel`: A plain model in evaluation mode, adapters merged.

    Raises:
        CheckpointError: There is no such model, or it can't be loaded.
    """
    adapter = find_adapter(model, **kwargs)
    if adapter is None:
        return load_base(model, **kwargs)
    if not adapter.base_model_name_or_path:
        raise CheckpointError(f"{model} is an adapter that does not name its base; merge it first")
    from peft import PeftModel

    from ..adapter.model import LayerDropConfig, load_merged

    if isinstance(adapter, LayerDropConfig):
        return load_merged(str(model), adapter, kwargs).eval()
    where = {name: kwargs[name] for name in ("revision", "token", "cache_dir", "subfolder") if kwargs.get(name)}
    others = {name: value for name, value in kwargs.items() if name not in ("revision", "subfolder")}
    base = load_base(adapter.base_model_name_or_path, revision=adapter.revision, **others)
    return PeftModel.from_pretrained(base, str(model), **where).merge_and_unload().eval()


def load_tokenizer(model: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, a Hub id, an adapter (or else its base's), or a GGUF file.

    Args:
        model (`str` or `Path`): A Hub id, a folder, or a GGUF file.
        kwargs: For `from_pretrained`: `revision`, `token`, ...

    Returns:
        `PreTrainedTokenizerBase`: The tokenizer.

    Raises:
        CheckpointError: It has none that transformers can load.
    """
    from transformers import AutoTokenizer

    name, gguf_file = resolve_base(model) if not _is_adapter_folder(model) else (str(model), None)
    gguf = {"gguf_file": gguf_file} if gguf_file else {}
    try:
        return AutoTokenizer.from_pretrained(name, **gguf, **kwargs)
    except (OSError, ValueError, KeyError, TypeError) as error:
        adapter = find_adapter(model, **kwargs)
        if adapter is not None and adapter.base_model_name_or_path:
            return load_tokenizer(adapter.base_model_name_or_path)
        raise CheckpointError(f"{model} has no tokenizer that can be loaded: {first_line(error)}") from error


def _is_adapter_folder(model: str | Path) -> bool:
    return Path(model).expanduser().joinpath("adapter_config.json").is_file()


def find_adapter(base: str | Path, **kwargs: Any) -> PeftConfig | None:
    """The config of the adapter that a base is, or `None` where the base is a model.

    Args:
        base (`str` or `Path`): A Hub id or a folder.
        kwargs: `revision`, `token`, `cache_dir`, `local_files_only`, `subfolder`; others are ignored.

    Returns:
        `PeftConfig`, *optional*: What `adapter_config.json` says.
    """
    from peft import PeftConfig
    from transformers.utils.hub import cached_file

    names = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
    where = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
    path = Path(base).expanduser()
    name = str(path) if path.exists() else str(base)
    try:
        for filename in ("config.json", "adapter_config.json"):
            if cached_file(name, filename, _raise_exceptions_for_missing_entries=False, **where) is not None:
                return PeftConfig.from_pretrained(name, **where) if filename.startswith("adapter") else None
    except (OSError, ValueError):
        pass  # loading the base says what is wrong with it
    return None


def first_line(error: Exception) -> str:
    """An error's message on one line of bounded length."""
    text = " ".join(str(error).split())
    return text if len(text) < 300 else text[:297] + "..."
