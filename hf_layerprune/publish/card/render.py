"""The model card: a pure function of `lineage.json` and `metrics.json`.

    card = Card.from_records(Lineage.load(folder), Metrics.load(folder))
    text = card.render()

The card contains nothing that is not in these records. Every value that a template prints is escaped (`escape.py`),
and every section is enclosed in marks (`regions.py`), so that text which people write around it is kept.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from ...layer_ranges import format_layers
from ...options import pluralize
from ...records.curve import curve_points
from ...records.figures import numbers
from ...records.figures.results import COST, QUALITY, Results, build_results, describe_conditions, describe_run
from ...records.fingerprints import CONFIG, has_tokenizer
from ...records.history import TRAIN, History, Stage, read_history
from ...records.licences import DeclaredLicence
from ...records.lineage import Lineage
from ...records.metrics import Metrics
from ...records.names import is_hub_name
from ...records.quantized import describe_quantization, quantization_method, quantization_package
from ...records.requirements import Outcome
from ...repair.registry import REPAIRS, RepairMethod
from ...select.registry import CRITERIA
from . import escape, metadata, plots, regions, tables
from .commands import list_commands
from .curve_plot import curve_table
from .limits import describe_limits

# The sections of a card, in order, each from its own template: `templates/NAME.md.jinja`. What a template prints is
# escaped unless it is `Markup`; a template that prints nothing leaves no section.
SECTIONS = (
    "summary", "results", "speed", "requirements", "curve", "use", "recipe", "training", "limits", "provenance", "licence",
    "citation",
)  # fmt: skip
# Small models that lost layers repeat themselves, so no sequence of this many tokens may occur twice.
NO_REPEAT_NGRAM = 5
# The paper of the method. Those of criteria and repairs are named in their registries; `papers.bib` has them all.
_METHOD = "2411.15558"
# Changing this number makes every plot be redrawn.
_DRAWING = 5


@dataclass(frozen=True)
class Card:
    """The content of a card. `repo_id` and `space` are known once the model is published."""

    name: str
    repo_id: str | None
    space: str | None
    history: History
    licence: DeclaredLicence
    results: Results = field(repr=False)
    outcomes: Sequence[Outcome] = ()

    @classmethod
    def from_records(cls, lineage: Lineage, metrics: Metrics | None = None) -> Card:
        """Build a card from the records.

        Raises:
            CheckpointError: The lineage contradicts itself.
        """
        history = read_history(lineage)
        published = {key: value for key, value in lineage.published.items() if is_hub_name(str(value))}
        repo_id = published.get("repo_id")
        base = history.base_on_hub or re.sub(r"\.gguf$", "", history.base_id, flags=re.IGNORECASE)
        method = f"-{quantization_method(how.settings['quantization_config'])}" if (how := history.quantized) else ""
        name = repo_id or published.get("name") or f"{base.rpartition('/')[2]}-{len(history.kept)}L{method}"
        return cls(
            name=name.rpartition("/")[2],
            repo_id=repo_id,
            space=published.get("space"),
            history=history,
            licence=DeclaredLicence.from_base(lineage.base),
            results=build_results(metrics),
            outcomes=metrics.outcomes if metrics else (),
        )

    @property
    def chats(self) -> bool:
        """Whether the base has a chat template."""
        return bool(self.history.lineage.base.get("chat"))

    @property
    def multimodal(self) -> bool:
        """Whether the base takes more than text."""
        return "pipeline_tag" in self.history.lineage.base

    @property
    def medium(self) -> str:
        """What the base takes besides text: `"image"`, `"audio"`, or nothing."""
        return str(self.history.lineage.base.get("pipeline_tag", "")).partition("-text-to-text")[0]

    @property
    def has_input(self) -> bool:
        """Whether the model comes with what makes its input: a tokenizer, or a processor if it takes more than text."""
        base, last = self.history.lineage.base, self.history.lineage.entries[-1]
        own = self.history.form == "model"
        names = last.get("files", ()) if own else [*base.get("files", ()), *base.get("companions", ())]
        if CONFIG not in names:  # of a GGUF file, only its own name is known
            return True
        processor = not self.multimodal or any(name.endswith("processor_config.json") for name in names)
        return processor and has_tokenizer(names)

    @property
    def quantized_from(self) -> str | None:
        """Of a quantised model, the repository of the model before that, if it was published."""
        stage = self.history.quantized
        name = stage.settings.get("from") if stage else None
        return name if isinstance(name, str) and is_hub_name(name) else None

    @property
    def pictures(self) -> dict[str, Callable]:
        """The function that draws each plot, by name."""
        return plots.available_plots(self.history, self.results)

    @property
    def digest(self) -> str:
        """A hash of everything that the plots are drawn from."""
        records: list[Any] = [self.history.lineage.entries]
        if self.results:
            records += [self.results.metrics.models, self.results.metrics.results]
        return hashlib.sha256(json.dumps([_DRAWING, *records], sort_keys=True).encode()).hexdigest()[:16]

    @property
    def metadata(self) -> dict[str, Any]:
        """The fields of the YAML block."""
        return metadata.card_metadata(self)

    def body(self) -> str:
        """The card without its YAML block."""
        context, environment = _context(self), _environment()
        texts = {name: environment.get_template(f"{name}.md.jinja").render(context) for name in SECTIONS}
        return "\n\n".join(regions.add_markers(name, text) for name, text in texts.items() if text.strip()) + "\n"

    def render(self) -> str:
        """The whole card."""
        return metadata.to_yaml(self.metadata) + "\n" + self.body()


def _context(card: Card) -> dict[str, Any]:
    history, results, repairs = card.history, card.results, _used_repairs(card.history)
    quantized = history.quantized
    # A cut of a quantised base stays as it is, unless its weights were converted.
    packed = "" if quantized or history.dtype else str(history.lineage.base.get("quantized", ""))
    settings = quantized.settings["quantization_config"] if quantized else {"quant_method": packed.partition(",")[0]}
    return {
        "card": card,
        "history": history,
        "licence": card.licence,
        "results": results,
        "own": results.own,
        "dense": results.dense,
        "quality": results.table(QUALITY),
        "every": results.table(QUALITY, every=True),
        "cost": results.table(COST),
        "every_cost": results.table(COST, every=True),
        "timed": _describe_timed_runs(results),
        "means": _mean_accuracies(results),
        "noise": _has_noise(results, QUALITY),
        "scatter": _has_noise(results, COST),
        "chances": any(row.chance for row in results.table(QUALITY)),
        "repaired_with": repairs[-1].description if repairs else "",
        "trained": [one for one in history.stages if one.data or (one.name == TRAIN and one.settings)],
        "commands": list_commands(history),
        "versions": _describe_versions(history),
        "limits": describe_limits(results, history),
        "quantized": describe_quantization(settings) if quantized else "",
        "quantized_from": card.quantized_from,
        "packed": packed,
        "quantizer": shlex.quote(package) if (package := quantization_package(settings)) else "",
        "own_verb": "was" if quantized else "is",
        "curve": curve_table(curve_points(history), len(history.dropped)),
        "pictures": card.pictures,
        "dropped": format_layers(history.dropped).replace(",", ", "),
        "done": [stage.name for stage in history.stages],
        "papers": _cited_papers(history),
        "measured_with": describe_conditions(results) if results else [],
        "no_repeat": NO_REPEAT_NGRAM,
        "model_id": card.repo_id or f"path/to/{card.name}",
    }


def _used_repairs(history: History) -> list[RepairMethod]:
    """The repairs that were used, `refit` if nothing was borrowed; those that are not in the registry are left out."""
    names = []
    for stage in history.stages:
        if stage.name == "repair":
            borrowed = any(cut.get("borrowed_neurons") != 0 for cut in stage.settings.get("cuts") or ())
            name = str(stage.settings.get("method"))
            names.append("refit" if name == "borrow" and not borrowed else name)
    return [REPAIRS[name] for name in names if name in REPAIRS]


def _cited_papers(history: History) -> str:
    """The papers of the method, and of the criteria and repairs that were used, in BibTeX."""
    entries = files(__package__).joinpath("papers.bib").read_text(encoding="utf-8").strip().split("\n\n")
    by_id = {identifier: entry for entry in entries for identifier in re.findall(r"eprint += {(.+)}", entry)}
    cuts = [stage for stage in history.stages if stage.name == "prune"]
    names = [stage.settings.get("criterion") for stage in cuts]
    names += [stage.entry.get("selection", {}).get("criterion") for stage in cuts]
    sources = [CRITERIA[name].source for name in names if name in CRITERIA]
    sources += [repair.source for repair in _used_repairs(history)]
    used = [_METHOD, *re.findall(r"arXiv:([\d.]+)", " ".join(sources))]
    return "\n\n".join(by_id[identifier] for identifier in dict.fromkeys(used))


def _mean_accuracies(results: Results) -> list[Markup]:
    """Mean accuracy of the model and of the dense model, if both were measured."""
    means, columns = results.mean_accuracy(), [one for one in (results.own, results.dense) if one]
    return [_with_error(*means[one.weights]) for one in columns] if means and len(columns) == 2 else []


def _has_noise(results: Results, kinds: tuple[str, ...]) -> bool:
    """Whether a table has differences that are indistinguishable from noise."""
    return any(cell.noise for row in results.table(kinds, every=True) for cell in row.cells.values())


def _describe_timed_runs(results: Results) -> str:
    """The settings that all timed runs share."""
    if not results.usual_run:
        return ""
    records = [cell.record for row in results.rows if row.run for cell in row.cells.values()]
    threads = {record["settings"].get("threads") for record in records if record.get("device") == "cpu"}
    on = [pluralize(max(threads), "thread")] if len(threads) == 1 and None not in threads else []
    return ", ".join([describe_run(results.usual_run), *on])


def _describe_versions(history: History) -> str:
    versions = history.lineage.entries[-1].get("versions", {})
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def _settings_yaml(stage: Stage) -> str:
    """All settings of a stage, as YAML."""
    from huggingface_hub.utils import yaml_dump

    # Through JSON, so that YAML needs no tags for special types.
    fields = json.loads(json.dumps(stage.settings, default=str))
    return "\n".join(yaml_dump({name: value}, default_flow_style=None).strip("{}\n") for name, value in fields.items())


@cache
def _environment() -> jinja2.Environment:
    """A Jinja environment that escapes everything as prose unless it is `Markup`."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "templates"),
        finalize=lambda value: (
            value if isinstance(value, Markup) else "" if value is None else escape.escape_text(value)
        ),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "code": escape.code_span,
        "fenced": escape.code_block,
        "string": escape.python_literal,
        "hub": escape.hub_link,
        "count": numbers.format_count,
        "settings": _settings_yaml,
        "line": tables.stage_line,
        "ours": Markup,  # our own text, which may contain Markdown
    }
    environment.globals |= {
        "link": escape.link,
        "command": escape.shell_command,
        "requirements_table": tables.requirements_table,
        "results_table": tables.results_table,
        "data_table": tables.data_table,
        "training_table": tables.training_table,
    }
    return environment


def _with_error(value: float, stderr: float | None) -> Markup:
    text = numbers.in_percent(value)
    text = numbers.with_error(text, value, stderr, share=True) if stderr else text
    return Markup(text.replace(" ", "\u00a0"))
