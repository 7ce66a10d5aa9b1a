"""Everything that differs between the versions of transformers, PEFT, TRL and the Hub client that are supported.

No other module asks for a version, or imports a name that only some of these versions have. Nothing heavy is imported
before a function is called.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .errors import LayerPruneError

if TYPE_CHECKING:
    import os
    from enum import Enum

    from packaging.version import Version

__version__ = "0.1.0"


def installed(distribution: str) -> Version:
    """The installed version of a distribution; `0` where it is not installed."""
    from importlib.metadata import PackageNotFoundError, version

    from packaging.version import Version

    try:
        return Version(version(distribution))
    except PackageNotFoundError:
        return Version("0")


def _is_at_least(distribution: str, floor: str) -> bool:
    from packaging.version import Version

    return installed(distribution) >= Version(floor)


# --- PEFT -------------------------------------------------------------------------------------------------


def check_peft() -> None:
    """Refuse a PEFT that would load adapters of this method wrongly, without an error of its own.

    Raises:
        LayerPruneError: PEFT is older than 0.19: it does not call the hook that puts dropped layers back, so
            `disable_adapter` would give the pruned model where the dense one is asked for.
    """
    if not _is_at_least("peft", "0.19"):
        raise LayerPruneError(
            f"peft {installed('peft')} is too old: it can't switch between the pruned and the dense model, and would give wrong "
            'results silently; install a newer one: pip install "peft>=0.19"'
        )


def let_peft_save(method: Enum) -> None:
    """Let PEFT 0.19 and 0.20 save adapters of a method that is not a member of PEFT's own enum.

    They look for the method among the members when they save, and nowhere else; a copy of the enum with one member
    more equals the original in every comparison, since members are strings.

    Args:
        method (`Enum`): The method's name, a member of a string enum.
    """
    if _is_at_least("peft", "0.21"):
        return
    from enum import Enum

    from peft.utils import save_and_load

    members = {kind.name: kind.value for kind in save_and_load.PeftType} | {method.name: method.value}
    save_and_load.PeftType = Enum("PeftType", members, type=str)  # type: ignore[misc, assignment]


# --- transformers -----------------------------------------------------------------------------------------


def gguf_options() -> dict[str, Any]:
    """What `from_pretrained` needs beside `gguf_file` to unpack the weights to floats.

    Returns:
        `dict[str, Any]`: Nothing before transformers 5.17, which always unpacks.
    """
    import transformers

    config_class = getattr(transformers, "GgufConfig", None)
    return {} if config_class is None else {"quantization_config": config_class(dequantize=True)}


# --- the Hub client ---------------------------------------------------------------------------------------


def resolve_commit(
    repo: str | os.PathLike[str],
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
) -> str | None:
    """The commit that a revision of a repository is at, as far as it can be found out.

    Args:
        repo (`str` or `os.PathLike`): A Hub id. A folder has no commit.
        revision (`str`, *optional*): Branch, tag or commit.
        token (`str` or `bool`, *optional*): As the Hub client takes it.
        cache_dir (`str` or `os.PathLike`, *optional*): The Hub client's cache.
        local_files_only (`bool`, defaults to `False`): Whether only the cache is asked.

    Returns:
        `str`, *optional*: The full hash, or `None` for a folder and where the Hub does not say. Loading then reports
            what is wrong.
    """
    import os

    from huggingface_hub import HfApi, constants

    if os.path.exists(repo):
        return None
    offline = local_files_only or constants.HF_HUB_OFFLINE
    where: dict[str, Any] = {"token": token, "cache_dir": cache_dir, "local_files_only": offline}
    try:
        return HfApi().resolve_revision(str(repo), revision=revision, **where).resolved
    except Exception:  # whatever it is, loading meets it again and reports it in full
        return None


def transport_error() -> type[Exception]:
    """What the Hub client raises where a server can't be reached: of httpx until 1.x, of httpx2 from 2.0 on."""
    library = "httpx2" if _is_at_least("huggingface-hub", "2") else "httpx"
    return import_module(library).TransportError


# --- TRL --------------------------------------------------------------------------------------------------


def trl_pads_by_itself() -> bool:
    """Whether TRL knows `pad_to_multiple_of="auto"`."""
    return _is_at_least("trl", "1.16")


def trl_drops_rows_without_labels() -> bool:
    """Whether TRL leaves out rows whose prompt alone fills `max_length`, so that nothing is learned from them."""
    return _is_at_least("trl", "1.10")
