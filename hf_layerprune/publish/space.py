"""A Space for trying a model: written for a model on the Hub, or served on this machine.

    build_space(Path("space"), model_repo_id="me/pruned", model=Path("pruned"))

The Space is a copy of `spaces/chat/` with the model's name in its front matter. It needs nothing of this package, unless
the model is an adapter.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import io
import logging
import os
import shutil
import socket
import sys
import tempfile
from contextlib import ExitStack, redirect_stdout, suppress
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub.repocard import metadata_load, metadata_save

from ..errors import CheckpointError
from ..families.multimodal import packages_of
from ..files.folders import new_folder
from ..files.json_file import read_object
from ..files.shipped import bundled_folder
from ..records.declared import CARD
from ..records.fingerprints import ADAPTER_CONFIG, CONFIG
from ..records.lineage import Lineage
from ..records.locked import locked
from ..records.names import check_repository, hub_base, last_part
from ..records.quantized import quantization_method, quantization_package
from ..runtime.config_file import read_config_file
from ..runtime.loading import is_hub_id, read_checked_config, resolve_base
from ..versions import __version__
from .requests import ChatRequest

logger = logging.getLogger(__name__)


def build_space(
    folder: Path,
    *,
    model_repo_id: str,
    model: Path,
    token: str | bool | None = None,
) -> None:
    """Write a complete Space for a model on the Hub: `app.py`, its modules, pinned requirements, and the front matter.

    The lineage in the model's folder names the dense model to compare with, if that is on the Hub. The config there
    decides which packages are required; an adapter requires this one, and those of its base, which `token` may read.

    Raises:
        CutError: `model_repo_id` is not a Hub id.
        CheckpointError: The folder can't be written.
    """
    check_repository(model_repo_id)
    lineage = Lineage.load(model)
    base_repo_id = hub_base(lineage.base) if lineage else None
    source = bundled_folder("spaces/chat")
    with new_folder(folder, source=source) as staging:
        for path in sorted(source.iterdir()):
            if path.suffix in (".py", ".css", ".txt", ".md"):
                shutil.copyfile(path, staging / path.name)
        fields = metadata_load(staging / CARD) or {}
        fields |= {"title": last_part(model_repo_id), "models": [one for one in (model_repo_id, base_repo_id) if one]}
        metadata_save(staging / CARD, fields)
        with (staging / "requirements.txt").open("a", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in _requirements_of(model, token))


def serve(request: ChatRequest) -> str:
    """Serve the Space from threads of this process, on the first free port, until [`stop_serving`]; returns its address.

    Raises:
        CheckpointError: There is no such model, Gradio is missing, or the address can't be used.
    """
    missing = [name for name in ("gradio", "mcp") if importlib.util.find_spec(name) is None]
    if missing:
        raise CheckpointError(f'the chat needs {" and ".join(missing)}: pip install "hf-layerprune[space]"')
    model = _existing_model(request.model)
    base = _existing_model(request.base) if request.base else _local_base_of(Path(request.model).expanduser())
    host = request.host or os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    port = request.port or os.environ.get("GRADIO_SERVER_PORT", "7860")
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Gradio does
            probe.bind((host, int(port)))
    except (OSError, OverflowError, ValueError) as error:
        if getattr(error, "errno", None) != errno.EADDRINUSE:
            what = f"can't listen on {host}, port {port} ({getattr(error, 'strerror', None) or error})"
            raise CheckpointError(f"{what}; specify others with --host and --port") from error
    # Gradio reads them when it is imported; only there are they where to look for a free port.
    os.environ |= {"GRADIO_SERVER_NAME": host, "GRADIO_SERVER_PORT": str(port)}
    sys.path.insert(0, str(bundled_folder("spaces/chat")))  # its files import each other as they do on the Hub
    app = importlib.import_module("app")
    try:
        page = app.build(model, base)
    except app.CannotLoad as error:
        raise CheckpointError(error) from error
    try:
        with ExitStack() as alone, redirect_stdout(io.StringIO()):  # it prints some lines even if `quiet`
            # Gradio takes a port a moment after it found it free, and can't serve a page that lost its port in between.
            with suppress(CheckpointError, OSError):  # without a place for a lock, that is unlikely still
                name = f"hf-layerprune-chat-{getattr(os, 'getuid', int)()}"
                alone.enter_context(locked(Path(tempfile.gettempdir(), name)))
            # Gradio's look at its own page gives up after three seconds, which a busy machine may need.
            _, address, public = app.launch(page, prevent_thread_lock=True, quiet=True, _frontend=False)
    except (OSError, OverflowError) as error:
        raise CheckpointError(f"all ports of {host} from {port} on are taken; specify another with --port") from error
    return str(public or address)  # with GRADIO_SHARE, it has a public one


def stop_serving() -> NoReturn:
    """End this process at once: a thread may still be loading weights, and a regular exit can hang or abort then."""
    from gradio.tunneling import CURRENT_TUNNELS

    with redirect_stdout(io.StringIO()):
        for tunnel in CURRENT_TUNNELS:
            tunnel.kill()
    os._exit(130)


def _existing_model(model: str) -> str:
    """A model's name or path; refuses a path that does not exist, which the page would take for a Hub id."""
    if not Path(model, ADAPTER_CONFIG).expanduser().is_file():
        resolve_base(model)
    return str(Path(model).expanduser()) if not is_hub_id(model) else model


def _local_base_of(model: Path) -> str | None:
    """The dense base of a model, if it is on this machine."""
    lineage = Lineage.load(model) if model.is_dir() else None
    base = (lineage.base.get("id") if lineage else None) or ""
    return base if base and Path(base, CONFIG).is_file() else None


def _requirements_of(model: Path, token: str | bool | None) -> list[str]:
    """The packages that a Space needs for this model in addition to its usual ones."""
    config, whole = _loaded_config(model, token), (model / CONFIG).is_file()
    packages = [*([] if whole else [f"hf-layerprune=={__version__}"]), *packages_of(config)]
    settings = config.get("quantization_config")
    if not isinstance(settings, dict):
        return packages
    if (package := quantization_package(settings)) is None:
        logger.warning(
            "the Space may need a package for %s weights; add it to its requirements.txt",
            quantization_method(settings),
        )
    return [*packages, package] if package else packages


def _loaded_config(model: Path, token: str | bool | None) -> dict[str, Any]:
    """The `config.json` of the whole model that a Space loads: this one, or the base of this adapter."""
    if (model / CONFIG).is_file():
        return read_config_file(model / CONFIG)
    settings = read_object(model / ADAPTER_CONFIG)
    name, revision = str(settings.get("base_model_name_or_path")), settings.get("revision")
    try:
        return read_checked_config(name, revision=revision, token=token)
    except CheckpointError as error:
        logger.warning("the Space may need more packages than its requirements.txt lists: %s", error)
        return {}
