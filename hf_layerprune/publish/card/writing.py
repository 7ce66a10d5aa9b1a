"""Writes the card of a folder: README.md, its plots, the licence's notice, and results for the Hub's leaderboards.

    write_card(folder)

README.md keeps the text that people wrote around our marks, and the YAML fields that they added.
"""

from __future__ import annotations

import logging
import re
import shlex
from contextlib import nullcontext, suppress
from pathlib import Path

from ...errors import CheckpointError, boundary
from ...files import text_file
from ...files.copy import write_text
from ...records.declared import CARD, LICENCE_FIELDS, split_front_matter
from ...records.licences import NOTICE, TABLE, licence_files
from ...records.lineage import Lineage
from ...records.metrics import Metrics
from ...records.names import base_name, is_hub_name
from ..requests import CardRequest
from . import metadata, regions
from .render import Card
from .style import read_digest

logger = logging.getLogger(__name__)

ASSETS = "assets"
EVAL_RESULTS = ".eval_results"
# The plots that we draw and may remove again.
PICTURES = ("layers", "scores", "accuracy", "tradeoff", "curve")
EVAL_MARK = "# by hf-layerprune, from metrics.json\n"
# Text that libraries add to a card template that nobody has filled in.
_ADDED = re.compile(r"#+ Framework versions|- \w+ [\w.+]+|")
# What `_write_notice` writes.
_NOTICES = re.compile(
    rf"(?:{'|'.join(re.escape(row.notice) for row in TABLE.values() if row.notice)})\s+"
    r"This model is a modified copy of .+: \d+ of its decoder layers (?:was|were) removed\.(\n*)"
)


def read_card(folder: Path, *, weights: bool = True) -> Card:
    """Read the records of a folder.

    Raises:
        CheckpointError: There are no records, they contradict themselves, or, with `weights`, they belong to others than
            the folder's.
    """
    lineage, metrics = Lineage.load_required(folder), Metrics.load(folder)
    if weights and metrics is not None:
        metrics.check_belongs(folder, lineage)
    return Card.from_records(lineage, metrics)


def record_declarations(request: CardRequest, published: dict[str, str] | None = None) -> None:
    """Record what only the user knows: the base's licence or Hub id, or where the model is `published`.

    A Hub id replaces the path of a local base.

    Raises:
        CheckpointError: The folder has no lineage, the base is not a Hub id, or the name can't be one on the Hub.
    """
    licence = {name: value for name in LICENCE_FIELDS if (value := getattr(request, name))}
    named, folder = dict(published or {}), request.model
    if request.name is not None:
        if not is_hub_name(request.name) or "/" in request.name:
            raise CheckpointError(f"{request.name!r} is not a valid model name; use only letters, digits, - _ and .")
        named["name"] = request.name

    def change(lineage: Lineage) -> None:
        base, hub_id = dict(lineage.base), request.base_model
        if licence:  # the name and link of the old one no longer apply
            base = {name: value for name, value in base.items() if name not in LICENCE_FIELDS} | licence
        if hub_id is not None:
            if not is_hub_name(hub_id):
                raise CheckpointError(f"{hub_id!r} is not a Hub id; specify the base as org/name")
            if not base.get("commit"):
                _rename_base_in_commands(lineage, str(base.get("id")), base_name(base))
                base |= {"id": base_name(base), "hub_id": hub_id}
            elif hub_id != base.get("id"):
                raise CheckpointError(
                    f"the model was pruned from {base['id']} at commit {base['commit'][:12]}, not from {hub_id}; leave out "
                    "--base-model"
                )
        before = lineage.published.get("repo_id")
        if named.get("repo_id", before) != before:
            lineage.published = {}  # a Space that belongs to another repository
        lineage.base, lineage.published = base, lineage.published | named

    Lineage.load_required(folder)  # or else no lock file is made
    Lineage.update(folder, change)


def _rename_base_in_commands(lineage: Lineage, path: str, name: str) -> None:
    """Name the base in the recorded commands as in the history, which knows by it that they start from the base."""
    for entry in lineage.entries:
        with suppress(KeyError, ValueError):  # no command; or a text that is not a command line, which is kept
            words = [name if word == path else word for word in shlex.split(entry["command"])]
            entry["command"] = shlex.join(words)


def compose_card(card: Card, old: str | None, *, where: str = CARD, force: bool = False) -> str:
    """The text of README.md: our current sections, and the text of others from the existing file, if there is one.

    With `force`, changes inside our sections are overwritten. `where` names the file in errors.

    Raises:
        CheckpointError: Somebody edited our sections, or a mark is missing.
    """
    with boundary(f"{where} can't be made from lineage.json and metrics.json", "they were edited; restore them"):
        generated, ours = card.metadata, regions.parse(card.body())
    fields, body = ({}, "") if old is None or is_generic(old) else split_front_matter(old, where)
    parts = regions.parse(body, where, strict=not force)
    edited = [str(part.region) for part in parts if part.edited]
    if edited and not force:
        raise CheckpointError(
            f"{where} was changed inside a section that hf-layerprune writes ({', '.join(edited)}); move your text "
            "outside its marks, where it is kept, or overwrite it with --force"
        )
    licence, before = generated.get("license"), fields.get("license")
    if licence and before not in (None, licence):
        logger.info(
            "%s named the licence %s, which is now %s, as recorded (card --license changes it)", where, before, licence
        )
    return metadata.to_yaml(metadata.merge_metadata(generated, fields)) + "\n" + regions.merge(ours, parts)


def is_generic(text: str) -> bool:
    """Whether a card is a library's template that nobody has filled in."""
    from huggingface_hub import ModelCard, ModelCardData
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    template = ModelCard.from_template(ModelCardData())
    known = {line.strip() for line in template.text.splitlines()}
    lines = [line.strip() for line in REGEX_YAML_BLOCK.sub("", text, count=1).splitlines() if line.strip()]
    return len(lines) > 10 and all(line in known or _ADDED.fullmatch(line) for line in lines)


def write_card(folder: Path, *, force: bool = False, weights: bool = True) -> list[str]:
    """Write the card of a folder, with its plots, notice and result files; returns the files that are new or changed.

    With `force`, changes inside our sections are overwritten; with `weights`, records of other weights than the
    folder's are refused.

    Raises:
        CheckpointError: See `read_card` and `compose_card`.
        LayerPruneError: matplotlib, which draws the plots, is not installed.
    """
    for name in (ASSETS, EVAL_RESULTS):
        if (path := folder / name).is_symlink() or (path.exists() and not path.is_dir()):
            raise CheckpointError(f"{path} is a link or a file, but hf-layerprune needs a folder there; remove it")
    card = read_card(folder, weights=weights)
    readme = compose_card(card, read_text(folder / CARD), where=str(folder / CARD), force=force)
    changed = _draw(card, folder, force)
    changed += _write_notice(card, folder)
    changed += _write_eval_results(card, folder)
    # Last, so that it never refers to a missing file.
    return changed + _write(folder, CARD, readme)


def read_text(path: Path) -> str | None:
    """Read a text that people may have edited; `None` if it does not exist.

    Raises:
        CheckpointError: It is a link or not a file, is not UTF-8, or is unreadable.
    """
    if path.is_symlink():
        raise CheckpointError(f"{path} is a link; put the file itself there, or remove it")
    if not path.exists():
        return None
    text = text_file.read_text(path)
    if "\0" in text:  # UTF-16 without its mark
        raise CheckpointError(f"{path} is not UTF-8; convert it")
    return text


def _write(folder: Path, name: str, text: str) -> list[str]:
    path = folder / name
    if read_text(path) == text:
        return []
    path.parent.mkdir(exist_ok=True)
    write_text(path, text, inside=folder)
    return [name]


def _draw(card: Card, folder: Path, force: bool) -> list[str]:
    """Draw plots that are missing or outdated, and remove those that can no longer be drawn."""
    changed: list[str] = []
    wanted, digest = card.pictures, card.digest
    (folder / ASSETS).mkdir(exist_ok=True)
    for name in (f"{ASSETS}/{one}.png" for one in PICTURES):
        path, draw = folder / name, wanted.get(Path(name).stem)
        drawn_from = read_digest(path)
        if (path.is_symlink() or (path.exists() and drawn_from is None)) and not force:
            raise CheckpointError(f"{path} was not drawn by hf-layerprune; move it, or replace it with --force")
        if draw is not None and drawn_from != digest:
            with boundary(f"{path} can't be drawn from lineage.json and metrics.json"):
                draw(path, digest)
        elif draw is None and path.is_file():
            path.unlink()
        else:
            continue
        changed.append(name)
    return changed


def _write_notice(card: Card, folder: Path) -> list[str]:
    """Write what the licence requires into the NOTICE file, in place of what another one did; other text is kept."""
    sentence, count = card.licence.row.notice if card.licence.row else None, len(card.history.dropped)
    base = card.history.base_on_hub or card.history.base_id
    change = f"This model is a modified copy of {base}: {count} of its decoder layers {'was' if count == 1 else 'were'} removed."
    ours = f"{sentence}\n\n{change}" if sentence else ""
    before: dict[str, str] = {}
    for path in licence_files(folder):
        if path.name.upper().startswith(NOTICE) and path.suffix.lower() != ".pdf":
            with nullcontext() if sentence else suppress(CheckpointError):
                before[path.name] = read_text(path) or ""
    after = {name: _NOTICES.sub(lambda old: ours and ours + old[1], text) for name, text in before.items()}
    if sentence and not any(sentence in text for text in after.values()):
        name = next(iter(after), NOTICE)
        after[name] = f"{after.get(name, '').rstrip()}\n\n{ours}"
    changed = [name for name, text in after.items() if text != before.get(name)]
    for name in changed:
        if text := after[name].strip("\n"):
            _write(folder, name, f"{text}\n")
        else:
            (folder / name).unlink()
    return changed


def _write_eval_results(card: Card, folder: Path) -> list[str]:
    wanted = metadata.eval_files(card.results)
    results, changed = folder / EVAL_RESULTS, []
    present = {f"{EVAL_RESULTS}/{path.name}": path for path in (results.glob("*.yaml") if results.is_dir() else ())}
    theirs = {name for name, path in present.items() if not path.is_file() or not is_our_result(path)}
    for name in sorted(present.keys() - wanted.keys() - theirs):
        present[name].unlink()
        changed.append(name)
    for name in sorted(wanted.keys() - theirs):
        changed += _write(folder, name, EVAL_MARK + wanted[name])
    return changed


def is_our_result(path: Path) -> bool:
    """Whether this package wrote a result file for the Hub's leaderboards."""
    with path.open("rb") as file:
        return file.read(len(EVAL_MARK)) == EVAL_MARK.encode()
