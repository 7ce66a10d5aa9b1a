"""The quantize stage: record what another library did when it quantised a model.

model = AutoModelForCausalLM.from_pretrained("pruned", quantization_config=BitsAndBytesConfig(load_in_4bit=True))
model.save_pretrained("pruned-nf4")
record_quantized("pruned", "pruned-nf4")
"""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..cut.header import FLOATS, read_header
from ..errors import CheckpointError
from ..records.fingerprints import CONFIG
from ..records.lineage import FILE_NAME, stage_entry
from ..records.quantized import is_repeatable_method, quantization_method
from ..runtime.config_file import read_config_file
from ..runtime.loading import load_base
from ..runtime.model_class import stored_layer_prefix
from .provenance import as_folder, load_lineage_of_weights


def record_quantized(source: str | Path, folder: str | Path) -> None:
    """Record that a folder holds a quantised model, so that `verify`, the card and `push` understand it.

    The model must have been quantised by transformers (`quantization_config=`) or a tool that writes such a folder, and
    saved. Tokenizer, chat template, generation settings and licence are copied from the source, byte for byte, over
    those that saving wrote.

    Args:
        source (`str` or `Path`): The folder of the model before it was quantised, with its `lineage.json`.
        folder (`str` or `Path`): The folder of the quantised model. It gets a `lineage.json`, and keeps its weights and
            its config.

    Raises:
        CheckpointError: A folder is not such a model folder, or the quantised model has a history already.
    """
    before, after = as_folder(source), as_folder(folder)
    for place in (before, after):
        if not (place / CONFIG).is_file():
            raise CheckpointError(f"{place} is not a model folder; specify one that has a {CONFIG}")
    lineage = load_lineage_of_weights(before)
    if (after / FILE_NAME).exists():
        raise CheckpointError(f"{after} has a {FILE_NAME} already; remove it if its weights are new")
    old, new = (read_config_file(place / CONFIG) for place in (before, after))
    settings = new.get("quantization_config")
    if not isinstance(settings, dict):
        raise CheckpointError(f"{after / CONFIG} has no quantization_config, so its model is not quantised")
    if old.get("quantization_config") is not None:
        raise CheckpointError(f"{before} is quantised already; specify the model from before quantisation")
    from ..heal.stage import changed_tensors, copy_companion_files

    method = quantization_method(settings)
    if _packed_tensors(after) <= _packed_tensors(before):
        raise CheckpointError(
            f"no weight of {after} is quantised, although its {CONFIG} says so: {method} passes over layers of this kind; use "
            "another method"
        )
    details = {"method": method, "quantization_config": settings, "dtype": new.get("dtype")}
    if name := lineage.published.get("repo_id"):
        details["from"] = name
    with stage_entry("quantize", details) as entry:
        copy_companion_files(before, after)
        if not is_repeatable_method(settings):
            entry["changed_tensors"] = changed_tensors(before, after)
    with suppress(PackageNotFoundError):  # a method whose package has another name
        entry["versions"][method] = version(method)
    if "layers" in lineage.entries[-1]:
        prefix = stored_layer_prefix(load_base(before, device_map="meta"))  # no weight is read
        entry["layers"] = lineage.entries[-1]["layers"] | {"prefix": prefix}
    lineage.record(after, entry)


def _packed_tensors(folder: Path) -> set[tuple[str, str]]:
    """Names and types of the tensors that are not plain floating-point numbers."""
    files = map(read_header, folder.glob("*.safetensors"))
    return {(one.name, one.dtype) for file in files for one in file.tensors if one.dtype not in FLOATS}
