"""A card's YAML block and the files in `.eval_results/`, from the same records as its text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ...records.figures import numbers
from ...records.figures.results import Results, Row
from ...records.history import is_repaired
from ...records.names import is_hub_name
from .escape import clean_line

if TYPE_CHECKING:
    from .render import Card

TAGS = ("layer-pruning", "depth-pruning", "hf_layerprune")
# Fields that only this package writes: they are removed once they no longer apply. Other fields are kept.
OWN_FIELDS = {"model-index", "base_model", "base_model_relation", "library_name", "datasets"}
_LICENSE_FIELDS = {"license_name", "license_link"}  # they go with a licence of ours
_MAX_DATASETS = 50
_HASH = re.compile(r"[0-9a-f]{40,64}")


def card_metadata(card: Card) -> dict[str, Any]:
    """The fields of a card's YAML block, in the layout of `huggingface_hub`."""
    from huggingface_hub import ModelCardData

    licence, history = card.licence, card.history
    fields: dict[str, Any] = {}
    if base := card.quantized_from or history.base_on_hub:
        fields["base_model"] = base
        # The Hub knows adapter, merge, quantized and finetune: a pruned model, new weights of one base, is the last.
        kind = "quantized" if history.quantized else "finetune"
        fields["base_model_relation"] = "adapter" if history.form == "adapter" else kind
    if licence.known:
        fields["license"] = clean_line(licence.id)
        if licence.id == "other" or licence.name:
            fields["license_name"] = clean_line(licence.name or "unnamed")
        if licence.id == "other" and licence.link:
            fields["license_link"] = clean_line(licence.link)
    declared = history.lineage.base.get("language") or []
    languages = [clean_line(one, 20) for one in ([declared] if isinstance(declared, str) else declared)]
    # The data sets on the Hub that a repair or training used.
    fitted = [one for one in history.stages if one.name != "prune" or is_repaired(one.entry)]
    named = [str(one.get("id", "")) for stage in fitted for one in stage.data]
    return ModelCardData(
        language=languages or None,
        library_name="peft" if history.form == "adapter" else "transformers",
        pipeline_tag=clean_line(history.lineage.base.get("pipeline_tag", "text-generation")),
        datasets=list(dict.fromkeys(name for name in named if is_hub_name(name)))[:_MAX_DATASETS] or None,
        tags=[*TAGS, *(["conversational"] if card.chats else [])],
        model_name=clean_line(card.name) if card.results else None,
        eval_results=eval_results(card.results) or None,
        **fields,
    ).to_dict()


def merge_metadata(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Our fields plus those that somebody else has added to the card; our value where both have one; the tags of both."""
    both, outdated = dict(ours), OWN_FIELDS | (_LICENSE_FIELDS if "license" in ours else set())
    both |= {name: value for name, value in theirs.items() if name not in ours and name not in outdated}
    tags, more = ours.get("tags") or [], theirs.get("tags")
    if isinstance(more, list):
        both["tags"] = [*tags, *(tag for tag in more if tag not in tags)]
    return both


def to_yaml(fields: dict[str, Any]) -> str:
    """A YAML block between two lines of dashes."""
    from huggingface_hub.utils import yaml_dump

    return f"---\n{yaml_dump(fields, sort_keys=False, line_break=chr(10)).strip()}\n---\n"


def eval_results(results: Results) -> list[Any]:
    """Every number measured on this model, for the `model-index`."""
    from huggingface_hub import EvalResult

    entries = []
    for row, record in _own_records(results, results.rows):
        kind, task, metric = row.key
        settings: dict[str, Any] = {name: record[name] for name in ("stderr", "samples") if name in record}
        settings |= {name: clean_line(record[name]) for name in ("device", "dtype") if name in record}
        entries.append(
            EvalResult(
                task_type="text-generation",
                task_name=clean_line(row.task) if row.task else "Text generation",
                dataset_type=clean_line(_data_set(record) or task or kind),
                dataset_name=clean_line(
                    row.task or (f"{kind} on {record['device']}" if record.get("device") else kind)
                ),
                dataset_args={"num_few_shot": record["shots"]} if "shots" in record else dict(row.run) or None,
                metric_type=clean_line(metric),
                metric_name=clean_line(row.metric),
                metric_value=record["value"],
                metric_args=settings or None,
            )
        )
    return entries


def _own_records(results: Results, rows: Iterable[Row]) -> Iterator[tuple[Row, dict[str, Any]]]:
    """The rows that have a number of this model, with its record."""
    own = results.own
    for row in rows:
        if own is not None and own.weights in row.cells:
            yield row, row.cells[own.weights].record


def eval_files(results: Results) -> dict[str, str]:
    """The files in `.eval_results/`, by path: scores on whole benchmarks whose data sets are on the Hub.

    A number from part of a benchmark is not its score and is left out.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from huggingface_hub.utils import yaml_dump

    files: dict[str, str] = {}
    for row, record in _own_records(results, results.table(["accuracy"])):
        task = row.key[1]
        if not _is_benchmark(row, record):
            continue
        notes = f"{row.metric}, {record.get('shots', 0)}-shot, {numbers.format_metric('samples', record['samples'])} questions"
        entry = EvalResultEntry(
            dataset_id=record["dataset"],
            task_id=task,
            value=round(100 * record["value"] if row.share else record["value"], 4),
            date=str(record["date"])[:10],
            notes=notes,
        )
        name = re.sub(r"[^\w-]+", "-", task)[:80]
        files[f".eval_results/{name}.yaml"] = yaml_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return files


def _is_benchmark(row: Row, record: dict[str, Any]) -> bool:
    limit = record.get("settings", {}).get("limit")
    return bool("/" in _data_set(record) and limit is None and record.get("samples") and row.key[1])


def _data_set(record: dict[str, Any]) -> str:
    """The name of a record's data set on the Hub; empty for a file, which is recorded by the hash of its content."""
    name = str(record.get("dataset", ""))
    return name if is_hub_name(name) and _HASH.fullmatch(name) is None else ""
