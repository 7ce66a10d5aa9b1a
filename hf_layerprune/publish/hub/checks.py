"""The checks before a push. None of them contacts the Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from ...cut.folder import read_json
from ...errors import LayerPruneError
from ...records.figures import numbers
from ...records.fingerprints import fingerprint, weights_hash
from ...records.licences import NOTICE, LicenceFound, is_licence_file
from ...records.lineage import FILE_NAME as LINEAGE
from ...records.lineage import Lineage
from ...records.metrics import Metrics
from ...records.names import is_hub_name, is_local
from ...runtime.config_file import read_config_file
from ..card.render import Card
from . import leaks
from .contents import ADAPTER_CONFIG, ADAPTER_WEIGHTS, METRICS, Contents

OK, WARNING, REFUSAL = "ok", "warning", "refusal"
_MOST_LEAKS = 5  # reported in one run


@dataclass(frozen=True)
class Check:
    """The outcome of one check.

    Args:
        name (`str`): The name of the check.
        level (`str`): `ok`, `warning` or `refusal`.
        text (`str`): The finding; for a refusal, also how to resolve it.
    """

    name: str
    level: str
    text: str


@dataclass(frozen=True)
class Publication:
    """What to publish, and where.

    Args:
        contents (`Contents`): The files.
        repo_id (`str`): The repository.
        private (`bool`): Whether the repository is private.
    """

    contents: Contents
    repo_id: str
    private: bool

    @property
    def folder(self) -> Path:
        """The folder with the files."""
        return self.contents.folder


def run_checks(publication: Publication) -> list[Check]:
    """Check a folder before it is published.

    Args:
        publication (`Publication`): What to publish, and where.

    Returns:
        `list[Check]`: All outcomes. A check that fails to run is a refusal.
    """
    outcomes: list[Check] = []
    for name, check in _CHECKS.items():
        try:
            outcomes += [Check(name, level, text) for level, text in check(publication)]
        except (LayerPruneError, OSError) as error:
            outcomes.append(Check(name, REFUSAL, str(error)))
    return outcomes


Outcome = Iterator[tuple[str, str]]


def _repository(publication: Publication) -> Outcome:
    if "/" not in publication.repo_id or not is_hub_name(publication.repo_id):
        yield REFUSAL, f"{publication.repo_id!r} is not a valid repository name; write it as NAMESPACE/NAME"
    else:
        yield OK, publication.repo_id


def _weights(publication: Publication) -> Outcome:
    """Check that the weights are sound, complete, and as the last stage wrote them."""
    from ...cut.base import Base, read_weights
    from ...cut.header import read_header
    from ...cut.settings import read_config
    from ...families import layer_count

    contents, folder = publication.contents, publication.folder
    if not contents.weights:
        yield REFUSAL, f"{folder} has no weights; a card without weights is not published"
        return
    if contents.is_adapter:
        used = {ADAPTER_WEIGHTS}
        read_header(folder / ADAPTER_WEIGHTS)
    else:
        used = set(read_weights(Base.open(folder)).headers)
        if ADAPTER_CONFIG in contents.files:
            yield REFUSAL, f"{ADAPTER_CONFIG} is in the folder of a whole model, and loaders would apply it; remove it"
    if stray := sorted(set(contents.weights) - used):
        yield REFUSAL, f"{stray[0]} is a weight file that the model does not use; remove it"
    lineage = Lineage.of(folder)
    if lineage is None or not lineage.entries:
        yield REFUSAL, f"{folder} has no {LINEAGE}; only models written by hf-layerprune prune are published"
        return
    card = Card.of(lineage)
    own = weights_hash(fingerprint(folder))
    recorded = lineage.entries[-1].get("weights")
    if recorded != own:
        yield (
            REFUSAL,
            (
                f"the weights ({own[:12]}) are not those in {LINEAGE} ({str(recorded)[:12]}), so they were changed later; "
                "make them again, or record the change as a stage"
            ),
        )
    elif not contents.is_adapter and layer_count(read_config(folder)) != len(card.history.kept):
        yield REFUSAL, f"config.json and {LINEAGE} disagree on the number of layers; one of them was edited"
    else:
        size = numbers.size(sum(contents.files[name] for name in contents.weights))
        files = f"{len(contents.weights)} file{'s' * (len(contents.weights) > 1)}"
        yield OK, f"{size} in {files}, as the stage {lineage.entries[-1].get('stage')} wrote them ({own[:12]})"


def _metrics(publication: Publication) -> Outcome:
    metrics = Metrics.of(publication.folder)
    if metrics is None:
        yield WARNING, f"there is no {METRICS}: the card will say that nothing was measured (hf-layerprune eval)"
        return
    metrics.check_belongs(publication.folder, Lineage.of(publication.folder))
    yield OK, f"{len(metrics.results)} numbers, measured on these weights and earlier stages"


def _base(publication: Publication) -> Outcome:
    lineage = Lineage.of(publication.folder)
    if lineage is None:
        return
    if is_local(lineage.base):
        yield (
            REFUSAL,
            (
                f"{LINEAGE} names the base by a path on your disk, {lineage.base['id']}, which is of no use to others; "
                "name its Hub id: hf-layerprune card MODEL --base-model ORG/NAME"
            ),
        )
    if publication.contents.is_adapter:
        config = read_json(publication.folder / ADAPTER_CONFIG)
        name = str(config.get("base_model_name_or_path"))
        if not is_hub_name(name) or Path(name).exists():
            yield (
                REFUSAL,
                (
                    f"{ADAPTER_CONFIG} names the base {name!r}, which nobody else can load; make the adapter from the "
                    "base's Hub id"
                ),
            )


def _licence(publication: Publication) -> Outcome:
    lineage = Lineage.of(publication.folder)
    licence = LicenceFound.of(lineage.base if lineage else {})
    row, name = licence.row, publication.repo_id.rpartition("/")[2]
    if not licence.known:
        yield (
            WARNING if publication.private else REFUSAL,
            (
                "the base declares no licence, so it is unclear what this model may be used for; find out and record it: "
                "hf-layerprune card MODEL --license apache-2.0 (or --license other --license-name N "
                "--license-link URL)"
            ),
        )
        return
    if row is None:
        yield WARNING, f"{licence.title}: its conditions are not listed here; read it{_at(licence)}"
        return
    if row.forbidden:
        yield REFUSAL, f"{row.title}: {row.forbidden}{_at(licence)}"
        return
    if row.prefix and not name.startswith(row.prefix):
        yield (
            REFUSAL,
            (
                f"{row.title}: the model's name must begin with “{row.prefix}”, and {name!r} does not; push it to "
                f"{publication.repo_id.rpartition('/')[0]}/{row.prefix.replace(' ', '-')}-..."
            ),
        )
    files = [path for path in publication.contents.files if is_licence_file(path)]
    notices = [path for path in files if path.upper().startswith(NOTICE)]
    has_sentence = any(
        row.notice in publication.contents.path(path).read_text(errors="replace") for path in notices if row.notice
    )
    if row.notice and not has_sentence:
        yield (
            REFUSAL,
            f"{row.title}: a {NOTICE} file with the required sentence is missing; write it with hf-layerprune card MODEL",
        )
    texts = [path for path in files if path.upper().startswith(("LICENSE", "LICENCE"))]
    if not texts:
        yield (
            REFUSAL if row.needs_text and not publication.private else WARNING,
            (
                f"{row.title}: a copy of it must accompany the model, and there is none; put it into the folder as "
                f"LICENSE{_at(licence)}"
            ),
        )
    if row.non_commercial:
        yield WARNING, f"{row.title}: no commercial use, neither by you nor by users of the model"
    yield OK, row.title


def _at(licence: LicenceFound) -> str:
    return f" ({licence.link})" if licence.link else ""


def _secrets(publication: Publication) -> Outcome:
    contents = publication.contents
    secrets = list(islice(leaks.find_secrets(contents.folder, contents.files, contents.named), _MOST_LEAKS))
    for leak in secrets:
        yield (
            REFUSAL,
            (
                f"{leak.file} line {leak.line} contains what looks like a secret ({leak.what}); remove it, and revoke it "
                "if it is real"
            ),
        )
    if not secrets:
        yield OK, f"no secrets in {len(contents.files)} files"
    for leak in leaks.find_paths(contents.folder, contents.files):
        yield WARNING, f"{leak.file} line {leak.line} reveals {leak.what}"


def _loading(publication: Publication) -> Outcome:
    """Check that others can load the model."""
    files = publication.contents.files
    if publication.contents.is_adapter:
        return
    if not any(name.startswith("tokenizer") or name == "vocab.json" for name in files):
        yield WARNING, "there is no tokenizer, so the model needs that of its base"
    if code := [name for name in files if name.endswith(".py")]:
        yield WARNING, f"{code[0]} is code, which runs only with trust_remote_code"
    config = read_config_file(publication.folder / "config.json")
    yield OK, f"{config['model_type']}, {', '.join(config.get('architectures') or ['no class named'])}"


_CHECKS: dict[str, Callable[[Publication], Outcome]] = {
    "repository": _repository,
    "weights": _weights,
    "metrics": _metrics,
    "base": _base,
    "licence": _licence,
    "secrets": _secrets,
    "loading": _loading,
}
