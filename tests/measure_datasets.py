"""The paper's eight benchmarks in miniature: repositories in the format of those on the Hub, with made-up questions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_CHOICES = {"text": ["up the hill", "down", "to the left side", "right"], "label": ["A", "B", "C", "D"]}


def _question(i: int) -> str:
    return f"where does river number {i} run"


def _rows(kind: str, n: int) -> list[dict[str, Any]]:
    four = _CHOICES["text"]
    make = {
        "piqa": lambda i: {"goal": _question(i), "sol1": "this way", "sol2": "the other way", "label": i % 2},
        "hellaswag": lambda i: {
            "activity_label": "Walking", "ctx_a": _question(i), "ctx_b": "it", "endings": four, "label": str(i % 4),
        },
        "openbookqa": lambda i: {"question_stem": _question(i), "choices": _CHOICES, "answerKey": "ABCD"[i % 4]},
        "arc": lambda i: {"question": _question(i), "choices": _CHOICES, "answerKey": "ABCD"[i % 4]},
        "winogrande": lambda i: {
            "sentence": "The river is longer than the road because the _ has bends.", "option1": "river",
            "option2": "road", "answer": str(1 + i % 2),
        },
        "mmlu": lambda i: {"question": _question(i), "choices": four, "answer": i % 4},
        "cmmlu": lambda i: {"Question": _question(i), **dict(zip("ABCD", four, strict=True)), "Answer": "ABCD"[i % 4]},
        "wikitext": lambda i: {"text": f"The river of line {i} runs through a valley, and the road runs beside it. "},
    }[kind]  # fmt: skip
    return [make(i) for i in range(n)]


def _write(folder: Path, kind: str, n: int, splits: Iterable[str], configs: Iterable[str] = ("default",)) -> None:
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(_rows(kind, n))
    lines = ["---", "configs:"]
    for config in configs:
        lines += [f"- config_name: {config}", "  data_files:"]
        (folder / config).mkdir()
        for split in splits:
            pq.write_table(table, folder / config / f"{split}-00000-of-00001.parquet")
            lines += [f"  - split: {split}", f"    path: {config}/{split}-*"]
    (folder / "README.md").write_text("\n".join([*lines, "---", ""]))


def _subjects(group: str, prefix: str) -> list[str]:
    """The configs of a group's data set, as the harness names them."""
    import lm_eval.tasks
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: None)
    folder = Path(lm_eval.tasks.__file__).parent / group
    found = (yaml.load(path.read_text(), Loader) for path in folder.glob(f"{prefix}*.yaml"))
    return sorted({said["dataset_name"] for said in found if "dataset_name" in said})


def write_datasets(root: Path, *, questions: int = 4, groups: bool = False) -> dict[str, Path]:
    """Write the data sets, and WikiText-2.

    Returns:
        `dict[str, Path]`: The folder of each repository, by its name in `HubServer`.
    """
    four = ("train", "validation", "test")
    _write(root / "piqa", "piqa", questions, ("train", "validation"))
    _write(root / "hellaswag", "hellaswag", questions, four)
    _write(root / "openbookqa", "openbookqa", questions, four, ("main",))
    _write(root / "arc", "arc", questions, four, ("ARC-Easy", "ARC-Challenge"))
    _write(root / "winogrande", "winogrande", questions, ("train", "validation"), ("winogrande_xl",))
    _write(root / "wikitext", "wikitext", 40, ("test",), ("wikitext-2-raw-v1",))
    found = {
        "datasets/baber/piqa": root / "piqa",
        "datasets/Rowan/hellaswag": root / "hellaswag",
        "datasets/allenai/openbookqa": root / "openbookqa",
        "datasets/allenai/ai2_arc": root / "arc",
        "datasets/allenai/winogrande": root / "winogrande",
        "datasets/Salesforce/wikitext": root / "wikitext",
    }
    if groups:
        _write(root / "mmlu", "mmlu", questions, ("test", "dev"), _subjects("mmlu/default", "mmlu_"))
        _write(root / "cmmlu", "cmmlu", questions, ("test", "dev"), _subjects("cmmlu", "cmmlu_"))
        found |= {"datasets/cais/mmlu": root / "mmlu", "datasets/haonan-li/cmmlu": root / "cmmlu"}
    return found
