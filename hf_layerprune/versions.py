"""All differences between the supported versions of transformers, PEFT, TRL and the Hub client.

No other module checks a version or imports a name that only some versions have. Heavy packages are imported inside the
functions.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from packaging.version import Version

if TYPE_CHECKING:
    from enum import Enum

__version__ = "0.1.0"


@cache
def installed_version(distribution: str) -> Version:
    """The installed version of a distribution."""
    from importlib.metadata import version

    return Version(version(distribution))


def _is_at_least(distribution: str, floor: str) -> bool:
    return installed_version(distribution) >= Version(floor)


# --- PEFT -------------------------------------------------------------------------------------------------


def let_peft_save(method: Enum) -> None:
    """Let PEFT 0.19 and 0.20 save adapters of a method that is not a member of PEFT's own enum.

    They look up the method in the enum only when saving. A copy of the enum with an added member compares equal to the
    original everywhere, since the members are strings.
    """
    if _is_at_least("peft", "0.21"):
        return
    from enum import Enum

    from peft.utils import save_and_load

    members = {kind.name: kind.value for kind in save_and_load.PeftType} | {method.name: method.value}
    save_and_load.PeftType = Enum("PeftType", members, type=str)  # type: ignore[misc, assignment]


# --- transformers -----------------------------------------------------------------------------------------


# From this version on, the tokenizer of a GGUF file of SmolLM2 or Llama 3 is read as what it is. Before, it became a
# CodeLlamaTokenizer, which puts a token in front and, once saved, turns spaces into <unk>.
GGUF_TOKENIZERS = "5.6"


def gguf_options() -> dict[str, Any]:
    """Arguments besides `gguf_file` with which `from_pretrained` dequantises the weights.

    There are none before transformers 5.17, which always dequantises.
    """
    import transformers

    config_class = getattr(transformers, "GgufConfig", None)
    return {} if config_class is None else {"quantization_config": config_class(dequantize=True)}


def transformers_loads_whole_modules() -> bool:
    """Whether the `load_adapter` of transformers, which its `from_pretrained` calls, loads `modules_to_save`.

    With PEFT 0.19, it leaves out those outside the decoder, such as `lm_head`.
    """
    return _is_at_least("transformers", "5.18") and _is_at_least("peft", "0.20")


# --- the Hub client ---------------------------------------------------------------------------------------


def transport_error() -> type[Exception]:
    """The exception of the Hub client for an unreachable server: from httpx up to 1.x, from httpx2 since 2.0."""
    library = "httpx2" if _is_at_least("huggingface-hub", "2") else "httpx"
    return import_module(library).TransportError


# --- TRL --------------------------------------------------------------------------------------------------


def trl_pads_by_itself() -> bool:
    """Whether TRL supports `pad_to_multiple_of="auto"`."""
    return _is_at_least("trl", "1.16")


def trl_cuts_batches() -> bool:
    """Whether TRL cuts rows to `max_length` as it makes batches of them, and not when it prepares them."""
    return not _is_at_least("trl", "1.8")
