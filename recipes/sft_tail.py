# /// script
# requires-python = ">=3.11"
# dependencies = [
#     "hf-layerprune[train,eval,plots]",
#     "trackio",
# ]
# ///

"""
Drop a quarter of a model's layers, and fine-tune a few of the remaining ones to recover its quality.

# As in the paper (arXiv:2411.15558): drop the last layers, train the head and the last three on instructions
```bash
accelerate launch --config_file recipes/accelerate/single_gpu.yaml recipes/sft_tail.py \
    --model_name_or_path meta-llama/Llama-3.1-8B-Instruct \
    --method lm_head+last3 \
    --dataset_name yahma/alpaca-cleaned \
    --output_dir Llama-3.1-6.3B-tail
```

# Closer to the dense model: repair in closed form, then distil from the dense model on text that it generates
```bash
accelerate launch recipes/sft_tail.py \
    --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
    --drop_layers 12-18 \
    --repair borrow \
    --method behind2 \
    --loss kd \
    --dataset_name self \
    --output_dir SmolLM2-110M
```

# Settings from a file
```bash
accelerate launch recipes/sft_tail.py --config recipes/configs/paper_tail.yaml
```

The output folder gets `pruned` (the model before training), `checkpoint-*`, `adapter`, and `model`, which loads with
plain transformers.
"""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import sys
import traceback
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_layerprune.screen import configure_output

if __name__ == "__main__":
    configure_output()  # before the libraries are imported

try:
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments
except ImportError:
    sys.exit('error: this recipe needs TRL: pip install "hf-layerprune[train]"')

from hf_layerprune.errors import CutError, LayerPruneError, boundary, explain, sanitize, wants_traceback
from hf_layerprune.heal.config import HealConfig
from hf_layerprune.heal.options import FinishOptions, RowOptions
from hf_layerprune.heal.parser import RecipeParser, spell_settings
from hf_layerprune.options import DTYPES, CutOptions, argument_dataclass, copy_fields, refuse_unused
from hf_layerprune.records.requirements import RequireOptions
from hf_layerprune.runtime.model_class import without_zero3
from hf_layerprune.stages.requests import PruneRequest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from hf_layerprune.heal.checkpoints import RunSettings
    from hf_layerprune.heal.student import Student
    from hf_layerprune.heal.trainer import HealTrainer
    from hf_layerprune.measure.requests import EvalRequest
    from hf_layerprune.publish.requests import PushRequest

logger = logging.getLogger("hf_layerprune.recipe")

# What the trainer saved, in the output folder, until the model and the adapter are made of it.
TRAINED = ".trained"

# The cut and the repair. A model that is pruned already is used as it is.
CutArguments = argument_dataclass("CutArguments", CutOptions, skip=("seed",))
# What the finished model must reach.
RequireArguments = argument_dataclass("RequireArguments", RequireOptions)


@dataclass
class MeasureArguments(FinishOptions, RequireArguments):
    """The evaluation at the end. If the model misses a requirement, the exit code is 1 and it is not pushed."""


@dataclass
class ModelArguments(ModelConfig):
    """TRL's `ModelConfig`, with the checkpoint's own type as the default."""

    dtype: str | None = field(default="auto", metadata={"help": "Data type of the weights.", "choices": list(DTYPES)})


def main(
    script_args: ScriptArguments,
    training_args: HealConfig,
    model_args: ModelArguments,
    dataset_args: DatasetMixtureConfig,
    cut_args: CutOptions,
    row_args: RowOptions,
    measure_args: MeasureArguments,
) -> list[str]:
    """Prune, repair, train, merge, evaluate, publish. Returns a line for each requirement that the model misses."""
    from datasets import Dataset
    from huggingface_hub.utils import disable_progress_bars

    from hf_layerprune.heal import preflight
    from hf_layerprune.heal.checkpoints import RunSettings
    from hf_layerprune.heal.data import has_images
    from hf_layerprune.heal.describe import describe_command, describe_rows, row_settings, training_settings
    from hf_layerprune.heal.progress import show_progress
    from hf_layerprune.heal.sources import Sources
    from hf_layerprune.heal.student import adapter_config, load_student
    from hf_layerprune.heal.trainer import HealTrainer
    from hf_layerprune.records.names import strip_local_path
    from hf_layerprune.runtime.loading import load_config, load_processor, load_tokenizer
    from hf_layerprune.runtime.memory import free_memory

    if training_args.hides_progress:
        disable_progress_bars()
    output = Path(str(training_args.output_dir))
    student = preflight.check_run(script_args, training_args, model_args, dataset_args, cut_args, row_args)
    hub = push_request(training_args, output / "model")
    named, revision = str(model_args.model_name_or_path), preflight.model_revision_of(model_args)
    dense = training_args.teacher or (student.base if student else named)
    evaluation = eval_request(output / "model", dense, measure_args)
    tokenizer = load_tokenizer(named, revision=revision)
    data = Sources.read(script_args, dataset_args, row_args, training_args, tokenizer, named, revision)
    processor = load_processor(named, revision=revision) if has_images(data.train) else tokenizer
    rows = data.train
    if rows is None:  # they are written by the dense model, which comes later
        ids = [[0] * row_args.self_length] * row_args.self_rows
        rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
    config = load_config(named, revision=revision)
    preflight.dry_run_training(training_args, model_args, config, rows, data.test, processor)

    student = student or prune(model_args, cut_args, training_args)
    method = student.method(training_args.method)
    training_args.method = method.name
    peft_config = adapter_config(student, method, model_args)  # before rows are written: too few layers may be left
    student.use_base_as_teacher(training_args)
    rows = data.train
    if rows is None or row_args.rewrite_answers:
        rows = generate_rows(rows, row_args, training_args, student, tokenizer)

    kwargs: dict[str, Any] = {"dtype": model_args.dtype, "trust_remote_code": False}
    if model_args.attn_implementation:
        kwargs["attn_implementation"] = model_args.attn_implementation
    model = load_student(student, method, **kwargs)
    with boundary("can't train", "HF_LAYERPRUNE_DEBUG=1 shows where it came from", LayerPruneError):
        trainer = HealTrainer(
            model,
            training_args,
            train_dataset=rows,
            eval_dataset=data.test,
            processing_class=processor,
            peft_config=peft_config,
        )
        show_progress(trainer)
        settings = training_settings(training_args, model_args, script_args, dataset_args)
        settings |= row_settings(row_args, written=data.train is None)
        if training_args.teacher != student.base:
            settings["teacher"] = strip_local_path(str(training_args.teacher))
        run = RunSettings(settings, describe_rows(trainer.numbered_datasets, data.parts, row_args.rewrite_answers))
        folder = output / "model"
        entry = None if os.path.lexists(folder) else train(trainer, run)
    if entry is not None:
        save(trainer, student, entry | {"command": describe_command(Path(__file__), sys.argv[1:])})
    else:
        check_completed(trainer, student, run)

    accelerator = trainer.accelerator
    accelerator.free_memory()  # its references to the model and the optimizer
    del model, trainer
    free_memory()  # the evaluation loads the dense model, too
    missed = finish(folder, training_args, evaluation, hub) if accelerator.is_main_process else []
    accelerator.end_training()  # Trainer.end came after transformers 5.16
    return missed


def push_request(training_args: HealConfig, folder: Path) -> PushRequest | None:
    """The push at the end, if `--push_to_hub` is set: it uploads the finished folder with its card, no checkpoints.

    Without a token that may write, it is refused now, before hours of training.
    """
    if not training_args.push_to_hub:
        return None
    from hf_layerprune.publish.hub.upload import log_in
    from hf_layerprune.publish.requests import PushRequest
    from hf_layerprune.records.names import check_repository

    training_args.push_to_hub = False
    if not training_args.hub_model_id:
        raise CutError("--push_to_hub needs the name of a repository: --hub_model_id NAMESPACE/NAME")
    check_repository(training_args.hub_model_id)
    if training_args.process_index == 0:
        log_in(training_args.hub_token)
    where = {"private": bool(training_args.hub_private_repo), "revision": training_args.hub_revision}
    return PushRequest(folder, training_args.hub_model_id, token=training_args.hub_token, **where)


def eval_request(folder: Path, base: str | None, measure_args: MeasureArguments) -> EvalRequest | None:
    """The evaluation at the end, if there is one. What it could not run, or will not measure, is refused now."""
    from hf_layerprune.measure.evaluate import EvalRequest, check_request

    if not (measure_args.eval_tasks or measure_args.eval_texts or measure_args.eval_from):
        if measure_args.require:
            raise CutError("--require needs numbers; say what to measure: --eval_tasks, --eval_texts or --eval_from")
        refuse_unused(measure_args, ("eval_limit",), "without --eval_tasks or --eval_from")
        return None
    request = EvalRequest(
        str(folder),
        base=base,
        tasks=_split_names(measure_args.eval_tasks),
        tasks_from=Path(measure_args.eval_from) if measure_args.eval_from else None,
        texts=_split_names(measure_args.eval_texts),
        limit=measure_args.eval_limit,
        require=measure_args.require,
    )
    check_request(request)
    return request


@without_zero3()
def prune(model_args: ModelArguments, cut_args: CutOptions, training_args: HealConfig) -> Student:
    """Prune the model, unless an earlier start of this run did."""
    from hf_layerprune.heal.preflight import model_revision_of
    from hf_layerprune.heal.student import Student
    from hf_layerprune.stages.prune import is_already_pruned, prune_to

    folder = Path(str(training_args.output_dir)) / "pruned"
    named = {"base": model_args.model_name_or_path, "output": str(folder), "revision": model_revision_of(model_args)}
    request = copy_fields(PruneRequest, cut_args, seed=training_args.seed, **named)
    with training_args.main_process_first(local=False, desc="pruning"):
        if training_args.process_index == 0 and not is_already_pruned(request, folder):
            logger.info("%s", prune_to(request))
    return Student.load(folder)


@without_zero3()
def generate_rows(
    rows: Dataset | None,
    row_args: RowOptions,
    training_args: HealConfig,
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
) -> Dataset:
    """Rows that the dense model writes, or whose answers it rewrites; all processes share the work."""
    from hf_layerprune.heal.self_data import RowWriter
    from hf_layerprune.heal.stage import weights_dtype
    from hf_layerprune.runtime.loading import load_base
    from hf_layerprune.runtime.precision import to_fast_precision

    # In the student's type, since the weights of a GGUF file would be unpacked to float32.
    source, revision = str(training_args.teacher), training_args.teacher_revision
    dense: Any = load_base(source, revision=revision, dtype=weights_dtype(student))
    dense = to_fast_precision(dense.to(training_args.device))
    folder = Path(str(training_args.output_dir)) / "self"
    writer = RowWriter(dense, tokenizer, folder, training_args.row_seed)
    with boundary(f"{source} can't write rows", kind=LayerPruneError):
        if rows is None:
            return writer.generate_rows(row_args.self_rows, row_args.self_length)
        return writer.rewrite_answers(rows, row_args.rewrite_max_tokens, row_args.rewrite_temperature)


def train(trainer: HealTrainer, run: RunSettings) -> dict[str, Any]:
    """Train to the end. Returns the entry in the history."""
    from hf_layerprune.records.lineage import stage_entry

    trainer.add_callback(run)
    with stage_entry("heal", run.settings) as entry:
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    steps, end = trainer.state.global_step, trainer.state.max_steps
    if steps < end:  # such as by SIGTERM with --enable_jit_checkpoint
        raise LayerPruneError(
            f"training was stopped after {steps} of {end} steps; go on with --resume_from_checkpoint true"
        )
    if steps > end:
        raise LayerPruneError(
            f"the checkpoint to resume from has {steps} steps, and training ends after {end}; train for longer, or specify "
            "an earlier checkpoint"
        )
    if trainer.resumed:
        del entry["seconds"]  # of the last part alone
    return entry | {"data": run.data} | ({"resumed": run.resumed} if run.resumed else {})


def save(trainer: HealTrainer, student: Student, entry: dict[str, Any]) -> None:
    """Save the adapter and the merged model; the merge happens on disk, so it works with every engine."""
    from hf_layerprune.heal.stage import write_healed

    output = Path(str(trainer.args.output_dir))
    trained = output / TRAINED
    if trainer.is_world_process_zero():
        shutil.rmtree(trained, ignore_errors=True)  # what an earlier run left would be taken for this one's
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(trained))
    if trainer.is_world_process_zero():
        with without_zero3():
            write_healed(student, trained, output / "model", entry, adapter=output / "adapter")
        shutil.rmtree(trained, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def check_completed(trainer: HealTrainer, student: Student, run: RunSettings) -> None:
    """Check a model that an earlier start of this run completed, and write its adapter if that start was killed before."""
    from hf_layerprune.heal.stage import write_adapter

    output = Path(str(trainer.args.output_dir))
    student.check_healed(output / "model", run)
    logger.warning("%s is complete, so it is not trained again", output / "model")
    if trainer.is_world_process_zero() and (output / TRAINED).is_dir():
        with without_zero3():
            write_adapter(student, output / TRAINED, output / "model", output / "adapter")
        shutil.rmtree(output / TRAINED, ignore_errors=True)


@without_zero3()
def finish(
    folder: Path, training_args: HealConfig, evaluation: EvalRequest | None, hub: PushRequest | None
) -> list[str]:
    """Evaluate the model, write its card, and push it if it meets its requirements. Returns those that it misses."""
    from hf_layerprune.publish.card.writing import write_card

    missed, base, revision = [], training_args.teacher, training_args.teacher_revision
    if evaluation is not None:
        from hf_layerprune.measure.evaluate import evaluate

        request = replace(evaluation, base=base, base_revision=revision)
        missed = [outcome.text for outcome in evaluate(request).outcomes if not outcome.met]
    try:
        write_card(folder)
    except LayerPruneError as error:  # such as a licence that only the user knows; the model is complete without it
        logger.warning("the model card was not written: %s (hf-layerprune card %s)", error, folder)
    following = ["hf-layerprune", "eval", str(folder), "--base", str(base)]
    following += ["--base-revision", revision] if revision else []
    logger.info("the model is in %s; next: %s", folder, shlex.join(following))
    if hub is not None and missed:
        logger.warning("the model was not pushed, because it misses a requirement")
    elif hub is not None:
        from hf_layerprune.publish.hub.push import push

        logger.info("pushed to %s", push(hub).model.url)
    return missed


def _split_names(words: str | None) -> tuple[str, ...] | None:
    return tuple(word.strip() for word in words.split(",")) if words else None


ARGUMENTS: Any = (
    ScriptArguments, HealConfig, ModelArguments, DatasetMixtureConfig, CutArguments, RowOptions, MeasureArguments
)  # fmt: skip


def make_parser() -> RecipeParser:
    return RecipeParser(ARGUMENTS)


def run() -> int:
    """Run the command line; returns the exit code."""
    try:
        with boundary("can't read the settings", "--help lists the options, docs/options.md explains them", CutError):
            settings = make_parser().parse_args_and_config()
        missed, code = main(*settings), 1
    except (Exception, KeyboardInterrupt) as error:
        if wants_traceback():
            print(sanitize(traceback.format_exc()), file=sys.stderr)
        message, code = explain(error, spell=lambda message: spell_settings(message, ARGUMENTS))
        missed = [message]
    for line in missed:
        print(f"error: {line}", file=sys.stderr)
    return code if missed else 0


if __name__ == "__main__":
    sys.exit(run())
