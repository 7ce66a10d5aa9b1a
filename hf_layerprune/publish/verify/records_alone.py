"""Verify records without weights, as in the folder of a card, against the base and against each other."""

from __future__ import annotations

from dataclasses import replace

from ...errors import CheckpointError, LayerPruneError
from ...records.fingerprints import (
    CONFIG,
    Identity,
    base_of_adapter,
    holds_weights,
    identity_of,
    weights_hash,
)
from ...records.history import History
from ...records.lineage import FILE_NAME as LINEAGE
from ...records.lineage import Lineage
from ...records.metrics import FILE_NAME as METRICS
from ...records.metrics import Metrics
from ...versions import installed
from ..requests import VerifyRequest
from .outcome import BASE, Verified
from .places import Base, Place
from .rebuild import Expected, rebuild


def check_chain(lineage: Lineage, outcome: Verified) -> None:
    """Check that each stage started from the output of the previous one."""
    for before, after in zip(lineage.entries, lineage.entries[1:], strict=False):
        if after.get("input_weights") != before.get("weights"):
            text = f"{LINEAGE}: {after['stage']} did not start from the weights that {before['stage']} wrote"
            outcome.say(False, "lineage", text)


def find_base(place: Place, history: History, request: VerifyRequest, outcome: Verified) -> Base | None:
    """Find the base, and check that it is the one that a lineage names.

    Returns:
        `Base`, *optional*: `None` if it can't be found, which alone does not contradict the records.
    """
    try:
        source = Base.find(history, request, place)
    except LayerPruneError as error:
        outcome.say(False, BASE, str(error))
        outcome.without_base = True
        return None
    outcome.base = str(source)
    _check_base(source, history.lineage, outcome)
    here, then = str(installed("transformers")), (history.stages[0].entry.get("versions") or {}).get("transformers")
    if source.packed and then not in (None, here):
        text = f"transformers {here} unpacks it; {then} did so for the cut, and may have made another tokenizer of it"
        outcome.say(True, BASE, text)
    return source


def _check_base(source: Base, lineage: Lineage, outcome: Verified) -> None:
    """Check that a base is the one that a lineage names."""
    told = lineage.base.get("files") or {}
    if not any(holds_weights(name) for name in told):
        outcome.say(False, BASE, f"{LINEAGE} has no hashes of the base's weights")
    elif differ := source.differences(told):
        outcome.say(False, BASE, f"{source} is not the base that {LINEAGE} names: {', '.join(differ[:3])} differ")
    else:
        outcome.say(True, BASE, f"{source} is the one that {LINEAGE} names, by the hashes of its files")


def recorded_identity(lineage: Lineage, metrics: Metrics) -> Identity:
    """The identity of a model whose files are elsewhere, as the `weights` and `files` of its last stage record it.

    The base of an adapter is the one that its numbers name.
    """
    last = lineage.entries[-1]
    base = metrics.models.get(last["weights"], {}).get("identity", {}).get("base")
    return replace(identity_of(last["files"], base), weights=last["weights"])


def check_records_alone(place: Place, history: History, request: VerifyRequest, outcome: Verified) -> None:
    """Check records whose weights are elsewhere: what they say of the cut is derived from the base again."""
    outcome.without_weights = True
    check_chain(history.lineage, outcome)
    last = history.lineage.entries[-1]
    if not last.get("weights") or not last.get("files"):
        outcome.say(False, "files", f"{LINEAGE} does not record the weights, the config and other files; prune again")
        return
    check_metrics(place, history.lineage, outcome)
    source = find_base(place, history, request, outcome)
    if source is None:
        return
    try:
        if history.form == "model":
            expected = rebuild(history, source)
            _check_cut(history, expected, outcome)
            _check_files(history, expected, outcome)
        outcome.complete = True
    except LayerPruneError as error:
        outcome.say(False, BASE, str(error))


def check_metrics(place: Place, lineage: Lineage, outcome: Verified) -> None:
    """Check that the numbers belong to the model, or to the one that records without weights describe."""
    try:
        metrics = Metrics.of(place.folder)
        if metrics is None:
            return
        if place.hashes:
            top = {name: hashed for name, hashed in place.hashes.items() if "/" not in name or name.endswith(".jinja")}
            model = identity_of(top, base_of_adapter(place.folder) if place.is_adapter else None)
        else:
            model = recorded_identity(lineage, metrics)
        texts = [f"{METRICS} {text}"] if (text := metrics.mismatch(model, lineage)) else []
        outcome.say_all(
            "metrics",
            texts,
            f"{len(metrics.results)} numbers, of this model and its history; they are not measured again",
        )
    except CheckpointError as error:
        outcome.say(False, "metrics", str(error))


def _check_cut(history: History, expected: Expected, outcome: Verified) -> None:
    """Check the recorded hash of the plain cut's weights, where a single cut in one step leads to it."""
    cuts = [stage.entry for stage in history.stages if stage.name == "prune"]
    if len(cuts) != 1 or history.quantized is not None:
        outcome.say(True, "cut", "was made in several steps, which only the weights can show")
        return
    told = (cuts[0].get("repair") or {}).get("input_weights") or cuts[0]["weights"]
    found = weights_hash({name: {"sha256": sha256} for name, sha256 in expected.files.items()})
    if told == found:
        outcome.say(True, "cut", f"repeated from the base, it has the weights {found[:12]}, as {LINEAGE} says")
    else:
        outcome.say(
            False, "cut", f"repeated from the base, it has the weights {found[:12]}, and {LINEAGE} says {told[:12]}"
        )


def _check_files(history: History, expected: Expected, outcome: Verified) -> None:
    """Check the recorded hashes of the tokenizer, the chat template, ...; later stages write another config."""
    told = history.lineage.entries[-1]["files"]
    names = {name for name in told.keys() | expected.files.keys() if not holds_weights(name)} - {CONFIG}
    texts = [
        f"{LINEAGE} records another {name} than the cut leaves of the base's"
        for name in sorted(names)
        if told.get(name) != expected.files.get(name)
    ]
    outcome.say_all("files", texts, f"{len(names)} recorded hashes of other files are the base's")
