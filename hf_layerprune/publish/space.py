"""A Space for trying a model: written for a model on the Hub, and published there or served on this machine.

    build_space(Path("space"), model_repo_id="me/pruned", model=Path("pruned"))
    push_space(Path("space"), "me/pruned-chat")

The Space is a copy of `spaces/chat/` with the model's name in its front matter, and a copy of `records/figures/`, with
which it formats numbers as the card does. It needs nothing else of this package, unless the model is an adapter.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, CutError
from ..files.folders import new_folder
from ..records import figures
from ..records.lineage import Lineage
from ..runtime.config_file import read_config_file
from ..runtime.loading import is_hub_id, resolve_base
from .hub.upload import Upload, Uploaded, log_in, push_errors, upload

logger = logging.getLogger(__name__)

MESSAGE = "Upload a chat with hf-layerprune"
SECRET = "HF_TOKEN"
# The packages that transformers needs to load quantised weights.
_QUANTIZERS = {"bitsandbytes": "bitsandbytes>=0.50", "gptq": "gptqmodel", "awq": "gptqmodel"}
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def space_source() -> Path:
    """Find the files of the Space, in a checkout or an installed package.

    Returns:
        `Path`: The folder.

    Raises:
        CheckpointError: This installation lacks them.
    """
    package = Path(__file__).parents[1]
    for folder in (package / "spaces" / "chat", package.parent / "spaces" / "chat"):
        if (folder / "app.py").is_file():
            return folder
    raise CheckpointError("this installation of hf-layerprune has no spaces/chat; install it again, from PyPI or git")


def build_space(
    folder: Path,
    *,
    model_repo_id: str,
    base_repo_id: str | None = None,
    model: Path | None = None,
    adapter: bool | None = None,
    title: str | None = None,
    licence: str = "apache-2.0",
    force: bool = False,
) -> Path:
    """Write a complete Space for a model: `app.py` and its modules, pinned requirements, and the front matter.

    Args:
        folder (`Path`): The folder to write.
        model_repo_id (`str`): The model on the Hub.
        base_repo_id (`str`, *optional*): The dense model to compare with; by default the base that the lineage of
            `model` names, if that is on the Hub.
        model (`Path`, *optional*): The model's folder, from which the required packages are derived.
        adapter (`bool`, *optional*): Whether the model on the Hub is an adapter; by default whether `model` is one.
        title (`str`, *optional*): The Space's title.
        licence (`str`, defaults to `"apache-2.0"`): The licence of the Space's own files; the Space shows the model's.
        force (`bool`, defaults to `False`): Replace an existing folder.

    Returns:
        `Path`: The folder.

    Raises:
        CutError: `model_repo_id` or `base_repo_id` is not a Hub id.
        CheckpointError: The folder can't be written.
    """
    for name in filter(None, (model_repo_id, base_repo_id)):
        check_id(name)
    base_repo_id = base_repo_id or (_base_of(model) if model else None)
    if adapter is None:
        adapter = model is not None and not (model / "config.json").is_file()
    source = space_source()
    with new_folder(folder, force=force, apart_from=source) as made:
        for path in sorted(source.iterdir()):
            if path.suffix in (".py", ".css", ".txt", ".md"):
                shutil.copyfile(path, made / path.name)
        shutil.copytree(Path(figures.__file__).parent, made / "figures", ignore=shutil.ignore_patterns("__pycache__"))
        name = model_repo_id.rpartition("/")[2]
        _write_front_matter(
            made / "README.md",
            {"title": title or name, "models": list(filter(None, (model_repo_id, base_repo_id))), "license": licence},
        )
        with (made / "requirements.txt").open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in _requirements_of(model, adapter))
    return folder


def push_space(
    folder: Path, repo_id: str, *, private: bool = False, secret: str | None = None, token: str | bool | None = None
) -> Uploaded:
    """Publish a Space in one commit.

    Args:
        folder (`Path`): A folder written by `build_space`.
        repo_id (`str`): The Space, `namespace/name`, created if it does not exist.
        private (`bool`, defaults to `False`): Make a new Space private, and refuse a public one.
        secret (`str`, *optional*): A token that may read the model, stored as the Space's secret `HF_TOKEN`. By
            default, nothing is stored.
        token (`str` or `bool`, *optional*): As for `huggingface_hub`; by default the user's own.

    Returns:
        `Uploaded`: What was done.

    Raises:
        CutError: `repo_id` is not a Hub id.
        PushError: The Hub refused.
    """
    check_id(repo_id)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    api, user = log_in(token)
    job = Upload(repo_id=repo_id, files=files, kind="space", sdk="gradio", private=private, message=MESSAGE)
    done = upload(job, api, user)
    if secret is not None:
        with push_errors(repo_id, user, "space"):
            api.add_space_secret(repo_id, SECRET, secret, description="Reads the model; stored by hf-layerprune")
    return done


def local_run(
    model: str, base: str | None = None, *, port: int | None = None, host: str | None = None
) -> tuple[list[str], dict[str, str]]:
    """The command that serves the Space on this machine.

    Args:
        model (`str`): A Hub id, a folder or a GGUF file; a model or an adapter.
        base (`str`, *optional*): The dense model to compare with; by default the base of an adapter, or the one that
            the lineage names if it is a folder on this machine.
        port (`int`, *optional*): The port; by default the first free one from 7860.
        host (`str`, *optional*): The address; by default 127.0.0.1.

    Returns:
        `tuple[list[str], dict[str, str]]`: The arguments of a process, and its environment.

    Raises:
        CheckpointError: There is no such model, or Gradio is missing.
    """
    missing = [name for name in ("gradio", "mcp") if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(f'the chat needs {" and ".join(missing)}: pip install "hf-layerprune[space]"')
    base = _existing_model(base) if base else _local_base_of(Path(model).expanduser())
    environment = os.environ | {"MODEL_ID": _existing_model(model), "BASE_ID": base or ""}
    environment |= {"GRADIO_SERVER_PORT": str(port)} if port else {}
    environment |= {"GRADIO_SERVER_NAME": host} if host else {}
    return [sys.executable, str(space_source() / "app.py")], environment


def _existing_model(model: str) -> str:
    """Refuse a path that does not exist, which the page would take for a Hub id."""
    if not Path(model, "adapter_config.json").expanduser().is_file():
        resolve_base(model)
    return str(Path(model).expanduser()) if not is_hub_id(model) else model


def secret_from(variable: str | None) -> str | None:
    """Read a token from an environment variable, so that it is not in the shell history.

    Args:
        variable (`str`, *optional*): The variable's name.

    Returns:
        `str`, *optional*: The token; `None` without a name.

    Raises:
        CutError: The variable is not set.
    """
    if variable is None:
        return None
    if not (token := os.environ.get(variable)):  # the name is not repeated: it may be the token itself
        raise CutError(
            "--space-secret names an environment variable that is not set; name the one that holds the token"
        )
    return token


def check_id(name: str) -> None:
    """Refuse a name that is not a Hub id.

    Raises:
        CutError: It is not a Hub id.
    """
    if not _REPO_ID.fullmatch(name):
        raise CutError(f"{name!r} is not a Hub id; write it as NAMESPACE/NAME")


def _base_of(model: Path) -> str | None:
    """The dense base of a model, if it is on the Hub."""
    from ..records.names import hub_base

    lineage = Lineage.of(model)
    return hub_base(lineage.base) if lineage else None


def _local_base_of(model: Path) -> str | None:
    """The dense base of a model, if it is on this machine."""
    lineage = Lineage.of(model) if model.is_dir() else None
    base = (lineage.base.get("id") if lineage else None) or ""
    return base if base and Path(base, "config.json").is_file() else None


def _requirements_of(model: Path | None, adapter: bool) -> list[str]:
    """The packages that a Space needs for this model in addition to its usual ones."""
    from ..versions import __version__

    if adapter:
        return [f"hf-layerprune=={__version__}"]
    if model is None:
        return []
    quantization = read_config_file(model / "config.json").get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") is None:
        return []
    method = str(quantization["quant_method"])
    if method not in _QUANTIZERS:
        logger.warning("the Space may need a package for %s weights; add it to its requirements.txt", method)
    return [_QUANTIZERS[method]] if method in _QUANTIZERS else []


def _write_front_matter(readme: Path, values: dict[str, Any]) -> None:
    from huggingface_hub.repocard import metadata_load, metadata_save

    metadata_save(readme, (metadata_load(readme) or {}) | values)
