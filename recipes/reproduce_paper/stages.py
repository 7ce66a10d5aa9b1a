"""Run a plan: prune, train, evaluate. An interrupted run resumes.

runner = Runner(Path("reproduce_paper_output"))
outcome = runner.run(plan)    # the numbers of a plan

The output folder contains `cuts/` (pruned models, shared by runs), `data/` (training rows), `answers/` (by question,
so that none is evaluated twice), and `runs/`, where each run keeps its `lineage.json`, its `metrics.json` and its log.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from plans import HERE, Plan, hash_json, hash_local_files
from training import engine_settings, trained_parameters
from training_rows import prepare_rows

from hf_layerprune import families
from hf_layerprune.errors import CheckpointError, LayerPruneError
from hf_layerprune.files.copy import write_text
from hf_layerprune.files.text_file import read_yaml
from hf_layerprune.layer_ranges import format_layers
from hf_layerprune.measure.evaluate import EvalRequest, evaluate
from hf_layerprune.measure.tasks import PAPER, load_tasks
from hf_layerprune.measure.texts import find_text
from hf_layerprune.records.lineage import Lineage
from hf_layerprune.records.metrics import Metrics
from hf_layerprune.runtime.devices import pick_device
from hf_layerprune.runtime.loading import load_config, load_tokenizer
from hf_layerprune.runtime.memory import free_memory
from hf_layerprune.select.sets import drop_count
from hf_layerprune.stages.prune import PruneRequest, prune_to

logger = logging.getLogger("hf_layerprune.reproduce_paper")

RECIPE = HERE.parent / "sft_tail.py"
ENGINES = HERE.parent / "accelerate"


class Runner:
    """Runs plans.

    Args:
        output (`Path`): The output folder.
        engine (`Path`, *optional*): A config file of accelerate; by default one GPU, or the CPU if there is none.
        device (`str`, defaults to `"auto"`): The device for evaluation.
        keep_models (`bool`, defaults to `False`): Whether to keep the weights of finished runs.
        lock_fd (`int`, *optional*): A file descriptor, such as that of a lock, that training processes keep open.

    Raises:
        CutError: This machine has no such device.
        CheckpointError: The accelerate config can't be read.
    """

    def __init__(
        self,
        output: Path,
        *,
        engine: Path | None = None,
        device: str = "auto",
        keep_models: bool = False,
        lock_fd: int | None = None,
    ) -> None:
        self.output, self.device, self.keep_models, self.lock_fd = output, device, keep_models, lock_fd
        self._checked: set[str] = set()
        pick_device(device, spread=True)
        self.engine = engine or ENGINES / ("single_gpu.yaml" if has_accelerator() else "cpu.yaml")
        try:
            self.engine_settings = read_yaml(self.engine)
        except CheckpointError as error:
            raise CheckpointError(f"{error}; specify an accelerate config") from error

    def folder(self, plan: Plan) -> Path:
        return self.output / "runs" / plan.folder_name

    def run(self, plan: Plan) -> dict[str, Any]:
        """Run the parts of a plan that are not done yet.

        Args:
            plan (`Plan`): The plan.

        Returns:
            `dict[str, Any]`: `values` (`value` and, if known, `stderr`, by the names of the paper's numbers),
                `removed` layers, how many are `left`, and `weights`, the hash of the evaluated model.

        Raises:
            LayerPruneError: A part failed; finished parts are kept.
        """
        folder = self.folder(plan)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "plan.json", json.dumps(asdict(plan), indent=2) + "\n")
        self._check(plan)
        outcome: dict[str, Any] = {"values": {}}
        model = plan.model
        rounds: list[dict[str, Any]] = []
        if plan.cut is not None:
            model, rounds = self._run_rounds(plan, folder)
            dropped = dropped_in_base(rounds)
            outcome |= {"removed": format_layers(dropped), "left": rounds[0]["layers"] - len(dropped)}
        if plan.tune is not None:
            millions = rounds[-1]["trainable"] / 1e6
            outcome["values"]["trainable_millions"] = {"value": millions}
            seconds = [one.get("seconds") for one in rounds]  # unknown for training that was interrupted
            if None not in seconds:
                outcome["values"]["seconds"] = {"value": sum(seconds)}
        metrics = self._measure(plan, model, folder)
        outcome["weights"] = metrics.weights
        outcome["values"] |= paper_values(metrics, plan)
        if (Path(model) / "lineage.json").is_file():
            shutil.copyfile(Path(model) / "lineage.json", folder / "lineage.json")
        return outcome

    def clean(self, plan: Plan, cuts: set[str]) -> None:
        """Remove the weights of a finished run, unless models are kept.

        Args:
            plan (`Plan`): The plan of the run.
            cuts (`set[str]`): Names of cuts that other plans still need.
        """
        if self.keep_models:
            return
        if plan.cut is not None and plan.cut_name not in cuts:
            shutil.rmtree(self.output / "cuts" / plan.cut_name, ignore_errors=True)
        folder = self.folder(plan)
        for path in [folder / "merged_in_4_bits", *(folder.glob("round-*/*"))]:
            if path.is_dir():
                shutil.rmtree(path)

    def _check(self, plan: Plan) -> None:
        """Check that training rows, tasks and texts are available, before hours of training."""
        if plan.tune is not None:
            self._prepare_rows(plan)
        settings = plan.evaluate
        key = str([settings["tasks"], settings.get("tasks_from"), settings.get("limit"), settings["texts"]])
        if key not in self._checked:
            for source in settings["texts"].values():
                find_text(source)
            folder = Path(settings["tasks_from"]) if "tasks_from" in settings else None
            load_tasks(settings["tasks"], folder, settings.get("limit"))
            self._checked.add(key)

    # --- prune and train --------------------------------------------------------------------------------------

    def _run_rounds(self, plan: Plan, folder: Path) -> tuple[str, list[dict[str, Any]]]:
        """Prune and train, in one or several rounds. Returns the model, and a record of each round."""
        done: list[dict[str, Any]] = []
        source = plan.model
        for number, count in enumerate(self._drops_per_round(plan), 1):
            round_folder = folder / f"round-{number}"
            model = round_folder / "heal" / "model" if plan.tune is not None else self._cut_folder(plan, round_folder)
            record = round_folder / "round.json"
            later = folder / f"round-{number + 1}" / "round.json"  # this model is needed only until then
            if not record.is_file() or not (model.is_dir() or later.is_file()):
                pruned = self._prune(plan, source, round_folder, count)
                if plan.tune is not None:
                    self._train(plan, pruned, round_folder)
                write_text(record, json.dumps(self._round_record(plan, pruned, round_folder)) + "\n")
            done.append(json.loads(record.read_text()))
            if not self.keep_models:
                before = folder / f"round-{number - 1}"
                for unneeded in (before / "pruned", before / "heal", *round_folder.glob("heal/checkpoint-*")):
                    shutil.rmtree(unneeded, ignore_errors=True)
            source = str(model)
        return source, done

    def _drops_per_round(self, plan: Plan) -> Iterator[float | int]:
        """How much each round drops."""
        if plan.per_step is None:
            yield (plan.cut or {})["drop"]
            return
        left = drop_count((plan.cut or {})["drop"], families.layer_count(load_config(plan.model)))
        while left > 0:
            yield min(plan.per_step, left)
            left -= plan.per_step

    def _cut_folder(self, plan: Plan, round_folder: Path) -> Path:
        return round_folder / "pruned" if plan.per_step is not None else self.output / "cuts" / plan.cut_name

    def _prune(self, plan: Plan, source: str, round_folder: Path, count: float | int) -> Path:
        pruned = self._cut_folder(plan, round_folder)
        if not pruned.is_dir():
            pruned.parent.mkdir(parents=True, exist_ok=True)
            cut = (plan.cut or {}) | {"drop": count}
            logger.info("%s", prune_to(PruneRequest(base=source, output=str(pruned), **cut)))
            free_memory()
        return pruned

    def _train(self, plan: Plan, pruned: Path, round_folder: Path) -> None:
        heal = round_folder / "heal"
        if (heal / "model").is_dir():
            return
        heal.mkdir(parents=True, exist_ok=True)
        settings = (plan.tune or {}) | {
            "model_name_or_path": str(pruned),
            "dataset_name": str(self._prepare_rows(plan)),
            "output_dir": str(heal),
            "resume_from_checkpoint": "true",
        }
        settings |= engine_settings(settings, self.engine_settings, has_accelerator())
        precision = "fp16" if settings.get("fp16") else "bf16" if settings.get("bf16") else "no"
        config = heal / "settings.yaml"
        write_text(config, yaml.safe_dump(settings, sort_keys=False))
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(self.engine)]
        command += ["--mixed_precision", precision, str(RECIPE), "--config", str(config)]
        self._launch(command, heal / "log.txt")

    def _launch(self, command: list[str], log: Path) -> None:
        """Run a command, and copy its output to the terminal and to the log."""
        logger.info("training; its log is %s", log)
        with (
            log.open("ab") as file,
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that its child processes can be ended with it
                pass_fds=() if self.lock_fd is None else (self.lock_fd,),
            ) as running,
        ):
            output: Any = running.stdout
            start = file.tell()  # an earlier attempt's log comes first
            try:
                for piece in iter(lambda: os.read(output.fileno(), 1 << 16), b""):
                    file.write(piece)
                    file.flush()
                    sys.stderr.buffer.write(piece)
                    sys.stderr.buffer.flush()
            except BaseException:
                os.killpg(running.pid, signal.SIGTERM)
                raise
        if running.returncode:
            written = log.read_bytes()[start:].decode(errors="replace")
            last = [line for line in written.splitlines() if line.startswith("error: ")]
            reason = last[-1].removeprefix("error: ") if last else f"it ended with code {running.returncode}"
            raise LayerPruneError(f"training failed: {reason} (log: {log})")

    def _prepare_rows(self, plan: Plan) -> Path:
        data = plan.data or {}
        by_tokens = "longest" in data or "whole_sequence" in data
        key = hash_json([data, plan.model if by_tokens else None, *hash_local_files(data["name"])])
        folder = self.output / "data" / f"{Path(data['name']).stem}-{key[:10]}"
        if not folder.is_dir():
            prepare_rows(data, folder, load_tokenizer(plan.model))
        return folder

    def _round_record(self, plan: Plan, pruned: Path, round_folder: Path) -> dict[str, Any]:
        cut = load_config(pruned).layer_drop
        outcome = {"dropped": list(cut["drop_layers"]), "layers": cut["num_base_layers"]}
        if plan.tune is not None:
            lineage: Any = Lineage.load(round_folder / "heal" / "model")
            outcome |= {name: value for name, value in lineage.entries[-1].items() if name == "seconds"}
            outcome["trainable"] = trained_parameters(round_folder / "heal")
        return outcome

    # --- measure ----------------------------------------------------------------------------------------------

    def _measure(self, plan: Plan, model: str, folder: Path) -> Metrics:
        settings = dict(plan.evaluate)
        if settings.pop("merged_in_4_bits", False):
            model = str(self._merge_in_4_bits(plan, folder))
        tasks, texts, files = settings.pop("tasks"), settings.pop("texts"), settings.pop("tasks_from", None)
        if not texts:
            settings = {name: value for name, value in settings.items() if name not in ("length", "windows")}
        metrics = evaluate(
            EvalRequest(
                model,
                tasks=None if tasks is None else tuple(tasks),
                tasks_from=None if files is None else Path(files),
                texts=tuple(texts.values()),
                device=self.device,
                output=folder / "metrics.json",
                answers=self.output / "answers",
                force=True,
                **settings,
            )
        )
        free_memory()
        return metrics

    def _merge_in_4_bits(self, plan: Plan, folder: Path) -> Path:
        """The model as the paper evaluated QLoRA: with the adapter merged into the 4-bit weights."""
        from peft import PeftModel

        from hf_layerprune.files.folders import new_folder
        from hf_layerprune.heal.methods import parse_method
        from hf_layerprune.heal.student import Student, load_student

        merged = folder / "merged_in_4_bits"
        if not merged.is_dir():
            last = folder / f"round-{len(list(self._drops_per_round(plan)))}"
            student = Student.load(self._cut_folder(plan, last))
            model = load_student(student, parse_method("qlora"), dtype="auto")
            with new_folder(merged) as new:
                adapted = PeftModel.from_pretrained(model, str(last / "heal" / "adapter"))
                adapted.merge_and_unload().save_pretrained(new)
                load_tokenizer(student.folder).save_pretrained(new)
            del model
            free_memory()
        return merged


def dropped_in_base(rounds: list[dict[str, Any]]) -> list[int]:
    """The layers that all rounds dropped, as indices in the base; each round indexes the previous round's model."""
    kept = list(range(rounds[0]["layers"]))
    for one in rounds:
        dropped = {kept[i] for i in one["dropped"]}
        kept = [i for i in kept if i not in dropped]
    return sorted(set(range(rounds[0]["layers"])) - set(kept))


def paper_values(metrics: Metrics, plan: Plan) -> dict[str, dict[str, float]]:
    """The numbers in the paper's tables: accuracy by task and its mean, perplexity by text.

    Args:
        metrics (`Metrics`): The results of the evaluation.
        plan (`Plan`): The plan of the run.

    Returns:
        `dict[str, dict[str, float]]`: `value` and `stderr` by name; the mean also has the number of `tasks`.
    """
    own = [one for one in metrics.results if one["weights"] == metrics.weights]
    asked = {"limit": plan.evaluate.get("limit"), "batch_size": plan.evaluate["batch_size"]}
    outcome: dict[str, dict[str, float]] = {}
    tasks: dict[str, dict[str, float]] = {}
    for one in own:
        same = all(one["settings"].get(name) == value for name, value in asked.items())
        if one["kind"] == "accuracy" and one["metric"] == "acc" and same:
            tasks[one["task"]] = {name: one[name] for name in ("value", "stderr") if name in one}
    if tasks and (plan.evaluate["tasks"] is None or set(PAPER) <= set(tasks)):
        mean = sum(one["value"] for one in tasks.values()) / len(tasks)
        error = math.sqrt(sum(one.get("stderr", 0.0) ** 2 for one in tasks.values())) / len(tasks)
        outcome["mean"] = {"value": mean, "stderr": error, "tasks": len(tasks)}
    for name, source in plan.evaluate["texts"].items():
        for one in own:
            same = one["settings"].get("length") == plan.evaluate["length"]
            if one["metric"] == "perplexity" and one["task"] == Path(source).stem and same:
                outcome[name] = {key: one[key] for key in ("value", "stderr") if key in one}
    return outcome | tasks


def has_accelerator() -> bool:
    """Whether torch has a GPU or another accelerator."""
    import torch

    return torch.accelerator.is_available()
