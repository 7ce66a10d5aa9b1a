"""The checks before a push. None of them contacts the Hub."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ...errors import CheckpointError, LayerPruneError
from ...files.json_file import read_object
from ...options import pluralize
from ...records.figures import numbers
from ...records.fingerprints import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    behaviour_hashes,
    fingerprint,
    has_tokenizer,
    is_model_file,
    weights_hash,
)
from ...records.history import read_history
from ...records.licences import DeclaredLicence, is_licence_text
from ...records.lineage import FILE_NAME as LINEAGE, Lineage
from ...records.metrics import FILE_NAME as METRICS, Metrics
from ...records.names import check_repository, is_gguf_name, is_hub_name, is_local
from ...runtime.config_file import read_config_file
from ..requests import PushRequest
from . import leaks
from .contents import Contents

OK, WARNING, REFUSAL = "ok", "warning", "refusal"
_MAX_LEAKS = 5  # reported in one run
Findings = Iterator[tuple[str, str]]  # levels and texts


@dataclass(frozen=True)
class Check:
    """The outcome of one check: `ok`, `warning` or `refusal`. The text of a refusal also says how to resolve it."""

    name: str
    level: str
    text: str


def run_checks(contents: Contents, request: PushRequest) -> list[Check]:
    """Check a folder before it is published. A check that fails to run is a refusal."""
    outcomes: list[Check] = []
    for name, check in _CHECKS.items():
        try:
            for level, text in check(contents, request):
                outcomes.append(Check(name, level, text))
        except (LayerPruneError, OSError) as error:
            outcomes.append(Check(name, REFUSAL, str(error)))
    refused = {one.name for one in outcomes if one.level == REFUSAL}
    return [one for one in outcomes if one.level != OK or one.name not in refused]


def _check_repository(contents: Contents, request: PushRequest) -> Findings:
    check_repository(request.repo_id)
    yield OK, request.repo_id


def _check_weights(contents: Contents, request: PushRequest) -> Findings:
    """Check that the weights are sound, complete, and as the last stage wrote them."""
    from ...cut.base import Base, read_weights
    from ...cut.header import read_header
    from ...families import layer_count
    from ...runtime.loading import load_config

    folder = contents.folder
    if not contents.weights:
        raise CheckpointError(f"{folder} has no weights; a card without weights is not published")
    if contents.is_adapter:
        used = {ADAPTER_WEIGHTS}
        read_header(folder / ADAPTER_WEIGHTS)
    else:
        used = set(read_weights(Base.open(folder)).headers)
    if stray := sorted(set(contents.weights) - used):
        yield REFUSAL, f"{stray[0]} is a weight file that the model does not use; remove it"
    lineage = Lineage.load_required(folder)
    last, own = lineage.entries[-1], weights_hash(fingerprint(folder))
    if last.get("weights") != own:
        raise CheckpointError(
            f"the weights ({own[:12]}) are not those in {LINEAGE} ({str(last.get('weights'))[:12]}), so they were "
            "changed later; make them again, or record the change as a stage"
        )
    if not contents.is_adapter and layer_count(load_config(folder)) != len(read_history(lineage).kept):
        raise CheckpointError(f"config.json and {LINEAGE} disagree on the number of layers; one of them was edited")
    yield from _check_other_files(contents, last, request.include)
    size = numbers.format_size(sum(contents.files[name] for name in contents.weights))
    yield (
        OK,
        f"{size} in {pluralize(len(contents.weights), 'file')}, as the stage {last.get('stage')} wrote them ({own[:12]})",
    )


def _check_other_files(contents: Contents, last: dict[str, Any], named: Collection[str]) -> Findings:
    """Check that the config, the tokenizer and so on are as the last stage wrote them."""
    here: dict[str, str] = behaviour_hashes(contents.folder)
    recorded: dict[str, str] = last.get("files", here)
    for name in sorted(here.keys() | recorded.keys()):
        if here.get(name) == recorded.get(name):
            continue
        what = "is missing" if name not in here else "was added" if name not in recorded else "was changed"
        text = f"{name} {what} since {last.get('stage')} wrote the model, so verify would say NO"
        if name in contents.left_out:
            yield (
                REFUSAL,
                f"{name} is a file of the model that {last.get('stage')} wrote; publish it with --include {name}",
            )
        elif name in named and name in here:
            yield WARNING, text
        elif name in here:
            undo = "restore it" if name in recorded else "remove it"
            yield REFUSAL, f"{text}; {undo}, or publish it as it is with --include {name}"
        else:
            yield REFUSAL, f"{text}; restore it"


def _check_metrics(contents: Contents, request: PushRequest) -> Findings:
    metrics = Metrics.load(contents.folder)
    if metrics is None:
        yield WARNING, f"there is no {METRICS}: the card will say that nothing was measured (hf-layerprune eval)"
        return
    try:
        metrics.check_belongs(contents.folder, Lineage.load_required(contents.folder))
    except CheckpointError as error:
        if stray := next(filter(is_model_file, contents.left_out), None):
            raise CheckpointError(
                f"{METRICS} does not belong to the model that would be published, which lacks {stray}: remove that file and "
                "measure again, or publish it with --include"
            ) from error
        raise
    yield OK, f"{len(metrics.results)} numbers, all measured on this model, its earlier stages or its base"


def _check_requirements(contents: Contents, request: PushRequest) -> Findings:
    metrics = Metrics.load(contents.folder)
    for outcome in metrics.outcomes if metrics else ():
        if outcome.met:
            yield OK, outcome.text
        elif request.allow_miss:
            yield WARNING, f"{outcome.text}; the card says so"
        else:
            yield REFUSAL, f"{outcome.text}; improve the model, or publish it all the same with --allow-miss"


def _check_base(contents: Contents, request: PushRequest) -> Findings:
    base = Lineage.load_required(contents.folder).base
    if is_local(base):
        text = (
            f"{LINEAGE} names the base by a path on your disk, {base['id']}, which is of no use to others; "
            "specify its Hub id: hf-layerprune card MODEL --base-model ORG/NAME"
        )
        yield REFUSAL, text
    if contents.is_adapter:
        name = str(read_object(contents.folder / ADAPTER_CONFIG).get("base_model_name_or_path"))
        if is_gguf_name(name) or not is_hub_name(name) or Path(name).exists():
            way = "make the adapter from the base's Hub id"
            if is_gguf_name(name):  # which no Hub id names
                way = "publish a whole model instead, made without --adapter"
            raise CheckpointError(f"{ADAPTER_CONFIG} names the base {name!r}, which nobody else can load; {way}")


def _check_licence(contents: Contents, request: PushRequest) -> Findings:
    licence = DeclaredLicence.from_base(Lineage.load_required(contents.folder).base)
    row, at = licence.row, f" ({licence.link})" if licence.link else ""
    namespace, _, name = request.repo_id.rpartition("/")
    if not licence.known:
        text = (
            "the base declares no licence, or several, so it is unclear what this model may be used for; find out and record it: "
            "hf-layerprune card MODEL --license apache-2.0 (or --license other --license-name N --license-link URL)"
        )
        yield WARNING if request.private else REFUSAL, text
        return
    if row is None:
        yield WARNING, f"{licence.title}: its conditions are not listed here; read it{at}"
        return
    if row.forbidden:
        raise CheckpointError(f"{row.title}: {row.forbidden}{at}")
    if row.prefix and not name.replace("-", " ").startswith(row.prefix):  # a name on the Hub has no spaces
        text = (
            f"{row.title}: the model's name must begin with “{row.prefix}”, and {name!r} does not; push it to "
            f"{namespace}/{row.prefix.replace(' ', '-')}-..."
        )
        yield REFUSAL, text
    if not any(map(is_licence_text, contents.files)):
        text = f"a copy of it must accompany the model, and there is none; put it into the folder as LICENSE{at}"
        yield REFUSAL if row.needs_text and not request.private else WARNING, f"{row.title}: {text}"
    if row.non_commercial:
        yield WARNING, f"{row.title}: no commercial use, neither by you nor by users of the model"
    yield OK, row.title


def _check_secrets(contents: Contents, request: PushRequest) -> Findings:
    secrets = list(islice(leaks.find_secrets(contents.folder, contents.files, request.include), _MAX_LEAKS))
    for leak in secrets:
        what = f"contains what looks like a secret ({leak.what}); remove it, and revoke it if it is real"
        yield REFUSAL, f"{leak.file} line {leak.line} {what}"
    yield OK, f"no secrets in {pluralize(len(contents.files), 'file')}"  # shown only if nothing was refused
    for leak in leaks.find_paths(contents.folder, contents.files):
        yield WARNING, f"{leak.file} line {leak.line} reveals {leak.what}"


def _check_loading(contents: Contents, request: PushRequest) -> Findings:
    """Check that others can load the model."""
    if contents.is_adapter:
        return
    if not has_tokenizer(contents.files):
        yield WARNING, "the folder has no tokenizer, so others can give the model only token ids"
    if code := [name for name in contents.files if name.endswith(".py")]:
        yield WARNING, f"{code[0]} is code, which runs only with trust_remote_code"
    config = read_config_file(contents.folder / CONFIG)
    yield OK, f"{config['model_type']}, {', '.join(config.get('architectures') or ['no class named'])}"


_CHECKS: dict[str, Callable[[Contents, PushRequest], Findings]] = {
    "repository": _check_repository,
    "weights": _check_weights,
    "metrics": _check_metrics,
    "requirements": _check_requirements,
    "base": _check_base,
    "licence": _check_licence,
    "secrets": _check_secrets,
    "loading": _check_loading,
}
