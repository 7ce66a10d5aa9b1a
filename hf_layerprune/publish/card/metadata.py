"""A card's YAML block and the files in `.eval_results/`, from the same records as its text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError
from ...records.figures import numbers
from ...records.figures.results import Results, Row
from ...records.names import is_hub_name
from .escape import plain

if TYPE_CHECKING:
    from .render import Card

TAGS = ("layer-pruning", "depth-pruning", "hf_layerprune")
# Fields that only this package writes: they are removed once they no longer apply. Other fields are kept.
OURS = {"model-index", "base_model", "base_model_relation", "library_name"}
_HASH = re.compile(r"[0-9a-f]{40,64}")


def metadata(card: Card) -> dict[str, Any]:
    """The fields of a card's YAML block.

    Args:
        card (`Card`): The card.

    Returns:
        `dict[str, Any]`: The fields in the layout of `huggingface_hub`.
    """
    from huggingface_hub import ModelCardData

    licence = card.licence
    fields: dict[str, Any] = {}
    if card.history.base_on_hub:
        fields["base_model"] = card.history.base_on_hub
        # A pruned model is neither quantised nor merged; the Hub has no better value for this field.
        fields["base_model_relation"] = "adapter" if card.form == "adapter" else "finetune"
    if licence.known:
        fields["license"] = plain(licence.id)
        if licence.id == "other" or licence.name:
            fields["license_name"] = plain(licence.name or "unnamed")
        if licence.id == "other" and licence.link:
            fields["license_link"] = plain(licence.link)
    tags = [*TAGS, *(["conversational"] if card.chats else [])]
    data = ModelCardData(
        language=card.languages or None,
        library_name="peft" if card.form == "adapter" else "transformers",
        pipeline_tag="text-generation",
        datasets=card.datasets or None,
        tags=tags,
        model_name=plain(card.name) if card.results else None,
        eval_results=eval_results(card.results) or None,
        **fields,
    )
    present = data.to_dict()
    first = ["language", "license", "license_name", "license_link", "library_name", "pipeline_tag", "base_model"]
    first += ["base_model_relation"]
    order = [*first, *(name for name in present if name not in (*first, "model-index")), "model-index"]
    return {name: present[name] for name in order if name in present}


def front_matter(text: str, where: str) -> tuple[dict[str, Any], str]:
    """Split a card into the fields of its YAML block and the text that follows it.

    Args:
        text (`str`): A README.md.
        where (`str`): The file's name in errors.

    Returns:
        `tuple[dict[str, Any], str]`: All fields in their original order, and the rest of the text.

    Raises:
        CheckpointError: The YAML can't be read, so rewriting it would lose what somebody wrote.
    """
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK, RepoCard

    if REGEX_YAML_BLOCK.search(text) is None:
        if re.match(r"\s*---[ \t]*\n[\w-]+:", text):
            raise CheckpointError(f"the YAML block of {where} has no end; put a line of three dashes after it")
        return {}, text
    try:
        card = RepoCard(text)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(f"the YAML block of {where} can't be read ({said}); correct it") from error
    return dict(vars(card.data)), card.text.lstrip("\n")


def merged(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Our fields plus those that somebody else has added.

    Args:
        ours (`dict[str, Any]`): See `metadata`.
        theirs (`dict[str, Any]`): The fields of the existing card.

    Returns:
        `dict[str, Any]`: Our value where both have one, and the tags of both.
    """
    both = dict(ours)
    both |= {name: value for name, value in theirs.items() if name not in ours and name not in OURS}
    tags, more = ours.get("tags") or [], theirs.get("tags")
    if isinstance(more, list):
        both["tags"] = [*tags, *(tag for tag in more if tag not in tags)]
    return both


def to_yaml(fields: dict[str, Any]) -> str:
    """A YAML block between two lines of dashes."""
    from huggingface_hub.utils import yaml_dump

    return f"---\n{yaml_dump(fields, sort_keys=False, line_break=chr(10)).strip()}\n---\n"


def eval_results(results: Results | None) -> list[Any]:
    """Every number measured on this model, for the `model-index`."""
    from huggingface_hub import EvalResult

    own = results.own if results else None
    entries = []
    for row in results.rows if results else ():
        cell = row.cells.get(own.weights) if own else None
        if cell is None:
            continue
        record = cell.record
        kind, task, metric = row.key
        dataset = str(record.get("dataset", ""))
        optional = ("stderr", "samples", "device", "dtype")
        settings: dict[str, Any] = {name: record[name] for name in optional if name in record}
        entries.append(
            EvalResult(
                task_type="text-generation",
                task_name=plain(row.task) if row.task else "Text generation",
                dataset_type=plain(dataset if is_hub_name(dataset) else task or kind),
                dataset_name=plain(row.task or _measured_on(record, kind)),
                dataset_args={"num_few_shot": record["shots"]} if "shots" in record else dict(row.run) or None,
                metric_type=plain(metric),
                metric_name=plain(row.metric),
                metric_value=record["value"],
                metric_args=settings or None,
            )
        )
    return entries


def _measured_on(record: dict[str, Any], kind: str) -> str:
    return " ".join([kind, *(["on", record["device"]] if record.get("device") else [])])


def eval_files(results: Results | None) -> dict[str, str]:
    """The files in `.eval_results/`: scores on whole benchmarks whose data sets are on the Hub.

    Args:
        results (`Results`, *optional*): What was measured.

    Returns:
        `dict[str, str]`: Content by path. A number from part of a benchmark is not its score and is left out.
    """
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml
    from huggingface_hub.utils import yaml_dump

    own = results.own if results else None
    files: dict[str, str] = {}
    for row in results.table(["accuracy"]) if results else ():
        cell = row.cells.get(own.weights) if own else None
        if cell is None or not _is_benchmark(row, cell.record):
            continue
        record, task = cell.record, row.key[1]
        notes = (
            f"{row.metric}, {record.get('shots', 0)}-shot, {numbers.measured('samples', record['samples'])} questions"
        )
        entry = EvalResultEntry(
            dataset_id=record["dataset"],
            task_id=task,
            value=round(100 * record["value"], 4),
            date=str(record["date"])[:10],
            notes=notes,
        )
        name = re.sub(r"[^\w-]+", "-", task)[:80]
        files[f".eval_results/{name}.yaml"] = yaml_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    return files


def _is_benchmark(row: Row, record: dict[str, Any]) -> bool:
    dataset, limit = record.get("dataset", ""), record.get("settings", {}).get("limit")
    named = "/" in dataset and is_hub_name(dataset) and _HASH.fullmatch(dataset) is None
    return bool(named and limit is None and record.get("samples") and row.key[1])
