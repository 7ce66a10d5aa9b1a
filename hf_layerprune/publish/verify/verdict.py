"""`verify`: prove that a model's weights come from its base, by what its `lineage.json` says was done to them.

    found = verify("someone/SmolLM2-135M-Instruct-23L")
    print(found.good, [line.text for line in found.lines])

Every tensor that no stage says it changed has to be the base's, to the last bit. Of a model on the Hub nothing is
downloaded for it where the hash that the Hub lists can be computed from the base's bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ...cut.folder import read_json
from ...cut.settings import read_config
from ...errors import CheckpointError, LayerPruneError
from ...families import MARKER
from ...layer_ranges import format_layers
from ...records.figures import numbers
from ...records.fingerprints import weights_hash
from ...records.history import History, read_history
from ...records.lineage import FILE_NAME as LINEAGE
from ...records.lineage import Lineage
from ...records.metrics import FILE_NAME as METRICS
from ...records.metrics import Metrics
from ..hub.contents import ADAPTER_CONFIG
from .compare import Comparison, by_layer, compare, is_copy
from .places import Place, open_place
from .rebuild import Base, Reference, expected_config, open_reference

_MAX_LINES = 20
# What a reload or a conversion sets anew, or says of the cut itself.
_VOLATILE = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", MARKER}
_ADAPTER_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Line:
    """One finding.

    Args:
        good (`bool`): Whether it speaks for the model.
        what (`str`): What was looked at.
        text (`str`): What was found.
    """

    good: bool
    what: str
    text: str


@dataclass
class Verified:
    """The outcome.

    Args:
        name (`str`): The model.
        quick (`bool`): Whether tensors were left unread.
        lines (`list[Line]`): What was found.
        comparison (`Comparison`, *optional*): What became of the tensors.
    """

    name: str
    quick: bool
    lines: list[Line] = field(default_factory=list)
    comparison: Comparison | None = None

    @property
    def good(self) -> bool:
        """Whether the model is what it says."""
        return self.comparison is not None and all(line.good for line in self.lines)

    @property
    def verdict(self) -> str:
        """One line that says yes or no."""
        if not self.good:
            return f"NO: {self.name} is not proven to be what it says"
        if self.quick:
            return (
                f"YES, so far: headers and hashes of {self.name} agree; its tensors were not read (leave out --quick)"
            )
        return f"YES: {self.name} is what it says"

    def say(self, good: bool, what: str, text: str) -> None:
        """Note a finding."""
        self.lines.append(Line(good, what, text))


def verify(
    model: str | Path,
    *,
    base: str | None = None,
    revision: str | None = None,
    quick: bool = False,
    token: str | bool | None = None,
) -> Verified:
    """Hold a model against its base.

    Args:
        model (`str` or `Path`): A model folder, or a Hub id.
        base (`str`, *optional*): Where the base is, if not where the lineage says.
        revision (`str`, *optional*): Branch, tag or commit of a model on the Hub.
        quick (`bool`, *optional*, defaults to `False`): Headers and hashes only.
        token (`str` or `bool`, *optional*): As the client library takes it; by default the user's own.

    Returns:
        `Verified`: Whether the model is what it says, and why.

    Raises:
        CheckpointError: There is no such model, or it or its base can't be read.
    """
    place = open_place(model, revision, token)
    found = Verified(place.name, quick)
    history = _history(place, found)
    if history is None:
        return found
    weights = place.weights()
    own = weights_hash(weights)
    told = history.lineage.entries[-1].get("weights") if history.lineage.entries else None
    if told == own:
        found.say(True, "weights", f"their hash is {own[:12]}, as {LINEAGE} says")
    else:
        says = f"{LINEAGE} says {str(told)[:12]}: they were changed since, or it was"
        found.say(False, "weights", f"their hash is {own[:12]}, and {says}")
    _check_config(place, history, found)
    _check_metrics(place, history, own, found)
    try:
        source = Base.find(history, base, token)
    except CheckpointError as error:
        found.say(False, "base", str(error))
        return found
    _check_base(source, history, found)
    _check_fields(place, source, history, found)
    hashes = {name: entry["sha256"] for name, entry in weights.items()}
    try:
        headers = place.headers()
        with open_reference(history, source) as reference:
            rename, may_differ = _rules(place, history)
            found.comparison = compare(
                headers, hashes, reference, may_differ, history.kept, rename=rename, local=place.local, quick=quick
            )
            _tied(found.comparison, reference, quick)
    except LayerPruneError as error:
        found.say(False, "tensors", str(error))
        return found
    _tell(place, history, found, found.comparison, reference.made_again)
    return found


def _history(place: Place, found: Verified) -> History | None:
    path = place.small(LINEAGE)
    try:
        lineage = Lineage.of(path.parent) if path is not None else None
        if lineage is None:
            found.say(False, "lineage", f"{place.name} has no {LINEAGE}, so it does not say what it was made of")
            return None
        history = read_history(lineage)
    except CheckpointError as error:
        found.say(False, "lineage", str(error))
        return None
    done = ", ".join(stage.name for stage in history.stages)
    dropped = format_layers(history.dropped) or "none"
    found.say(
        True, "lineage",
        f"{history.base_id}: layers {dropped} of {history.num_base_layers} dropped, {len(history.kept)} left ({done})",
    )  # fmt: skip
    return history


def _check_config(place: Place, history: History, found: Verified) -> None:
    """The config says of the last cut what the lineage says."""
    cuts = [stage.entry for stage in history.stages if stage.name == "prune"]
    name = ADAPTER_CONFIG if place.is_adapter else "config.json"
    path = place.small(name)
    if path is None or not cuts:
        found.say(False, "config", f"{place.name} has no {name}" if path is None else f"{LINEAGE} has no cut")
        return
    try:
        fields = read_json(path)
        told = fields if place.is_adapter else fields.get(MARKER) or {}
        dropped, of = told.get("drop_layers"), told.get("num_base_layers")
    except (LayerPruneError, AttributeError) as error:
        found.say(False, "config", str(error))
        return
    settings, layers = cuts[-1]["settings"], cuts[-1].get("layers") or {}
    if dropped != sorted(settings["drop_layers"]) or of != layers.get("base"):
        what = "nothing" if dropped is None else f"layers {format_layers(dropped)} of {of}"
        wanted = f"{format_layers(settings['drop_layers'])} of {layers.get('base')}"
        found.say(False, "config", f"{name} says that {what} dropped, and {LINEAGE} says {wanted}: one was edited")
    else:
        found.say(True, "config", f"{name} and {LINEAGE} agree on the cut")


def _check_metrics(place: Place, history: History, own: str, found: Verified) -> None:
    path = place.small(METRICS)
    if path is None:
        return
    try:
        metrics = Metrics.of(path.parent)
    except CheckpointError as error:
        found.say(False, "metrics", str(error))
        return
    foreign = set(metrics.models) - {own} - history.lineage.known_weights()
    if metrics.weights != own:
        found.say(False, "metrics", f"{METRICS} was measured on other weights ({metrics.weights[:12]})")
    elif foreign:
        found.say(
            False, "metrics", f"{METRICS} has numbers of weights ({min(foreign)[:12]}) that {LINEAGE} does not know"
        )
    else:
        found.say(True, "metrics", f"{len(metrics.results)} numbers, of these weights and their history")


def _check_base(source: Base, history: History, found: Verified) -> None:
    told = history.lineage.base.get("files") or {}
    differ = source.differences(told)
    where = f"{source.name} at {source.hub.repo.commit[:12]}" if source.hub else source.name
    if not any(name.endswith((".safetensors", ".gguf")) for name in told):
        found.say(False, "base", f"{LINEAGE} has no hashes of the base's weights")
    elif differ:
        found.say(False, "base", f"{where} is not the base that {LINEAGE} names: {', '.join(differ[:3])} differ")
    else:
        found.say(True, "base", f"{where} is the one that {LINEAGE} names, by the hashes of its files")


def _check_fields(place: Place, source: Base, history: History, found: Verified) -> None:
    """The config is what the cut leaves of the base's: an edited one makes another model of the same weights."""
    path = place.small("config.json")
    if place.is_adapter or path is None:
        return
    try:
        wanted, has = expected_config(history, source), read_config(path.parent).to_dict()
    except LayerPruneError as error:
        found.say(False, "config", str(error))
        return
    differ = sorted(name for name in wanted.keys() | has.keys() if wanted.get(name) != has.get(name))
    differ = [name for name in differ if name not in _VOLATILE]
    trained = {stage.name for stage in history.stages} - {"prune", "repair"}
    if differ and trained:
        found.say(True, "changed", f"config.json: {', '.join(differ)}")
    elif differ:
        told = ", ".join(f"{name} is {has.get(name)!r} and was {wanted.get(name)!r}"[:160] for name in differ[:3])
        found.say(False, "config", f"config.json is not what the cut leaves of the base's: {told}")


def _rules(place: Place, history: History) -> tuple[Callable[[str], str], Callable[[str], bool]]:
    """How tensors are named, and which of them a stage says it changed."""
    changed = history.changed()
    if not place.is_adapter:
        return lambda name: name, lambda name: name in changed
    config = read_json(place.small(ADAPTER_CONFIG))
    # An adapter holds what was tuned or repaired, and nothing else.
    modules = [*(config.get("modules_to_save") or ()), *(config.get("repaired_modules") or ())]
    prefixes = tuple(f"{module}." for module in modules)
    return (
        lambda name: name.removeprefix(_ADAPTER_PREFIX),
        lambda name: name in changed or name.startswith(prefixes),
    )


def _tied(comparison: Comparison, reference: Reference, quick: bool) -> None:
    """A head that is tied to the embeddings need not be stored twice."""
    heads = [name for name in comparison.absent if name.rpartition(".")[0].rpartition(".")[2] == "lm_head"]
    gone = {name for name in heads if quick or is_copy(name, reference)}
    comparison.absent = [name for name in comparison.absent if name not in gone]


def _tell(place: Place, history: History, found: Verified, comparison: Comparison, made_again: bool) -> None:
    wrong = [f"{name} {told}" for name, told in sorted(comparison.wrong.items())]
    if not place.is_adapter:
        wrong += [f"{name} is missing" for name in comparison.absent]
    for text in _swapped(wrong)[:_MAX_LINES]:
        found.say(False, "tensors", text)
    if len(_swapped(wrong)) > _MAX_LINES:
        found.say(False, "tensors", f"and {len(_swapped(wrong)) - _MAX_LINES} more")
    for name, stages in _by_station(comparison, history, place).items():
        for text in by_layer(stages):
            found.say(True, "changed", f"{name}: {text}")
    count = len(comparison.same)
    if found.quick:
        text = f"{count} of the tensors have the names, types and shapes of the base's"
    elif made_again:
        text = f"{count} are those that the same cut of the base gives again, to the last bit"
    else:
        text = f"{count} are the base's, to the last bit ({numbers.size(comparison.read)} compared)"
    if not comparison.wrong:
        found.say(True, "tensors", text)
    if comparison.changed:
        found.say(True, "tensors", f"{len(comparison.changed)} were changed, as {LINEAGE} says")


def _by_station(comparison: Comparison, history: History, place: Place) -> dict[str, list[str]]:
    told = history.changed()
    found: dict[str, list[str]] = {}
    for name in comparison.changed:
        default = ["adapter"] if place.is_adapter else ["?"]
        found.setdefault(" and ".join(dict.fromkeys(told.get(name, default))), []).append(name)
    return found


def _swapped(wrong: list[str]) -> list[str]:
    """One line for a layer that is another layer of the base, in place of one for each of its tensors."""
    found: dict[str, None] = {}
    for text in wrong:
        name, _, told = text.partition(" ")
        if told.startswith("is the base's layer "):
            parts = name.split(".")
            at = next(i for i, part in enumerate(parts) if part.isdecimal())
            text = f"{'.'.join(parts[: at + 1])} {told}"
        found[text] = None
    return list(found)
