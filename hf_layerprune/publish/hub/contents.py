"""What of a model folder is published: the model, its records, its card; and what stays at home, with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ...cut.folder import INDEX, SINGLE, is_companion
from ...errors import CheckpointError
from ...records.declared import CARD
from ...records.lineage import FILE_NAME as LINEAGE
from ..card.writing import ASSETS, EVAL_RESULTS

METRICS = "metrics.json"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz")
_WEIGHTS = (".safetensors", ".gguf")
_PARTS = {ASSETS: (".png", ".svg"), EVAL_RESULTS: (".yaml",), "additional_chat_templates": (".jinja",)}


@dataclass(frozen=True)
class Contents:
    """The files of a folder.

    Args:
        folder (`Path`): The folder.
        files (`dict[str, int]`): The size of each file that is published, by its path in the repository.
        left_out (`dict[str, str]`): Why each of the others is not.
    """

    folder: Path
    files: dict[str, int]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Size of all that is published."""
        return sum(self.files.values())

    @property
    def weights(self) -> list[str]:
        """The weight files."""
        return [name for name in self.files if name.endswith(_WEIGHTS)]

    @property
    def is_adapter(self) -> bool:
        """Whether the folder is an adapter and no model."""
        return ADAPTER_CONFIG in self.files and "config.json" not in self.files

    def path(self, name: str) -> Path:
        """Where a file is."""
        return self.folder / name


def find_model(folder: Path, *, adapter_only: bool = False) -> Path:
    """The folder to publish.

    Args:
        folder (`Path`): What the user named.
        adapter_only (`bool`, *optional*, defaults to `False`): Publish the small form: the folder itself where it is
            an adapter, or else the folder `adapter` in it.

    Returns:
        `Path`: The folder.

    Raises:
        CheckpointError: There is no model, or no adapter.
    """
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file; name the model folder that hf-layerprune prune has written")
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist; name a model folder")
    if not adapter_only:
        return folder
    for place in (folder, folder / "adapter"):
        if (place / ADAPTER_CONFIG).is_file() and (place / ADAPTER_WEIGHTS).is_file():
            return place
    raise CheckpointError(
        f"{folder} holds no adapter, and --adapter-only publishes nothing else; make one with hf-layerprune prune "
        "--adapter, or leave the option out"
    )


def list_contents(folder: Path, *, adapter_only: bool = False) -> Contents:
    """List a model folder.

    Args:
        folder (`Path`): A model folder.
        adapter_only (`bool`, *optional*, defaults to `False`): Leave a whole model's weights out.

    Returns:
        `Contents`: What is published, and what is not.

    Raises:
        CheckpointError: A link leads out of the folder to nothing, or a name can't be published.
    """
    files: dict[str, int] = {}
    left_out: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir():
            continue
        if not path.is_file():
            raise CheckpointError(f"{path} is a link to nothing, or no file; remove it, or complete the download")
        reason = _why_not(name, adapter_only)
        if reason is None:
            files[name] = path.stat().st_size
        else:
            left_out[name] = reason
    return Contents(folder, files, left_out)


def _why_not(name: str, adapter_only: bool) -> str | None:
    """Why a file is not published, or `None` where it is."""
    top, _, rest = name.partition("/")
    if rest:
        if top in _PARTS and "/" not in rest and rest.endswith(_PARTS[top]) and not rest.startswith("."):
            return None
        return "in a folder that is no part of the model"
    if name.endswith(_PICKLES):
        return "may hold a pickle, which can run code when it is loaded"
    if adapter_only and (name.endswith(_WEIGHTS) or name in (INDEX, "config.json")) and name != ADAPTER_WEIGHTS:
        return "of the whole model, and only the adapter is wanted"
    if name.endswith(_WEIGHTS) or name in (CARD, LINEAGE, METRICS, INDEX, "config.json"):
        return None
    if is_companion(name):
        return None
    return "no part of the model"


def is_ours(name: str) -> bool:
    """Whether a file of a repository is of the kind that a push makes, so that a push may remove it again.

    Weights and records that no longer belong to the model must not stay beside it; whatever else people have put
    there does.
    """
    top, _, rest = name.partition("/")
    if rest:
        return (top == EVAL_RESULTS and rest.endswith(".yaml")) or (top == ASSETS and rest in _pictures())
    return name.endswith(_WEIGHTS) or name in (METRICS, LINEAGE, INDEX, SINGLE, ADAPTER_CONFIG, "config.json")


def _pictures() -> set[str]:
    from ..card.writing import PICTURES

    return {f"{name}.png" for name in PICTURES}
