"""A Space in which a model can be tried: written for a model on the Hub, published there, or served on this machine.

    build_space(Path("space"), model_repo_id="me/pruned", model=Path("pruned"))
    push_space(Path("space"), "me/pruned-chat")

The Space is `spaces/chat/`, as it is, with the model's name in its front matter and a copy of `records/figures/`, by which
it writes the numbers as the card does. It needs nothing else of this package, unless the model is an adapter.
"""

from __future__ import annotations

import importlib.util
import json
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
from ..runtime.loading import is_hub_id, resolve_base
from .hub.upload import Upload, Uploaded, log_in, push_errors, upload

logger = logging.getLogger(__name__)

MESSAGE = "Upload a chat with hf-layerprune"
SECRET = "HF_TOKEN"
# What loads weights of these kinds, beside transformers.
_QUANTIZERS = {"bitsandbytes": "bitsandbytes>=0.50", "gptq": "gptqmodel", "awq": "gptqmodel"}
_REPO_ID = re.compile(r"[\w.-]+/[\w.-]+")


def space_source() -> Path:
    """Where the Space's files are: in a checkout, or in an installed package.

    Returns:
        `Path`: The folder.

    Raises:
        CheckpointError: This installation has none.
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
    """Write a complete Space for a model: `app.py` and what it needs, pinned requirements, and the front matter.

    Args:
        folder (`Path`): The folder to make.
        model_repo_id (`str`): The model on the Hub.
        base_repo_id (`str`, *optional*): The dense model to compare with; by default the base that the lineage of
            `model` names, if that is on the Hub.
        model (`Path`, *optional*): The model's folder, which says what the Space needs to load it.
        adapter (`bool`, *optional*): Whether what is on the Hub is an adapter; by default whether `model` is one.
        title (`str`, *optional*): The Space's title.
        licence (`str`, defaults to `"apache-2.0"`): Of the Space's own files; the model's is shown in it.
        force (`bool`, defaults to `False`): Replace a folder that is there.

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
    """Publish a Space, by one commit or none.

    Args:
        folder (`Path`): What `build_space` has written.
        repo_id (`str`): The Space, `namespace/name`. It is made where it is missing.
        private (`bool`, defaults to `False`): Make a new Space private, and refuse a public one.
        secret (`str`, *optional*): A token that may read the model, stored as the Space's secret `HF_TOKEN`. Nothing
            is stored unless it is given.
        token (`str` or `bool`, *optional*): As the client library takes it; by default the user's own.

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
    """How to serve the Space on this machine.

    Args:
        model (`str`): A Hub id, a folder or a GGUF file; a model or an adapter.
        base (`str`, *optional*): The dense model to compare with; by default that of an adapter, or the one that the
            lineage names, if it is a folder on this machine.
        port (`int`, *optional*): The port; by default the first that is free from 7860 on.
        host (`str`, *optional*): The address; by default this machine's own.

    Returns:
        `tuple[list[str], dict[str, str]]`: The words of a process, and its environment.

    Raises:
        CheckpointError: There is no such model, or Gradio is missing.
    """
    missing = [name for name in ("gradio", "mcp") if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(f'the chat needs {" and ".join(missing)}: pip install "hf-layerprune[space]"')
    base = _model_there_is(base) if base else _local_base_of(Path(model).expanduser())
    environment = os.environ | {"MODEL_ID": _model_there_is(model), "BASE_ID": base or ""}
    environment |= {"GRADIO_SERVER_PORT": str(port)} if port else {}
    environment |= {"GRADIO_SERVER_NAME": host} if host else {}
    return [sys.executable, str(space_source() / "app.py")], environment


def _model_there_is(model: str) -> str:
    """Refuse a path that leads nowhere, which the page would take for an id on the Hub."""
    if not Path(model, "adapter_config.json").expanduser().is_file():
        resolve_base(model)
    return str(Path(model).expanduser()) if not is_hub_id(model) else model


def secret_from(variable: str | None) -> str | None:
    """A token out of an environment variable, so that it stands in no shell history.

    Args:
        variable (`str`, *optional*): Its name.

    Returns:
        `str`, *optional*: The token; `None` without a name.

    Raises:
        CutError: There is no such variable.
    """
    if variable is None:
        return None
    if not (token := os.environ.get(variable)):  # which is not repeated: it may be the token itself
        raise CutError(
            "--space-secret names an environment variable that is not set; name the one that holds the token"
        )
    return token


def check_id(name: str) -> None:
    """Refuse what is not a Hub id.

    Raises:
        CutError: It isn't one.
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
    """What a Space needs for this model, beside what it always does."""
    from ..versions import __version__

    if adapter:
        return [f"hf-layerprune=={__version__}"]
    if model is None:
        return []
    method = _read(model / "config.json").get("quantization_config", {}).get("quant_method")
    if method is None:
        return []
    if method not in _QUANTIZERS:
        logger.warning("the Space may need a package for weights of the kind %s: see its requirements.txt", method)
    return [_QUANTIZERS[method]] if method in _QUANTIZERS else []


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}") from error


def _write_front_matter(readme: Path, values: dict[str, Any]) -> None:
    from huggingface_hub.repocard import metadata_load, metadata_save

    metadata_save(readme, (metadata_load(readme) or {}) | values)
