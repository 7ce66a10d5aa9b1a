"""`verify`: prove that a model follows from its base and its `lineage.json`, file by file and tensor by tensor.

    outcome = verify(VerifyRequest("someone/SmolLM2-135M-Instruct-23L"))
    print(outcome.verdict, [line.text for line in outcome.lines])

The cut is repeated from the base, and the resulting files are hashed. A file with the same hash in the model is proven
as a whole, and is not downloaded if it is on the Hub. Other weight files are compared tensor by tensor. Tensors that a
repair or training changed can't be derived again, so they are counted separately and only covered by the hash of the
weights that their stage recorded. Of records without a model, the verdict says that they are only that.
"""

from __future__ import annotations

import json
from typing import Any

from ...errors import CheckpointError, LayerPruneError
from ...families import MARKER
from ...files.json_file import read_object
from ...files.shards import INDEX
from ...layer_ranges import format_layers, name_layers
from ...options import plural
from ...records.declared import CARD
from ...records.fingerprints import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, holds_weights, weights_hash
from ...records.history import History, Stage, read_history
from ...records.lineage import FILE_NAME as LINEAGE
from ...records.lineage import Lineage
from ...records.metrics import Metrics
from ...records.quantized import describe_quantization, is_repeatable_method
from ...runtime.config_file import read_config_file
from ...runtime.loading import load_config
from ..card.render import Card
from ..card.writing import compose, read_text
from ..requests import VerifyRequest
from .adapter_fields import adapter_differences, base_difference
from .outcome import BASE, Verified
from .places import Base, Place
from .rebuild import Expected, rebuild
from .records_alone import check_chain, check_metrics, check_records_alone, find_base
from .tensors import check_tensors, stored_tensors, weight_files

_TIED = "tie_word_embeddings"
# Fields that are set on saving, and the marker of the cut, which is checked separately; none affects the outputs.
_VOLATILE = {"_name_or_path", "transformers_version", "use_cache", MARKER}
TOKENIZER = "tokenizer_config.json"
# Old names of fields, which a loader reads if the new one is absent.
_OLD_NAMES = {"torch_dtype": "dtype", "rope_theta": "rope_parameters", "rope_scaling": "rope_parameters"}
_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def verify(request: VerifyRequest) -> Verified:
    """Verify a model against its base.

    Raises:
        CheckpointError: The model does not exist or can't be read.
    """
    place = Place.open(request)
    outcome = Verified(place.name, accept_trained=request.accept_trained)
    try:
        lineage = Lineage.required(place.folder, place.name)
        history = read_history(lineage)
        quantized = history.quantized
    except CheckpointError as error:
        outcome.say(False, "lineage", f"{error}{_hint(place, None)}")
        return outcome
    done = ", ".join(stage.name for stage in history.stages)
    if history.dtype is not None:
        done += f", converted to {history.dtype}"
    dropped = name_layers(history.dropped) if history.dropped else "no layers"
    outcome.say(
        True, "lineage",
        f"{history.base_id}: {dropped} of {history.num_base_layers} dropped, {len(history.kept)} left ({done})",
    )  # fmt: skip
    if quantized is not None:
        told = quantized.settings["quantization_config"]
        how = "whose bytes can be repeated" if is_repeatable_method(told) else "whose bytes can't be repeated"
        outcome.say(True, "lineage", f"quantised: {describe_quantization(told)}, {how}")
    if not place.hashes:
        check_records_alone(place, history, request, outcome)
        return outcome
    _check_records(place, lineage, outcome, _hint(place, quantized))
    check_metrics(place, lineage, outcome)
    _check_card(place, lineage, outcome)
    source = find_base(place, history, request, outcome)
    if source is None:
        return outcome
    try:
        expected = rebuild(history, source)
        if place.is_adapter:
            _check_adapter(place, history, source, expected, outcome)
        else:
            _check_config(place, history, expected, outcome)
    except LayerPruneError as error:
        outcome.say(False, BASE, str(error))
        return outcome
    try:
        _check_files(place, expected, outcome)
        check_tensors(place, history, expected, outcome)
        outcome.complete = True
    except LayerPruneError as error:
        outcome.say(False, "tensors", str(error))
    return outcome


def _hint(place: Place, quantized: Stage | None) -> str:
    """The way out where a model was quantised and its history does not say so."""
    if quantized is not None or CONFIG not in place.hashes:
        return ""
    if read_config_file(place.path(CONFIG)).get("quantization_config") is None:
        return ""
    return "; if it was quantised since, say from what: hf_layerprune.record_quantized(BEFORE, QUANTISED)"


def _check_records(place: Place, lineage: Lineage, outcome: Verified, hint: str) -> None:
    """Check that the files are those of the last stage, and that each stage started from the output of the previous one."""
    top = {name: {"sha256": sha256} for name, sha256 in place.hashes.items() if "/" not in name}
    own = weights_hash(top)
    last = lineage.entries[-1] if lineage.entries else {}
    if last.get("weights") == own:
        outcome.say(True, "weights", f"their hash is {own[:12]}, as {LINEAGE} says")
    else:
        says = f"{LINEAGE} says {str(last.get('weights'))[:12]}: they were changed since, or it was"
        outcome.say(False, "weights", f"their hash is {own[:12]}, and {says}{hint}")
    check_chain(lineage, outcome)
    recorded = last.get("files")
    if recorded is None:
        outcome.say(
            False, "files", f"{LINEAGE} does not record the config, the tokenizer and other files; prune again"
        )
        return
    here = {name: sha256 for name, sha256 in place.hashes.items() if not holds_weights(name)}
    changed = sorted(name for name in recorded.keys() | here.keys() if recorded.get(name) != here.get(name))
    texts = [
        f"{name} {'is missing' if name not in here else 'was added' if name not in recorded else 'was changed'} since "
        f"{last['stage']} wrote the model"
        for name in changed
    ]
    outcome.say_all("files", texts, f"besides the weights, {plural(len(here), 'file')} as {last['stage']} wrote them")


def _check_card(place: Place, lineage: Lineage, outcome: Verified) -> None:
    """Say whether the card is the one that the records give; other versions of this package word it differently."""
    if not (place.folder / CARD).is_file() and (place.repo is None or CARD not in place.repo.files):
        return
    try:
        text = read_text(place.path(CARD))
        same = text == compose(Card.of(lineage, Metrics.of(place.folder)), text)
    except LayerPruneError:
        same = False
    if same:
        outcome.say(
            True, "card", f"{CARD} shows what the records say; text outside its generated sections was not checked"
        )
    else:
        text = (
            f"{CARD} is not what this version of hf-layerprune makes of the records; nothing that it says was checked"
        )
        outcome.say(None, "card", text)


def _check_cut(told: dict[str, Any], name: str, history: History, outcome: Verified) -> None:
    """Check that a config records the last cut: the dropped layers, and the number of layers before it."""
    last = [stage for stage in history.stages if stage.name == "prune"][-1]
    wanted, of = sorted(last.settings["drop_layers"]), (last.entry.get("layers") or {}).get("base")
    dropped = told.get("drop_layers")
    if (dropped, told.get("num_base_layers")) == (wanted, of):
        outcome.say(True, "config", f"{name} and {LINEAGE} agree on the cut")
        return
    what = "nothing"
    if isinstance(dropped, list) and all(isinstance(layer, int) for layer in dropped):
        what = f"{name_layers(dropped)} of {told.get('num_base_layers')}"
    text = (
        f"{name} says that the cut dropped {what}, and {LINEAGE} says {format_layers(wanted)} of {of}: one was edited"
    )
    outcome.say(False, "config", text)


def _check_config(place: Place, history: History, expected: Expected, outcome: Verified) -> None:
    """Check that the config is that of the repeated cut: an edited config makes another model of the same weights."""
    if CONFIG not in place.hashes:
        outcome.say(
            False, "config", f"{place.name} has no {CONFIG}, so it is not a whole model; complete the download"
        )
        return
    raw, loaded = read_config_file(place.path(CONFIG)), load_config(place.folder)
    mark = raw.get(MARKER) or {}
    _check_cut(mark, CONFIG, history, outcome)
    has, was = loaded.to_dict(), expected.config
    if any(name.endswith("lm_head.weight") for name in history.changed()):
        was = _untied_where(was, has)  # the head was untied and trained
    differ = {name for name in (was.keys() | has.keys()) - _VOLATILE if not _alike(was.get(name), has.get(name))}
    types = {_DTYPES.get(tensor.dtype) for tensor in expected.tensors.values()}
    if expected.config.get("dtype") is None and types == {has.get("dtype")}:
        differ.discard("dtype")  # saving a model records the dtype of its weights
    texts = [f"{name} is {has.get(name)!r} and was {expected.config.get(name)!r}"[:200] for name in sorted(differ)]
    told = json.loads(loaded.to_json_string(use_diff=False))
    hidden = [name for name in _hidden(raw, told, expected.raw_config) if name.partition(".")[0] not in differ]
    hidden += [f"{MARKER}.{name}" for name in sorted(mark.keys() - {"drop_layers", "num_base_layers"})]
    texts += [f"{CONFIG} sets {name[:150]}, which is not in what the cut leaves of the base's" for name in hidden]
    majors = [str(part.get("transformers_version")).partition(".")[0] for part in (raw, expected.raw_config)]
    settings = read_object(place.path(TOKENIZER)) if TOKENIZER in place.hashes else {}
    if settings.get("fix_mistral_regex") and majors[0] != majors[1]:  # fixed only for models of transformers before 5
        texts.append(f"transformers_version is {majors[0]} and was {majors[1]}, which changes the tokenizer")
    outcome.say_all("config", texts, f"{CONFIG} is what the cut leaves of the base's")


def _untied_where(fields: dict[str, Any], has: dict[str, Any]) -> dict[str, Any]:
    """The fields of a config, with the head untied in each section in which another config unties it."""
    sections = {name: _untied_where(value, has[name]) for name, value in fields.items()
                if isinstance(value, dict) and isinstance(has.get(name), dict)}  # fmt: skip
    untied = {_TIED: False} if has.get(_TIED) is False and fields.get(_TIED) else {}
    return fields | sections | untied


def _alike(one: Any, other: Any) -> bool:
    """Whether two values of a config are the same; a NaN equals itself."""
    return one == other or repr(one) == repr(other)


def _says_the_same(old: str, value: Any, told: dict[str, Any]) -> bool:
    """Whether a field with an old name says what the loaded config says: some loaders read only the old one."""
    new = told[_OLD_NAMES[old]]
    if value is None or not isinstance(new, dict):
        return value in (None, new)
    items = value if isinstance(value, dict) else {old: value}
    parts = [new, *(part for part in new.values() if isinstance(part, dict))]  # one for each type of layers
    parts = [{"type": part.get("rope_type")} | part for part in parts]
    return any(items.items() <= part.items() for part in parts)


def _hidden(raw: dict[str, Any], told: Any, expected: Any) -> list[str]:
    """The fields of a config's file, by dotted path, that are not in the file of the repeated cut, and that the loaded
    config does not hold with the same value: a loader may act on them, but a comparison of loaded configs misses them.
    """
    told, expected = (part if isinstance(part, dict) else {} for part in (told, expected))
    names = []
    for name, value in sorted(raw.items()):
        alike = any(name in part and _alike(part[name], value) for part in (told, expected))
        if (
            alike
            or name in _VOLATILE
            or (_OLD_NAMES.get(name) in told.keys() - raw.keys() and _says_the_same(name, value, told))
        ):
            continue
        if isinstance(value, dict) and isinstance(told.get(name), dict):
            names += [f"{name}.{inner}" for inner in _hidden(value, told[name], expected.get(name))]
        else:
            names.append(name)
    return names


def _check_adapter(place: Place, history: History, source: Base, expected: Expected, outcome: Verified) -> None:
    """Check that an adapter names this base, cut and method, and loads what the cut wrote."""
    fields = read_object(place.path(ADAPTER_CONFIG))
    _check_cut(fields, ADAPTER_CONFIG, history, outcome)
    told = history.lineage.base
    commit = fields.get("base_commit") or fields.get("revision")
    wrong = []
    if fields.get("peft_type") != "LAYER_DROP":
        wrong.append(f"is an adapter of the method {fields.get('peft_type')!r}, and not of LAYER_DROP")
    if text := base_difference(fields, history, source):
        wrong.append(text)
    if commit != told.get("commit"):
        wrong.append(f"names the base's commit {commit!r}, and {LINEAGE} says {told.get('commit')!r}")
    if fields.get("auto_mapping"):
        wrong.append("names custom classes for loading the base (auto_mapping)")
    if not wrong:
        names = [name for name, _ in stored_tensors(place, expected)]
        wrong = adapter_differences(fields, history, expected.config, names)
    outcome.say_all(
        "adapter",
        [f"{ADAPTER_CONFIG} {text}" for text in wrong],
        f"{ADAPTER_CONFIG} names this base, and loads this cut",
    )


def _check_files(place: Place, expected: Expected, outcome: Verified) -> None:
    """Check all other files against the repeated cut: tokenizer, chat template, generation settings, ..."""
    loaded = {ADAPTER_WEIGHTS, ADAPTER_CONFIG} if place.is_adapter else {CONFIG, *weight_files(place)}
    texts = []
    for name, sha256 in sorted(place.hashes.items()):
        if name in loaded or (name == INDEX and not place.is_adapter):
            continue
        if name not in expected.files or holds_weights(name):
            texts.append(f"{name} is not a file that the cut leaves, and may change how the model behaves; remove it")
        elif expected.files[name] != sha256:
            texts.append(f"{name} is not what the cut leaves of the base's")
    if not place.is_adapter:
        texts += [
            f"{name} is missing"
            for name in sorted(expected.files.keys() - place.hashes.keys())
            if not holds_weights(name) and name != INDEX
        ]
    if expected.lacked:
        text = f"{LINEAGE} says that the copy of the base that was cut lacked {', '.join(expected.lacked)}"
        outcome.say(None, "files", text[:300])
        outcome.lacked = expected.lacked
    others = len(place.hashes.keys() - loaded - {INDEX})
    outcome.say_all(
        "files",
        texts,
        f"{others} other file{'s are' if others > 1 else ' is'} the base's" if others else "there are no other files",
    )
