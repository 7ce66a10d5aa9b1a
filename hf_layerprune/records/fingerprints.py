"""Hashes of a model's weights and of the other files that affect its behaviour."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..files.copy import FileState
from ..files.hub import Repo
from ..files.json_file import read_object
from .licences import is_licence_file
from .names import is_hub_name

WEIGHTS = (".safetensors", ".gguf")
CONFIG, GENERATION, ADAPTER_CONFIG = "config.json", "generation_config.json", "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
TEMPLATES = "additional_chat_templates"
# Settings files that some quantisers write next to the config.
QUANTISERS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
# Beside config and weights, a model consists of its settings and what its tokenizer reads; other files that lie in a
# folder, such as notes, code and logs, are neither copied nor published.
_PARTS = {
    GENERATION, *QUANTISERS, "audio_tokenizer_config.json", "image_processor_config.json", "preprocessor_config.json",
    "processor_config.json", "video_preprocessor_config.json", "added_tokens.json", "bpe.codes", "byte_maps.json", "chat_template.jinja",
    "chat_template.json", "dict.txt", "emoji.json", "entity_vocab.json", "merges.txt", "normalizer.json",
    "prophetnet.tokenizer", "special_tokens_map.json", "target_vocab.json", "tekken.json", "tokenizer.json",
    "tokenizer_config.json", "vocab-src.json", "vocab-tgt.json", "vocab.bpe", "vocab.json", "vocab.txt",
    "word_pronunciation.json", "word_shape.json",
}  # fmt: skip
_VOCABULARIES = (".model", ".tiktoken", ".spm")
# Vocabularies with a version: tokenizer.model.v3, which mistral-common reads, and tokenizer.4.0.json.
_VERSIONED = re.compile(r"tokenizer((\.mm)?\.model\.v\w+|\.\d[\d.]*\.json)")
# Files that do not affect the model's behaviour: records, the card, pictures, licences, and files of git.
RECORDS = {"lineage.json", "metrics.json"}
_RECIPE = "recipe.yaml"  # of llm-compressor, the only one to read it; what loaders need is in config.json
_INERT = (".md", ".png", ".svg", ".jpg", ".jpeg")
_NEVER_LOADED = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".npz", ".npy", ".pkl", ".pickle")
_COMMIT = re.compile(r"[0-9a-f]{40}")


def sha256_of(path: Path) -> str:
    """The sha256 of a file, cached until the file changes."""
    blob = path.resolve()
    return _cached_hash(blob, FileState.of_file(blob))


@lru_cache(maxsize=4096)
def _cached_hash(path: Path, state: FileState) -> str:
    return _read_hash(path)


def _read_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(paths: Mapping[str, Path]) -> dict[str, str]:
    """The sha256 of several files, under the same keys."""
    with ThreadPoolExecutor(2) as pool:  # hashing releases the interpreter lock
        return dict(zip(paths, pool.map(sha256_of, paths.values()), strict=True))


def hash_hub_files(repo: Repo, names: Sequence[str]) -> tuple[dict[str, str], Path]:
    """The sha256 of files of a repository, of which only the small ones are downloaded.

    Returns:
        `tuple[dict[str, str], Path]`: The hashes by name, those of weights as the Hub lists them; and the folder in the
            cache with the small files and the records.

    Raises:
        CheckpointError: A file can't be downloaded.
    """
    # Offline, the listed hashes are only the names of files in the cache, so all files are hashed.
    listed = {} if repo.offline else {name: repo.files[name].sha256 for name in names if holds_weights(name)}
    hashes = {name: sha256 for name, sha256 in listed.items() if sha256 is not None}
    small = [name for name in names if name not in hashes]
    paths = repo.fetch([*small, *(name for name in sorted(RECORDS) if name in repo.files)])
    folder = next((path.parent for name, path in paths.items() if "/" not in name), Path(repo.name))
    return hashes | hash_files({name: paths[name] for name in small}), folder


def fingerprint(path: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of the weight and JSON files of a base, a folder or a single file, by name."""
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if is_hashed(p.name) and p.is_file())
    named = {file.name: file for file in files if file.name not in RECORDS}
    hashes = hash_files(named)
    return {name: {"size": file.stat().st_size, "sha256": hashes[name]} for name, file in named.items()}


def holds_weights(name: str) -> bool:
    """Whether a file holds weights, judged by its name, in either case: some repositories have `MODEL.GGUF`."""
    return name.lower().endswith(WEIGHTS) and not _is_hidden(name)


def is_hashed(name: str) -> bool:
    return (name.endswith(".json") and not _is_hidden(name)) or holds_weights(name)


def _is_hidden(name: str) -> bool:
    """Whether a file is of git, the Hub client, or macOS, which puts `._NAME` beside files on other systems' disks."""
    return name.startswith(".") or "/." in name


def weights_hash(files: Mapping[str, Mapping[str, Any]]) -> str:
    """One sha256 over the names and hashes of all weight files of a model, from `fingerprint`.

    The same weights in other shards have another hash.
    """
    return _combine({name: entry["sha256"] for name, entry in files.items() if holds_weights(name)})


def uncached_weights_hash(folder: Path) -> str:
    """The hash of weights that are about to be changed in place.

    It is not cached, since the modification time may be too coarse to show the change.
    """
    paths = sorted(path for path in folder.iterdir() if holds_weights(path.name))
    return weights_hash({path.name: {"sha256": _read_hash(path)} for path in paths})


def _combine(hashes: Mapping[str, str]) -> str:
    lines = [f"{name} {sha256}\n" for name, sha256 in sorted(hashes.items())]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def is_inert(name: str) -> bool:
    """Whether the file at a path relative to a model folder cannot change how the model behaves.

    Records, the card, pictures, licences and hidden files are inert; any other file counts as affecting the behaviour.
    Of chat templates, transformers loads hidden files too.
    """
    folder, _, base = name.rpartition("/")
    if folder == TEMPLATES:
        return False
    if _is_hidden(name):
        return True
    if folder:
        return folder == "assets" and base.endswith(_INERT)
    return name in (*RECORDS, _RECIPE) or name.lower().endswith(_INERT) or is_licence_file(name)


def is_part(name: str) -> bool:
    """Whether the file at a path relative to a model folder belongs to the model, apart from config and weights.

    These are its settings, what its tokenizer reads, its chat templates, and its licence.
    """
    folder, _, base = name.rpartition("/")
    if folder:
        return folder == TEMPLATES and base.endswith(".jinja")  # also if hidden: transformers loads these, too
    if base.startswith("."):
        return False
    is_vocabulary = base.endswith(_VOCABULARIES) or _VERSIONED.fullmatch(base)
    return base in _PARTS or bool(is_vocabulary) or is_licence_file(base)


def has_tokenizer(names: Iterable[str]) -> bool:
    """Whether a model that consists of these files has a tokenizer."""
    return any(name.startswith(("tokenizer", "vocab", "tekken")) or name.endswith(_VOCABULARIES) for name in names)


def is_model_file(name: str) -> bool:
    """Whether a loader may read the file at this path relative to a model folder; see [`model_files`]."""
    top = "/" not in name or name.startswith(f"{TEMPLATES}/")
    return top and not is_inert(name) and not name.endswith(_NEVER_LOADED)


def model_files(folder: Path) -> dict[str, Path]:
    """The files of a folder that a loader may read: those at the top level, and additional chat templates.

    Returns:
        `dict[str, Path]`: By path relative to the folder. Pickles and weights in other formats are omitted, since they
            are never loaded here.

    Raises:
        CheckpointError: An entry is a broken link or not a file.
    """
    files: dict[str, Path] = {}
    for path in sorted([*folder.iterdir(), *folder.glob(f"{TEMPLATES}/*")]):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or not is_model_file(name):
            continue
        if not path.is_file():
            raise CheckpointError(f"{path} is a broken link or not a file; remove it, or complete the download")
        files[name] = path
    return files


def behaviour_hashes(folder: Path) -> dict[str, str]:
    """The sha256 of every file of a folder, except weights, that may affect the model's behaviour."""
    return hash_files({name: path for name, path in model_files(folder).items() if not holds_weights(name)})


def companion_names(folder: Path) -> list[str]:
    """The names of the files of a folder, except weights, that may affect the model's behaviour."""
    return sorted(name for name in model_files(folder) if not holds_weights(name))


@dataclass(frozen=True)
class Identity:
    """The identity of a model. Numbers that were measured on one identity are not valid for another.

    Args:
        weights (`str`): The hash of its weight files.
        config (`str`, *optional*): The sha256 of `config.json`.
        generation (`str`, *optional*): The sha256 of `generation_config.json`.
        tokenizer (`str`, *optional*): One hash for the tokenizer's files and all files not listed here.
        template (`str`, *optional*): One hash for the chat templates in separate files.
        adapter (`str`, *optional*): The sha256 of `adapter_config.json`.
        base (`str`, *optional*): For an adapter, its base: `ID@COMMIT` on the Hub, or the digest of a folder's identity.
    """

    weights: str
    config: str | None = None
    generation: str | None = None
    tokenizer: str | None = None
    template: str | None = None
    adapter: str | None = None
    base: str | None = None

    @property
    def digest(self) -> str:
        """One hash for all fields."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

    @property
    def parts(self) -> dict[str, str]:
        """All fields except the weights, as recorded in `metrics.json`."""
        return {name: value for name, value in asdict(self).items() if value is not None and name != "weights"}

    def changed_since(self, recorded: Mapping[str, str] | None) -> list[str]:
        """The parts that differ from the recorded ones; `["identity"]` if none were recorded."""
        if recorded is None:
            return ["identity"]
        return sorted(
            name for name in recorded.keys() | self.parts.keys() if recorded.get(name) != self.parts.get(name)
        )


def identity_from_hashes(hashes: Mapping[str, str], base: str | None = None) -> Identity:
    """The identity of a model, from the sha256 of each file by relative path, and from the base of an adapter."""
    weights: dict[str, str] = {}
    template: dict[str, str] = {}
    others: dict[str, str] = {}
    for name, sha256 in hashes.items():
        if name in (CONFIG, GENERATION, ADAPTER_CONFIG):
            continue
        is_template = name.startswith((f"{TEMPLATES}/", "chat_template."))
        group = weights if holds_weights(name) else template if is_template else others
        group[name] = sha256
    return Identity(
        weights=_combine(weights),
        config=hashes.get(CONFIG),
        generation=hashes.get(GENERATION),
        tokenizer=_combine(others) if others else None,
        template=_combine(template) if template else None,
        adapter=hashes.get(ADAPTER_CONFIG),
        base=base,
    )


def compute_identity(path: Path, above: frozenset[Path] = frozenset()) -> Identity:
    """The identity of a model folder, an adapter's folder, or a GGUF file.

    Args:
        path (`Path`): The folder or the file.
        above (`frozenset[Path]`): The adapters whose base it is, directly or as the base of one of them.

    Raises:
        CheckpointError: An entry is a broken link, or `adapter_config.json` can't be read.
    """
    hashes = hash_files({path.name: path} if path.is_file() else model_files(path))
    return identity_from_hashes(hashes, base_of_adapter(path, above) if ADAPTER_CONFIG in hashes else None)


def base_of_adapter(folder: Path, above: frozenset[Path] = frozenset()) -> str | None:
    """The base of an adapter: `ID@COMMIT` on the Hub, the digest of a folder's identity, or `None` if it has none.

    An adapter that names itself, or one of those `above`, as its base counts as having none.

    The commit is the one pinned in `adapter_config.json`, or else the one to which the revision resolves in the Hub
    client's cache, as in an offline load.
    """
    from huggingface_hub import try_to_load_from_cache

    fields = read_object(folder / ADAPTER_CONFIG)
    name, revision = fields.get("base_model_name_or_path"), fields.get("revision") or fields.get("base_commit")
    if not isinstance(name, str) or not name:
        return None
    local = Path(name).expanduser()
    if local.exists():
        above |= {folder.resolve()}
        return None if local.resolve() in above else compute_identity(local, above).digest
    if not isinstance(revision, str) or not _COMMIT.fullmatch(revision):
        cached = try_to_load_from_cache(name, CONFIG, revision=revision) if is_hub_name(name) else None
        revision = Path(cached).parent.name if isinstance(cached, str) else revision
    return f"{name}@{revision}"
