"""Find and load a base: a Hub id, a folder, or a GGUF file. Errors of the libraries become a one-line error."""

from __future__ import annotations

import logging
import math
import re
import tempfile
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, boundary
from ..families import MARKER
from ..families.layout import find_decoder_layers
from ..files.gguf_header import block_count_of, read_header, recorded_cut
from ..files.hub import resolve_commit
from ..files.json_file import read_object
from ..files.shards import INDEX, MAX_INDEX, shard_names
from ..options import format_bytes
from ..records.fingerprints import ADAPTER_CONFIG
from ..records.names import is_gguf_name
from ..versions import GGUF_TOKENIZERS, gguf_options
from .config_file import check_no_code, read_config_file
from .model_class import auto_class_for, check_has_decoder, model_without_weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

logger = logging.getLogger(__name__)

UNPACKED_DTYPE = "bfloat16"  # the type of a model that is unpacked from a GGUF file
# Causal masks, which older versions of transformers saved with each layer. Not every class that had them ignores them.
_OLD_MASKS = re.compile(r"\.(attn|attention)\.(bias|masked_bias)$")
_WORTH_SAYING = 400 << 20  # bytes of memory, which take ten seconds to unpack
# The arguments of `from_pretrained` that locate files.
LOCATION_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "subfolder")
# Options that make `cached_file` return None, instead of raising, if a file is missing or not in the cache when offline.
_OPTIONAL = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}


def resolve_base(base: str | Path) -> tuple[str, str | None]:
    """Turn a base, which is a Hub id, a folder or a GGUF file, into the name and the GGUF file that `from_pretrained` takes.

    Raises:
        CheckpointError: The path does not exist, is a folder without a config, or is a damaged GGUF file.
    """
    path = as_path(base)
    if path.is_file():
        if not is_gguf_name(path):
            raise CheckpointError(f"{path} is a file; specify a model folder, a Hub id, or a .gguf file")
        block_count_of(read_header(path))  # the reader of the gguf package trusts every count
        return str(path.parent), path.name
    if path.is_dir():
        if not (path / "config.json").is_file():
            if (path / ADAPTER_CONFIG).is_file():
                raise adapter_error(path)
            raise CheckpointError(
                f"{path} has no config.json, so it is not a model folder; specify a folder that has one"
            )
        return str(path), None
    if not is_hub_id(base):
        raise CheckpointError(
            f"{base} does not exist; specify a model folder, a .gguf file, or a Hub id such as org/name"
        )
    return str(base), None


def adapter_error(name: str | Path) -> CheckpointError:
    """The refusal of an adapter where a whole model is needed."""
    return CheckpointError(
        f"{name} is an adapter, not a model; merge it into its base first: load the base, and save what "
        f"PeftModel.from_pretrained(base, {str(name)!r}).merge_and_unload() returns"
    )


def is_hub_id(base: str | Path) -> bool:
    """Whether a base is on the Hub: no existing file or folder, and not spelled like the path of one."""
    path = as_path(base)
    return not (isinstance(base, Path) or path.exists() or _looks_like_a_path(str(base)) or is_gguf_name(path))


def as_path(base: str | Path) -> Path:
    """A base as a path.

    Raises:
        CheckpointError: The name is empty, or can't be a file name.
    """
    if not str(base).strip() or "\0" in str(base):
        raise CheckpointError(f"{str(base)!r} names no model; specify a model folder, a .gguf file, or a Hub id")
    try:
        path = Path(base).expanduser()
        path.exists()
    except (OSError, RuntimeError, TypeError, ValueError) as error:  # no text, too long, or `~user` of no user
        raise CheckpointError(f"{str(base)[:200]} names no model: {error}") from error
    return path


def _looks_like_a_path(base: str) -> bool:
    return Path(base).is_absolute() or base.startswith(("~", ".")) or base.endswith("/") or base.count("/") > 1


def load_config(base: str | Path, **kwargs: Any) -> PreTrainedConfig:
    """Load only the config of a base.

    Args:
        base (`str` or `Path`): A Hub id, a folder, or a GGUF file.
        kwargs: For `from_pretrained`: `revision`, `token`, `trust_remote_code` (`False` by default), ...

    Raises:
        CheckpointError: There is no such model, or its config can't be read.
    """
    from transformers import AutoConfig

    name, gguf_file = resolve_base(base)
    if gguf_file is not None:
        kwargs["gguf_file"] = gguf_file
    else:
        read_checked_config(name, **kwargs)
    trust = kwargs.pop("trust_remote_code", False)
    with boundary(f"no model config at {base}"):
        config = AutoConfig.from_pretrained(name, trust_remote_code=trust, **kwargs)
    if gguf_file is not None:
        _mark_cut(config, as_path(base))
    return config


def _mark_cut(config: PreTrainedConfig, path: Path) -> None:
    """Give the config of a GGUF file the cut that the file records, which transformers does not read."""
    if (cut := recorded_cut(read_header(path))) is not None:
        setattr(config, MARKER, cut)


def read_checked_config(name: str, **kwargs: Any) -> dict[str, Any]:
    """Check and return the `config.json` of a folder or a Hub repository before anything is built from it.

    Args:
        name (`str`): A folder or a Hub id.
        kwargs: As for `from_pretrained`; those that locate files, and `trust_remote_code`, are used.

    Raises:
        CheckpointError: There is no config, or its model can't be loaded without running code from the repository.
    """
    with boundary(f"no model config at {name}"):
        path = _fetch(name, "config.json", kwargs)
        if path is None and _fetch(name, ADAPTER_CONFIG, kwargs, **_OPTIONAL) is not None:
            raise adapter_error(name)
    if path is None:
        raise CheckpointError(f"no model config at {name}: it has no config.json")
    fields = read_config_file(Path(path))
    if not kwargs.get("trust_remote_code"):
        check_no_code(fields, name)
    return fields


def _fetch(name: str, file: str, kwargs: dict[str, Any], **options: bool) -> str | None:
    """The path of a file of a folder or a Hub repository, which is downloaded if necessary."""
    from transformers.utils.hub import cached_file

    where = {key: kwargs[key] for key in LOCATION_ARGUMENTS if kwargs.get(key) is not None}
    return cached_file(name, file, **where, **options)


def load_base(base: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a base, in evaluation mode, with its language decoder, and with its towers if it is multimodal.

    Args:
        base (`str` or `Path`): A Hub id, a folder, or a GGUF file.
        kwargs: For `from_pretrained`: `dtype`, `device_map`, `attn_implementation`, `revision`, ...
            `dtype="auto"` unpacks a GGUF file to bfloat16.

    Raises:
        CheckpointError: There is no such model, it can't be loaded, or its weights do not match its config.
    """
    name, gguf_file = resolve_base(base)
    lookup = {key: kwargs[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in kwargs}
    fields: dict[str, Any] = {}
    if gguf_file is not None:
        # Packed weights can be neither tuned nor saved by transformers.
        kwargs = gguf_options() | kwargs | {"gguf_file": gguf_file}
        if kwargs.get("dtype") == "auto":
            kwargs["dtype"] = UNPACKED_DTYPE
        _announce_unpacking(as_path(base))
    else:
        kwargs["use_safetensors"] = True  # a pickle can run code
        fields = read_checked_config(name, **kwargs)
        with boundary(f"can't load {base}"):
            index = _fetch(name, INDEX, kwargs, **_OPTIONAL)
        if index is not None:  # transformers reads whatever files it names
            shard_names(read_object(Path(index), max_bytes=MAX_INDEX), index)
        if not kwargs.get("trust_remote_code"):
            check_has_decoder(fields, str(base))
    model_type = fields.get("model_type", "")
    trust = kwargs.pop("trust_remote_code", False)
    with boundary(f"can't load {base}"):
        commit = resolve_commit(name, **lookup)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # checked below
        loaded: Any = auto_class_for(model_type, fields.get("architectures")).from_pretrained(
            name, trust_remote_code=trust, **kwargs
        )
    model, info = loaded
    # When only the text part of a larger model is built, the other parts' weights are unexpected but harmless.
    part = bool(model_type) and model.config.model_type != model_type
    check_complete(str(base), info, within=find_decoder_layers(model).path + "." if part else "")
    if not trust:  # the base's own code is neither used nor saved with the model
        vars(model.config).pop("auto_map", None)
    if commit is not None:
        model.config._commit_hash = commit
    if gguf_file is not None:
        _mark_cut(model.config, as_path(base))
        model.name_or_path = str(base)  # the file, not its folder, is the base
    return model


def _announce_unpacking(path: Path) -> None:
    """Say what it takes to unpack a large GGUF file, which transformers does in memory, in float32."""
    import torch

    from .memory import free_bytes

    needed = 4 * sum(math.prod(tensor.dimensions) for tensor in read_header(path).tensors)
    free = free_bytes(torch.device("cpu"))
    if needed > min(free, _WORTH_SAYING):
        level = logging.WARNING if needed > free else logging.INFO
        text = "unpacking %s takes a while and about %s of memory; %s is free"
        logger.log(level, text, path, format_bytes(needed), format_bytes(free))


def check_complete(name: str, info: dict[str, Any], *, within: str = "", remark: str = "") -> None:
    """Refuse what the loader only warns of: missing tensors, which it fills at random, and unexpected ones.

    Args:
        name (`str`): The model's name in error messages.
        info (`dict[str, Any]`): `missing_keys`, `unexpected_keys` and `mismatched_keys`, as `from_pretrained` returns
            them with `output_loading_info=True`. It leaves out tied weights and what the model's class ignores.
        within (`str`, *optional*): Only unexpected weights whose names start with this are refused.
        remark (`str`, *optional*): Added after the names, in parentheses.

    Raises:
        CheckpointError: The weights do not match the model.
    """
    mismatched = [key[0] if isinstance(key, tuple) else key for key in info["mismatched_keys"]]
    unexpected = [key for key in info["unexpected_keys"] if key.startswith(within) and not _OLD_MASKS.search(key)]
    problems: tuple[tuple[str, Iterable[str]], ...] = (
        ("lacks", info["missing_keys"]),
        ("has weights that the model has no place for:", unexpected),
        ("has weights whose shapes differ from the model's:", mismatched),
    )
    for what, keys in problems:
        if names := sorted(keys):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise CheckpointError(
                f"{name} {what} {', '.join(names[:3])}{more}{f' ({remark})' if remark else ''}; the checkpoint is "
                "incomplete, or its config belongs to another one"
            )


def ignored_names(config: PreTrainedConfig, names: Collection[str]) -> set[str]:
    """Those of a checkpoint's tensors that loading skips, and saving the model leaves out, such as masks."""
    if not names:
        return set()
    model = model_without_weights(config)
    patterns = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq$", _OLD_MASKS.pattern]
    skipped = {name for name in names if any(re.search(pattern, name) for pattern in patterns)}
    return {name for name in skipped if not any(own.endswith(name) for own in model.state_dict())}


def load_tokenizer(model: str | Path, **kwargs: Any) -> PreTrainedTokenizerBase:
    """Load a tokenizer.

    Args:
        model (`str` or `Path`): A Hub id, a folder, or a GGUF file. The folder may be an adapter's.
        kwargs: For `from_pretrained`: `revision`, `token`, ...

    Raises:
        CheckpointError: It has none that transformers can load, or this version misreads that of a GGUF file.
    """
    from transformers import AutoTokenizer

    path = as_path(model)
    adapter = path.joinpath(ADAPTER_CONFIG).is_file() and not path.joinpath("config.json").is_file()
    name, gguf_file = (str(path), None) if adapter else resolve_base(model)
    if gguf_file is not None:
        kwargs["gguf_file"] = gguf_file
    trust = kwargs.pop("trust_remote_code", False)
    hint = "copy the tokenizer files of its base into it"
    with boundary(f"{model} has no tokenizer that can be loaded", hint):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust, **kwargs)
        if "local_files_only" in tokenizer.init_kwargs:  # it would be saved, and differ with HF_HUB_OFFLINE
            tokenizer.init_kwargs["local_files_only"] = False
        tokenizer("a")  # some broken settings show only on use
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # transformers 5.4 makes one up
            raise ValueError("its vocabulary has only special tokens")
        if gguf_file is not None:
            _check_saved(tokenizer, model)
    return tokenizer


def load_processor(model: str | Path, **kwargs: Any) -> ProcessorMixin:
    """Load what turns text and images into the inputs of a multimodal model.

    Raises:
        CheckpointError: It has none that transformers can load.
    """
    from transformers import AutoProcessor

    with boundary(f"{model} has no processor that can be loaded", "copy the processor files of its base into it"):
        processor = AutoProcessor.from_pretrained(str(model), trust_remote_code=False, **kwargs)
        if hasattr(processor, "feature_extractor") and not hasattr(processor, "image_processor"):
            raise CheckpointError(
                f"{model} has a processor for audio, and none for images; specify data without images"
            )
        if not hasattr(processor, "image_processor"):  # in place of a processor, transformers loads a tokenizer
            raise CheckpointError(f"{model} has no processor for images; copy the processor files of its base into it")
    return processor


def has_chat_template(tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> bool:
    """Whether a tokenizer or a processor has a default chat template; one with several named ones may have none."""
    template = tokenizer.chat_template
    return "default" in template if isinstance(template, dict) else template is not None


def _check_saved(tokenizer: PreTrainedTokenizerBase, model: str | Path) -> None:
    """Refuse a tokenizer from a GGUF file that saves as another one; transformers 5.4 and 5.5 make such.

    Raises:
        CheckpointError: Saved and loaded again, it turns the same text into other tokens.
    """
    from transformers import AutoTokenizer, __version__

    text = "a b\n1"
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        again = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if again(text)["input_ids"] != tokenizer(text)["input_ids"]:
        raise CheckpointError(
            f"transformers {__version__} misreads the tokenizer in {model}: saved and loaded again, {text!r} becomes "
            f'{again.decode(again(text)["input_ids"])!r}; upgrade: pip install "transformers>={GGUF_TOKENIZERS}", or specify a '
            "model folder with the original tokenizer"
        )
