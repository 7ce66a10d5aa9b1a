"""Writing the card of a folder: README.md, its pictures, the licence's notice, and results for the Hub's leaderboards.

    write_card(folder)

README.md keeps what people wrote around our marks, and the YAML fields that they added.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ...errors import CheckpointError
from ...files.copy import write_text
from ...records.declared import CARD, front_matter
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
# Cards that a library has made of its template say nothing that anybody wrote.
_GENERIC = ("# Model Card for Model ID", "[More Information Needed]")


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
        raise CheckpointError(f"{folder} is no folder; name a model folder that hf-layerprune prune has written")
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
        CheckpointError: The folder has no lineage, the base is no Hub id, or the name can't be one on the Hub.
    """
    from ...records.names import base_name, is_hub_name

    lineage = _lineage(folder)
    base, before = dict(lineage.base), (lineage.base, lineage.published)
    told = {"license": license, "license_name": license_name, "license_link": license_link}
    if license is not None:  # another licence, so the old one's name and link go
        base = {name: value for name, value in base.items() if name not in told}
    base |= {name: value for name, value in told.items() if value}
    if base_model is not None:
        if not is_hub_name(base_model):
            raise CheckpointError(f"{base_model!r} is no Hub id; name the base as org/name")
        if not base.get("commit"):
            base |= {"id": base_name(base), "hub_id": base_model}
        elif base_model != base.get("id"):
            raise CheckpointError(f"the base is {base['id']} at commit {base['commit'][:12]}, not {base_model}")
    if published and published.get("repo_id") != lineage.published.get("repo_id"):
        lineage.published = {}  # a Space of the model elsewhere is none of it here
    if name is not None:
        if not is_hub_name(name) or "/" in name:
            raise CheckpointError(f"{name!r} is no name for a model; use letters, digits, - _ and . only")
        published = {"name": name} | (published or {})
    lineage.base, lineage.published = base, lineage.published | (published or {})
    if (lineage.base, lineage.published) != before:
        lineage.write(folder)
    return lineage


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
    fields, body = ({}, "") if old is None or is_generic(old) else front_matter(old)
    try:
        parts = regions.parse(body, where)
    except CheckpointError:
        if not force:
            raise
        parts = []
    edited = [str(part.region) for part in parts if part.edited]
    if edited and not force:
        raise CheckpointError(
            f"{where} was changed inside the section that hf-layerprune writes ({', '.join(edited)}); move your words "
            "outside its marks, where they are kept, or write over them with --force"
        )
    return metadata.to_yaml(metadata.merged(card.metadata, fields)) + "\n" + regions.merge(ours, parts)


def is_generic(text: str) -> bool:
    """Whether a card is a template that nobody has filled in."""
    return all(mark in text for mark in _GENERIC) and text.count(_GENERIC[1]) > 10


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
    card = read_card(folder, weights=weights)
    readme = compose(card, _text(folder / CARD), where=str(folder / CARD), force=force)
    changed = _draw(card, folder)
    changed += _notice(card, folder)
    changed += _eval_results(card, folder)
    # Last, so that it never shows what is not there.
    return changed + _write(folder, CARD, readme)


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"could not read {path}: {error.strerror or error}") from error


def _write(folder: Path, name: str, text: str) -> list[str]:
    path = folder / name
    if _text(path) == text:
        return []
    path.parent.mkdir(exist_ok=True)
    write_text(path, text)
    return [name]


def _draw(card: Card, folder: Path) -> list[str]:
    """Draw what is missing or was drawn from other records."""
    assets = folder / ASSETS
    changed: list[str] = []
    wanted, digest = card.pictures, card.digest
    assets.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=assets, prefix=".drawing-") as place:
        for name, draw in wanted.items():
            new, path = Path(place, f"{name}.png"), assets / f"{name}.png"
            if stamped(path) != digest:
                draw(new)
                stamp(new, digest)
                os.replace(new, path)
                changed.append(f"{ASSETS}/{name}.png")
    for name in PICTURES:
        if name not in wanted and (assets / f"{name}.png").is_file():
            (assets / f"{name}.png").unlink()
            changed.append(f"{ASSETS}/{name}.png")
    return changed


def _notice(card: Card, folder: Path) -> list[str]:
    """The file that some licences ask for, with their sentence and with what was changed."""
    sentence = card.licence.row.notice if card.licence.row else None
    if sentence is None:
        return []
    present = [path for path in folder.iterdir() if path.is_file() and is_licence_file(path.name)]
    notices = [path for path in present if path.name.upper().startswith(NOTICE)]
    if any(sentence in (_text(path) or "") for path in notices):
        return []
    name = notices[0].name if notices else NOTICE
    before = (_text(folder / name) or "").rstrip("\n")
    gone = len(card.history.dropped)
    base = card.history.base_on_hub or card.history.base_id
    made = f"This model is a modified copy of {base}: {gone} of its decoder layers were removed."
    return _write(folder, name, "\n\n".join(part for part in (before, sentence, made) if part) + "\n")


def _eval_results(card: Card, folder: Path) -> list[str]:
    wanted = metadata.eval_files(card.results)
    place, changed = folder / EVAL_RESULTS, []
    for path in sorted(place.glob("*.yaml")) if place.is_dir() else ():
        name = f"{EVAL_RESULTS}/{path.name}"
        if name not in wanted and (_text(path) or "").startswith(EVAL_MARK):
            path.unlink()
            changed.append(name)
    for name, text in wanted.items():
        changed += _write(folder, name, EVAL_MARK + text)
    return changed
