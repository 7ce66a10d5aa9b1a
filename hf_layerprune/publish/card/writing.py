"""Writing the card of a folder: README.md, its pictures, the licence's notice, and results for the Hub's leaderboards.

    write_card(folder)

README.md keeps what people wrote around our marks, and the YAML fields that they added.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from ...errors import CheckpointError
from ...files.copy import write_bytes, write_text
from ...records.declared import CARD
from ...records.licences import NOTICE, is_licence_file
from ...records.lineage import Lineage
from ...records.metrics import Metrics
from . import metadata, regions
from .render import Card
from .stamps import stamp, stamped

ASSETS = "assets"
EVAL_RESULTS = ".eval_results"
# What we draw, and may remove again.
PICTURES = ("layers", "scores", "accuracy", "tradeoff")
EVAL_MARK = "# by hf-layerprune, from metrics.json\n"
# What libraries add to the template of a card that nobody has filled in.
_ADDED = re.compile(r"#+ Framework versions|- \w+ [\w.+]+|")


def read_card(folder: Path, *, weights: bool = True) -> Card:
    """Read the records of a folder.

    Args:
        folder (`Path`): A model folder.
        weights (`bool`, *optional*, defaults to `True`): Refuse records of other weights than the folder's.

    Returns:
        `Card`: What can be said of the model.

    Raises:
        CheckpointError: There are no records, they contradict themselves, or they belong to other weights.
    """
    lineage = _lineage(folder)
    metrics = Metrics.of(folder)
    if weights and metrics is not None:
        metrics.check_belongs(folder, lineage)
    return Card.of(lineage, metrics)


def _lineage(folder: Path) -> Lineage:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; name a model folder that hf-layerprune prune has written")
    lineage = Lineage.of(folder)
    if lineage is None:
        raise CheckpointError(
            f"{folder} has no lineage.json, so nothing can be said of where it comes from; make it with "
            "hf-layerprune prune"
        )
    return lineage


def declare(
    folder: Path,
    *,
    license: str | None = None,
    license_name: str | None = None,
    license_link: str | None = None,
    base_model: str | None = None,
    name: str | None = None,
    published: dict[str, str] | None = None,
) -> Lineage:
    """Record what nobody but the user knows: the base's licence or Hub id, or where the model is published.

    Args:
        folder (`Path`): A model folder; its `lineage.json` is changed where something is new.
        license (`str`, *optional*): The identifier of the base's licence, as the Hub has it; `other` for the rest.
        license_name (`str`, *optional*): The name of a licence that is `other`.
        license_link (`str`, *optional*): Where its text is.
        base_model (`str`, *optional*): The Hub id of the base, or of the model that a local base is a copy of. The
            base is then no longer named by its path.
        name (`str`, *optional*): What the model is called, as long as it is not on the Hub.
        published (`dict[str, str]`, *optional*): `repo_id`, and `space`.

    Returns:
        `Lineage`: What the folder's lineage says now.

    Raises:
        CheckpointError: The folder has no lineage, the base is not a Hub id, or the name can't be one on the Hub.
    """
    from ...records.names import base_name, is_hub_name

    told = {"license": license, "license_name": license_name, "license_link": license_link}

    def change(lineage: Lineage) -> None:
        base, names = dict(lineage.base), dict(published or {})
        if license is not None:  # another licence, so the old one's name and link go
            base = {name: value for name, value in base.items() if name not in told}
        base |= {name: value for name, value in told.items() if value}
        if base_model is not None:
            if not is_hub_name(base_model):
                raise CheckpointError(f"{base_model!r} is not a Hub id; name the base as org/name")
            if not base.get("commit"):
                base |= {"id": base_name(base), "hub_id": base_model}
            elif base_model != base.get("id"):
                raise CheckpointError(f"the base is {base['id']} at commit {base['commit'][:12]}, not {base_model}")
        if names and names.get("repo_id") != lineage.published.get("repo_id"):
            lineage.published = {}  # a Space of the model elsewhere is none of it here
        if name is not None:
            if not is_hub_name(name) or "/" in name:
                raise CheckpointError(f"{name!r} is not a name for a model; use letters, digits, - _ and . only")
            names = {"name": name} | names
        lineage.base, lineage.published = base, lineage.published | names

    _lineage(folder)  # says what is wrong with a folder that has none
    return Lineage.update(folder, change)


def compose(card: Card, old: str | None, *, where: str = CARD, force: bool = False) -> str:
    """The text of a README.md: our newest sections, and theirs from the one that is there.

    Args:
        card (`Card`): What we say.
        old (`str`, *optional*): The README.md that is there.
        where (`str`, *optional*): What to call it in errors.
        force (`bool`, *optional*, defaults to `False`): Write over what was changed inside our sections.

    Returns:
        `str`: The whole file.

    Raises:
        CheckpointError: Somebody wrote inside our sections, or a mark is gone.
    """
    ours = regions.parse(card.body())
    fields, body = ({}, "") if old is None or is_generic(old) else metadata.front_matter(old, where)
    parts = regions.parse(body, where, strict=not force)
    edited = [str(part.region) for part in parts if part.edited]
    if edited and not force:
        raise CheckpointError(
            f"{where} was changed inside the section that hf-layerprune writes ({', '.join(edited)}); move your words "
            "outside its marks, where they are kept, or write over them with --force"
        )
    return metadata.to_yaml(metadata.merged(card.metadata, fields)) + "\n" + regions.merge(ours, parts)


def is_generic(text: str) -> bool:
    """Whether a card is a library's template that nobody has filled in."""
    from huggingface_hub import ModelCard, ModelCardData
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    template = ModelCard.from_template(ModelCardData())
    known = {line.strip() for line in template.text.splitlines()}
    lines = [line.strip() for line in REGEX_YAML_BLOCK.sub("", text, count=1).splitlines() if line.strip()]
    return len(lines) > 10 and all(line in known or _ADDED.fullmatch(line) for line in lines)


def write_card(folder: Path, *, force: bool = False, weights: bool = True) -> list[str]:
    """Write the card of a folder, and what belongs to it.

    Args:
        folder (`Path`): A model folder with `lineage.json`, and `metrics.json` if something was measured.
        force (`bool`, *optional*, defaults to `False`): Write over what was changed inside our sections.
        weights (`bool`, *optional*, defaults to `True`): Refuse records of other weights than the folder's.

    Returns:
        `list[str]`: The files that are new or changed, by their path in the folder.

    Raises:
        CheckpointError: See `read_card` and `compose`.
        LayerPruneError: matplotlib is missing, and with it the pictures.
    """
    for name in (ASSETS, EVAL_RESULTS):
        if (path := folder / name).is_symlink() or (path.exists() and not path.is_dir()):
            raise CheckpointError(f"{path} is a link or a file, and hf-layerprune writes a folder there; remove it")
    card = read_card(folder, weights=weights)
    readme = compose(card, read_text(folder / CARD), where=str(folder / CARD), force=force)
    changed = _draw(card, folder, force)
    changed += _notice(card, folder)
    changed += _eval_results(card, folder)
    # Last, so that it never shows what is not there.
    return changed + _write(folder, CARD, readme)


def read_text(path: Path) -> str | None:
    """A text that people write too, to the letter, so that writing it again loses nothing.

    Args:
        path (`Path`): The file.

    Returns:
        `str`, *optional*: The text; `None` where there is no such file.

    Raises:
        CheckpointError: It is a link, a folder or not UTF-8, or it can't be read.
    """
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise CheckpointError(
            f"{path} is a {'link' if path.is_symlink() else 'folder'}; put a file there, or remove it"
        )
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        return None
    except UnicodeDecodeError:
        text = "\0"
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {error.strerror or error}") from error
    if "\0" in text:
        raise CheckpointError(f"{path} is not UTF-8 text, so nothing can be added to it; save it as UTF-8")
    return text.replace("\r\n", "\n")


def _write(folder: Path, name: str, text: str) -> list[str]:
    path = folder / name
    if read_text(path) == text:
        return []
    path.parent.mkdir(exist_ok=True)
    write_text(path, text, inside=folder)
    return [name]


def _draw(card: Card, folder: Path, force: bool) -> list[str]:
    """Draw what is missing or was drawn from other records, and remove what can no longer be drawn."""
    assets = folder / ASSETS
    changed: list[str] = []
    wanted, digest = card.pictures, card.digest
    assets.mkdir(exist_ok=True)
    for name in PICTURES:
        path = assets / f"{name}.png"
        drawn_from = stamped(path)
        if (path.is_symlink() or (path.exists() and drawn_from is None)) and not force:
            raise CheckpointError(f"{path} was not drawn by hf-layerprune; move it away, or replace it with --force")
        if name in wanted and drawn_from != digest:
            with tempfile.TemporaryDirectory(dir=assets, prefix=".drawing-") as place:
                new = Path(place, path.name)
                wanted[name](new)
                stamp(new, digest)
                write_bytes(path, new.read_bytes(), inside=folder)
        elif name not in wanted and path.is_file():
            path.unlink()
        else:
            continue
        changed.append(f"{ASSETS}/{name}.png")
    return changed


def _notice(card: Card, folder: Path) -> list[str]:
    """The file that some licences ask for, with their sentence and with what was changed."""
    sentence = card.licence.row.notice if card.licence.row else None
    if sentence is None:
        return []
    present = [path for path in folder.iterdir() if path.is_file() and is_licence_file(path.name)]
    notices = [path for path in present if path.name.upper().startswith(NOTICE)]
    if any(sentence in (read_text(path) or "") for path in notices):
        return []
    name = notices[0].name if notices else NOTICE
    before = (read_text(folder / name) or "").rstrip("\n")
    gone = len(card.history.dropped)
    base = card.history.base_on_hub or card.history.base_id
    made = f"This model is a modified copy of {base}: {gone} of its decoder layers were removed."
    return _write(folder, name, "\n\n".join(part for part in (before, sentence, made) if part) + "\n")


def _eval_results(card: Card, folder: Path) -> list[str]:
    wanted = metadata.eval_files(card.results)
    place, changed = folder / EVAL_RESULTS, []
    present = {f"{EVAL_RESULTS}/{path.name}": path for path in (place.glob("*.yaml") if place.is_dir() else ())}
    theirs = {name for name, path in present.items() if not path.is_file() or not is_our_result(path)}
    for name in sorted(present.keys() - wanted.keys() - theirs):
        present[name].unlink()
        changed.append(name)
    for name in wanted.keys() - theirs:
        changed += _write(folder, name, EVAL_MARK + wanted[name])
    return changed


def is_our_result(path: Path) -> bool:
    """Whether a result for the Hub's leaderboards was written here, and not by somebody else."""
    with path.open("rb") as file:
        return file.read(len(EVAL_MARK)) == EVAL_MARK.encode()
