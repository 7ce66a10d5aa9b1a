"""`verify`: prove that a model follows from its base and its `lineage.json`, file by file and tensor by tensor.

    outcome = verify(VerifyRequest("someone/SmolLM2-135M-Instruct-23L"))
    print(outcome.verdict, [line.text for line in outcome.lines])

The cut is repeated from the base, which says what every file, config field and tensor of the model must be; what differs
must be what a recorded stage changed. A file with the same hash in the model is proven as a whole, and is not downloaded
if it is on the Hub. Other weight files are compared tensor by tensor. Tensors that a repair or training changed can't be
derived again, so they are counted separately and only covered by the hash of the weights that their stage recorded. Of
records without a model, the verdict says that they are only that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

from ...errors import CheckpointError, LayerPruneError
from ...families import MARKER
from ...files.json_file import read_object
from ...files.shards import INDEX
from ...layer_ranges import describe_layers
from ...options import pluralize
from ...records.declared import CARD
from ...records.fingerprints import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    GENERATION,
    QUANTISERS,
    base_of_adapter,
    holds_weights,
    identity_from_hashes,
    weights_hash,
)
from ...records.history import History, read_history
from ...records.lineage import FILE_NAME as LINEAGE, Lineage
from ...records.metrics import FILE_NAME as METRICS
from ...records.quantized import describe_quantization, is_repeatable_method
from ...runtime.config_file import read_config_file
from ...runtime.loading import load_config
from ...runtime.tokenizer_version import TOKENIZER, needs_config, reads_another_tokenizer
from ...versions import installed_version
from ..card.render import Card
from ..card.writing import compose_card, read_text
from ..requests import VerifyRequest
from .adapters import adapter_differences, base_difference
from .fields import differences, unread_fields, unties
from .outcome import BASE, Verification
from .places import Base, ModelLocation
from .rebuild import Expected, TensorHash, inferred_dtype, rebuild
from .tensors import adapter_tensors, check_tensors, weight_files


def verify(request: VerifyRequest) -> Verification:
    """Verify a model against its base.

    Raises:
        CheckpointError: The model does not exist or can't be read.
    """
    model = ModelLocation.open(request.model, request.revision, request.token)
    outcome = Verification(model.name, accept_trained=request.accept_trained, without_weights=not model.hashes)
    part = "lineage"
    try:
        history = read_history(Lineage.load_required(model.folder, model.name))
        _report_lineage(history, outcome)
        _check_records(model, history, outcome)
        _check_metrics(model, history.lineage, outcome)
        _check_card(model, history.lineage, outcome)
        part, outcome.without_base = BASE, True
        source = Base.find(history, request, model)
        outcome.without_base, outcome.base = False, str(source)
        _check_base(source, history, outcome)
        if model.hashes or history.form == "model":
            again = model.is_adapter and sum(stage.name == "prune" for stage in history.stages) > 1
            if again:
                part = "adapter"
                history, source = _check_pruned_base(model, history, request, outcome)
            expected = rebuild(history, source)
            part, modules = "adapter" if model.is_adapter else "config", None
            if not model.hashes:
                _check_recorded_cut(history, expected, outcome)
            elif model.is_adapter:
                modules = _check_adapter(model, history, None if again else source, expected, outcome)
            else:
                _check_config(model, history, expected, outcome)
            part = "tensors"
            _check_files(model, history, expected, outcome)
            if model.hashes:
                check_tensors(model, history, expected, modules, outcome)
    except LayerPruneError as error:
        outcome.add(False, part, str(error))
    return outcome


def _report_lineage(history: History, outcome: Verification) -> None:
    """Report what the lineage says."""
    done = ", ".join(stage.name for stage in history.stages)
    if history.dtypes:
        done += f", converted to {', then '.join(history.dtypes)}"
    dropped = describe_layers(history.dropped) if history.dropped else "no layers"
    outcome.add(
        True, "lineage",
        f"{history.base_id}: {dropped} of {history.num_base_layers} dropped, {len(history.kept)} left ({done})",
    )  # fmt: skip
    if history.quantized is not None:
        settings = history.quantized.settings["quantization_config"]
        how = "whose bytes can be repeated" if is_repeatable_method(settings) else "whose bytes can't be repeated"
        outcome.add(True, "lineage", f"quantised: {describe_quantization(settings)}, {how}")


def _check_records(model: ModelLocation, history: History, outcome: Verification) -> None:
    """Check that each stage started from the output of the previous one, and that the files are those of the last."""
    entries = history.lineage.entries
    for before, after in pairwise(entries):
        if after.get("input_weights") != before.get("weights"):
            text = f"{LINEAGE}: {after['stage']} did not start from the weights that {before['stage']} wrote"
            outcome.add(False, "lineage", text)
    last = entries[-1]
    stage, recorded = last["stage"], last.get("files")
    if not last.get("weights") or recorded is None:
        raise CheckpointError(f"{LINEAGE} does not record the weights, the config and other files; prune again")
    if not model.hashes:
        return
    own = weights_hash({name: {"sha256": sha256} for name, sha256 in model.hashes.items()})
    if last["weights"] == own:
        outcome.add(True, "weights", f"their hash is {own[:12]}, as {LINEAGE} says")
    else:
        says = f"{LINEAGE} says {last['weights'][:12]}: they were changed since, or it was"
        says += (
            "" if history.quantized else "; if they were quantised, record that with hf_layerprune.record_quantized"
        )
        outcome.add(False, "weights", f"their hash is {own[:12]}, and {says}")
    here = {name: sha256 for name, sha256 in model.hashes.items() if not holds_weights(name)}
    texts = [
        f"{name} {'is missing' if name not in here else 'was added' if name not in recorded else 'was changed'} since "
        f"{stage} wrote the model"
        for name in sorted(recorded.keys() | here.keys())
        if recorded.get(name) != here.get(name)
    ]
    outcome.add_all("files", texts, f"besides the weights, {pluralize(len(here), 'file')} as {stage} wrote them")


def _check_metrics(model: ModelLocation, lineage: Lineage, outcome: Verification) -> None:
    """Check that the numbers belong to the model, or to the one that records without weights describe."""
    try:
        metrics = model.metrics()
        if metrics is None:
            return
        if model.hashes:
            top = {name: hashed for name, hashed in model.hashes.items() if "/" not in name or name.endswith(".jinja")}
            measured = identity_from_hashes(top, base_of_adapter(model.folder) if model.is_adapter else None)
        else:
            measured = metrics.recorded_identity(lineage)
        texts = [f"{METRICS} {text}"] if (text := metrics.mismatch(measured, lineage)) else []
    except CheckpointError as error:
        texts, metrics = [str(error)], None
    number = len(metrics.results) if metrics else 0
    outcome.add_all("metrics", texts, f"{number} numbers, of this model and its history; they are not measured again")


def _check_card(model: ModelLocation, lineage: Lineage, outcome: Verification) -> None:
    """Say whether the card is the one that the records give; other versions of this package word it differently."""
    if not model.has(CARD):
        return
    try:
        text = read_text(model.path(CARD).resolve())  # the Hub client's cache holds links
        same = text == compose_card(Card.from_records(lineage, model.metrics()), text)
    except LayerPruneError:
        same = False
    shows = f"{CARD} shows what the records say; text outside its generated sections was not checked"
    other = f"{CARD} is not what this version of hf-layerprune makes of the records; nothing that it says was checked"
    outcome.add(True if same else None, "card", shows if same else other)


def _check_base(source: Base, history: History, outcome: Verification) -> None:
    """Check that a base is the one that a lineage names."""
    recorded = history.lineage.base.get("files") or {}
    if not any(holds_weights(name) for name in recorded):
        outcome.add(False, BASE, f"{LINEAGE} has no hashes of the base's weights")
    elif differ := source.differences(recorded):
        outcome.add(False, BASE, f"{source} is not the base that {LINEAGE} names: {', '.join(differ[:3])} differ")
    else:
        outcome.add(True, BASE, f"{source} is the one that {LINEAGE} names, by the hashes of its files")
    here = str(installed_version("transformers"))
    then = (history.stages[0].entry.get("versions") or {}).get("transformers")
    if source.is_gguf and then not in (None, here):
        text = f"transformers {here} unpacks it; {then} did so for the cut, and may have made another tokenizer of it"
        outcome.add(True, BASE, text)


def _check_recorded_cut(history: History, expected: Expected, outcome: Verification) -> None:
    """Check the recorded hash of the plain cut's weights, where a single cut in one step leads to it."""
    cuts = [stage.entry for stage in history.stages if stage.name == "prune"]
    if len(cuts) != 1 or history.quantized is not None:
        outcome.add(True, "cut", "was made in several steps, which only the weights can show")
        return
    recorded = (cuts[0].get("repair") or {}).get("input_weights") or cuts[0]["weights"]
    found = weights_hash({name: {"sha256": sha256} for name, sha256 in expected.files.items()})
    says = f"as {LINEAGE} says" if recorded == found else f"and {LINEAGE} says {recorded[:12]}"
    outcome.add(recorded == found, "cut", f"repeated from the base, it has the weights {found[:12]}, {says}")


def _check_cut(recorded: Mapping[str, Any], name: str, history: History, outcome: Verification) -> None:
    """Check that a config records the last cut: the dropped layers, and the number of layers before it."""
    last = history.since_last_cut[0]
    wanted, of = sorted(last.settings.get("drop_layers") or ()), (last.entry.get("layers") or {}).get("base")
    dropped = recorded.get("drop_layers")
    if (dropped, recorded.get("num_base_layers")) == (wanted, of):
        outcome.add(True, "config", f"{name} and {LINEAGE} agree on the cut")
        return
    says = f"{name} says that the cut dropped {dropped} of {recorded.get('num_base_layers')}"[:300]
    says = says if recorded else f"{name} says nothing of the cut"
    outcome.add(False, "config", f"{says}, and {LINEAGE} says {wanted} of {of}: one was edited")


def _check_config(model: ModelLocation, history: History, expected: Expected, outcome: Verification) -> None:
    """Check that the config is that of the repeated cut: an edited config makes another model of the same weights."""
    if CONFIG not in model.hashes:
        text = f"{model.name} has no {CONFIG}, so it is not a whole model; complete the download"
        outcome.add(False, "config", text)
        return
    raw, loaded = read_config_file(model.path(CONFIG)), load_config(model.folder)
    mark = raw.get(MARKER) or {}
    _check_cut(mark, CONFIG, history, outcome)
    differ = differences(expected.config, loaded.to_dict())
    # An untied head has to be among the tensors, and is compared there.
    differ = {path: values for path, values in differ.items() if not unties(path, *values)}
    if differ.get(("dtype",)) == (None, inferred_dtype(expected.weights, expected.index)):
        del differ["dtype",]  # saving a model records the dtype in which it was loaded
    texts = [f"{'.'.join(path)} is {has!r} and was {was!r}"[:200] for path, (was, has) in differ.items()]
    seen = {path[0] for path in differ}
    extra = [path for path in unread_fields(raw, loaded, expected.raw_config) if path[0] not in seen]
    extra += [(MARKER, name) for name in sorted(mark.keys() - {"drop_layers", "num_base_layers"})]
    texts += [
        f"{CONFIG} sets {'.'.join(path)[:150]}, which is not in what the cut leaves of the base's" for path in extra
    ]
    if reads_another_tokenizer(raw, expected.raw_config, _tokenizer_settings(model)):
        versions = (fields.get("transformers_version") for fields in (raw, expected.raw_config))
        texts.append("transformers_version is {} and was {}, which changes the tokenizer".format(*versions))
    outcome.add_all("config", texts, f"{CONFIG} is what the cut leaves of the base's")


def _check_adapter(
    model: ModelLocation, history: History, source: Base | None, expected: Expected, outcome: Verification
) -> dict[str, TensorHash]:
    """Check that an adapter names its base, this cut and this method, and loads what the cut wrote. Returns its tensors.

    `source` is the base, unless it was found by the name that the adapter gives it.
    """
    config = read_object(model.path(ADAPTER_CONFIG))
    _check_cut(config, ADAPTER_CONFIG, history, outcome)
    text = None if source is None else base_difference(config, history, source)
    modules = adapter_tensors(model, expected)
    wrong = [text] if text else adapter_differences(config, history, expected, modules.keys())
    good = f"{ADAPTER_CONFIG} names this base, and loads this cut"
    outcome.add_all("adapter", [f"{ADAPTER_CONFIG} {text}" for text in wrong], good)
    return modules


def _check_pruned_base(
    model: ModelLocation, history: History, request: VerifyRequest, outcome: Verification
) -> tuple[History, Base]:
    """Verify the pruned model that an adapter is put on. Returns the history from then on, with that model as its base.

    Raises:
        CheckpointError: It is not what the stages before the adapter's cut made.
    """
    config = read_object(model.path(ADAPTER_CONFIG))
    name, revision = str(config.get("base_model_name_or_path")), config.get("revision")
    pruned = ModelLocation.open(name, revision, request.token)
    lineage, start = history.lineage, history.lineage.entries.index(history.since_last_cut[0].entry)
    if Lineage.load_required(pruned.folder, pruned.name).entries != lineage.entries[:start]:
        raise CheckpointError(
            f"{ADAPTER_CONFIG} names the base {name}, which is not the model that {LINEAGE} says was cut again"
        )
    found = verify(replace(request, model=name, revision=revision if pruned.repo else None))
    if not found.consistent or found.without_weights or found.base != outcome.base:
        raise CheckpointError(
            f"{ADAPTER_CONFIG} names the base {name}, which is not proven; see what is wrong: hf-layerprune verify {name}"
        )
    outcome.add(True, "adapter", f"is put on {name}, which is verified too")
    outcome.recorded.update(found.recorded)
    outcome.lacked, outcome.same = found.lacked, found.same
    return read_history(Lineage({}, lineage.entries[start:])), Base.of_model(pruned, request.token)


def _check_files(model: ModelLocation, history: History, expected: Expected, outcome: Verification) -> None:
    """Check all other files against the repeated cut: tokenizer, chat template, generation settings, ..."""
    here, checked = model.hashes, {CONFIG, INDEX}
    if not here:
        here = history.lineage.entries[-1]["files"]
    elif model.is_adapter:
        checked = {ADAPTER_WEIGHTS, ADAPTER_CONFIG}
    else:
        checked |= {*weight_files(model)[0]}
    if expected.quantizer is None and history.quantized and (settings := here.keys() & {*QUANTISERS}):
        outcome.add(None, "files", f"{', '.join(sorted(settings))}: of the quantiser, as {LINEAGE} records")
        checked |= settings
    wanted = {
        name: sha256 for name, sha256 in expected.files.items() if not holds_weights(name) and name not in checked
    }
    texts = []
    for name in sorted(here.keys() - checked):
        if name not in wanted:
            texts.append(f"{name} is not a file that the cut leaves, and may change how the model behaves; remove it")
        elif wanted[name] != here[name]:
            texts.append(f"there is another {name} than the cut leaves of the base's")
    others = len(here.keys() - checked)
    if others or not model.is_adapter:  # of some files alone, another tokenizer would be loaded than the base's
        unneeded = {CONFIG, GENERATION, INDEX} if model.is_adapter else set()
        texts += [f"{name} is missing" for name in sorted(wanted.keys() - here.keys() - unneeded)]
    if model.is_adapter and needs_config(expected.raw_config, _tokenizer_settings(model)):
        texts.append(f"{TOKENIZER} has fix_mistral_regex, which has no effect without the base's {CONFIG}")
    if expected.lacked:
        text = f"{LINEAGE} says that the copy of the base that was cut lacked {', '.join(expected.lacked)}"
        outcome.add(None, "files", text[:300])
        outcome.lacked = expected.lacked
    same = (
        f"{others} other file{'s are' if others > 1 else ' is'} the base's" if others else "there are no other files"
    )
    outcome.add_all("files", texts, same)


def _tokenizer_settings(model: ModelLocation) -> dict[str, Any]:
    return read_object(model.path(TOKENIZER)) if TOKENIZER in model.hashes else {}
