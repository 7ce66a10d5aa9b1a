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
import shutil
import sys
import traceback
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_layerprune.screen import settle

if __name__ == "__main__":
    settle()  # before the libraries are imported

try:
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, TrlParser
except ImportError:
    sys.exit('error: this recipe needs TRL: pip install "hf-layerprune[train]"')

from hf_layerprune.errors import CheckpointError, CutError, LayerPruneError, boundary
from hf_layerprune.heal.config import HealConfig
from hf_layerprune.heal.options import FinishOptions, RowOptions
from hf_layerprune.options import DTYPES, CutOptions, arguments, take
from hf_layerprune.records.requirements import RequireOptions
from hf_layerprune.stages.requests import PruneRequest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from hf_layerprune.heal.self_data import Writer
    from hf_layerprune.heal.student import Student
    from hf_layerprune.heal.trainer import HealTrainer
    from hf_layerprune.measure.requests import EvalRequest
    from hf_layerprune.publish.requests import PushRequest

logger = logging.getLogger("hf_layerprune.recipe")


# The cut and the repair. A model that is pruned already is used as it is.
CutArguments = arguments("CutArguments", CutOptions, skip=("seed",))
# What the finished model must reach.
RequireArguments = arguments("RequireArguments", RequireOptions)


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
    from hf_layerprune.heal.data import has_images
    from hf_layerprune.heal.progress import show_progress
    from hf_layerprune.heal.stage import describe_command, describe_rows, settings_of
    from hf_layerprune.heal.student import adapter_config, load_student
    from hf_layerprune.heal.trainer import HealTrainer
    from hf_layerprune.records.lineage import stage
    from hf_layerprune.runtime.loading import load_config, load_processor, load_tokenizer

    output = Path(str(training_args.output_dir))
    for folder in (output / "model", output / "adapter"):
        if os.path.lexists(folder):
            raise CheckpointError(f"{folder} exists already; name another --output_dir, or remove it")
    if any(getattr(args, "trust_remote_code", False) for args in (training_args, model_args)):
        raise LayerPruneError("models that need code of their own can't be healed; leave --trust_remote_code out")
    hub = push_request(training_args, output / "model")
    dense = training_args.teacher or model_args.model_name_or_path
    evaluation = eval_request(output / "model", dense, measure_args)
    if training_args.teacher:
        load_config(training_args.teacher, revision=training_args.teacher_revision)
    raw_train, raw_test, name = load_data(script_args, dataset_args, training_args)

    student = prepare_student(model_args, cut_args, training_args)
    method = student.method(training_args.method)
    training_args.method = method.name
    if training_args.teacher in (None, student.base):  # the very weights that the layers were dropped from
        training_args.teacher = student.base
        training_args.teacher_revision = training_args.teacher_revision or student.revision
    tokenizer = load_tokenizer(student.folder)
    train_rows, test_rows = prepare_rows(raw_train, raw_test, name, row_args, training_args, student, tokenizer)

    kwargs: dict[str, Any] = {"dtype": model_args.dtype, "trust_remote_code": False}
    if model_args.attn_implementation:
        kwargs["attn_implementation"] = model_args.attn_implementation
    model = load_student(student, method, **kwargs)
    lora = {"r": model_args.lora_r, "alpha": model_args.lora_alpha, "dropout": model_args.lora_dropout}
    peft_config = adapter_config(student, method, **lora, target_modules=model_args.lora_target_modules)
    with boundary("can't train", "HF_LAYERPRUNE_DEBUG=1 shows where it came from", LayerPruneError):
        trainer = HealTrainer(
            model,
            training_args,
            train_dataset=train_rows,
            eval_dataset=test_rows,
            processing_class=load_processor(student.folder) if has_images(train_rows) else tokenizer,
            peft_config=peft_config,
        )
        show_progress(trainer)
        with stage("heal", settings_of(training_args)) as entry:
            trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    entry |= {"data": describe_rows(trainer.numbered_datasets, name)}
    entry |= {"command": describe_command(["accelerate", "launch", "recipes/sft_tail.py"], sys.argv[1:])}
    folder = save(trainer, student, entry)

    missed = []
    if trainer.is_world_process_zero():
        missed = finish(folder, training_args, evaluation, hub)
    trainer.accelerator.end_training()  # Trainer.end came after transformers 5.16
    return missed


def push_request(training_args: HealConfig, folder: Path) -> PushRequest | None:
    """The push at the end, if `--push_to_hub` is set: it uploads the finished folder with its card, no checkpoints.

    Without a token that may write, it is refused now, before hours of training.
    """
    if not training_args.push_to_hub:
        return None
    from hf_layerprune.publish.hub.upload import log_in
    from hf_layerprune.publish.requests import PushRequest

    training_args.push_to_hub = False
    if not training_args.hub_model_id:
        raise LayerPruneError("--push_to_hub needs the name of a repository: --hub_model_id NAMESPACE/NAME")
    if training_args.process_index == 0:
        log_in(training_args.hub_token)
    private = bool(training_args.hub_private_repo)
    return PushRequest(folder, training_args.hub_model_id, private=private, token=training_args.hub_token)


def eval_request(folder: Path, base: str | None, measure_args: MeasureArguments) -> EvalRequest | None:
    """The evaluation at the end, if there is one. What it could not run, or will not measure, is refused now."""
    from hf_layerprune.measure.evaluate import EvalRequest, check_request

    if not (measure_args.eval_tasks or measure_args.eval_texts or measure_args.eval_from):
        if measure_args.require:
            raise CutError("--require needs numbers; say what to measure: --eval_tasks, --eval_texts or --eval_from")
        return None
    request = EvalRequest(
        str(folder),
        base=base,
        tasks=_names(measure_args.eval_tasks),
        tasks_from=Path(measure_args.eval_from) if measure_args.eval_from else None,
        texts=_names(measure_args.eval_texts),
        limit=measure_args.eval_limit,
        require=measure_args.require,
    )
    check_request(request)
    return request


def prepare_student(model_args: ModelArguments, cut_args: CutOptions, training_args: HealConfig) -> Student:
    """The pruned model: pruned now, pruned by an earlier start of this run, or named by the user."""
    from hf_layerprune.heal.student import Student, cut_of
    from hf_layerprune.runtime.loading import load_config
    from hf_layerprune.stages.prune import prune_to, was_made

    name = model_args.model_name_or_path
    if name is None:
        raise LayerPruneError("name the model with --model_name_or_path")
    revision = None if model_args.model_revision == "main" else model_args.model_revision
    if cut_of(load_config(name, revision=revision)) is not None:
        if cut_args.drop_layers or cut_args.repair:
            raise LayerPruneError(f"{name} is pruned already; leave --drop_layers and --repair out, or name its base")
        return Student.at(name, revision)
    folder = Path(str(training_args.output_dir)) / "pruned"
    request = take(PruneRequest, cut_args, base=name, output=str(folder), seed=training_args.seed, revision=revision)
    with training_args.main_process_first(local=False, desc="pruning"):
        if training_args.process_index == 0 and not was_made(request, folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            logger.info("%s", prune_to(request))
    return Student.at(folder)


def load_data(
    script_args: ScriptArguments, dataset_args: DatasetMixtureConfig, training_args: HealConfig
) -> tuple[Dataset | None, Dataset | None, str]:
    """The raw rows and the name of their source.

    Returns:
        `tuple`: The training rows, `None` if the dense model is to write them; the evaluation rows if
        `--eval_strategy` is set; and the name.
    """
    from hf_layerprune.heal.data import load_mixture, load_rows, pick_split
    from hf_layerprune.heal.self_data import SELF

    name = script_args.dataset_name
    if dataset_args.datasets:
        splits = load_mixture(dataset_args, training_args.data_seed or training_args.seed)
        name = "+".join(part.path for part in dataset_args.datasets)
    elif not name:
        raise LayerPruneError("name the training data with --dataset_name; with `self`, the dense model writes them")
    elif name == SELF:
        return None, None, name
    else:
        splits = load_rows(name, config=script_args.dataset_config, streaming=script_args.dataset_streaming)
    train = pick_split(splits, script_args.dataset_train_split, name)
    if training_args.eval_strategy == "no":
        return train, None, name
    return train, pick_split(splits, script_args.dataset_test_split, name), name


def prepare_rows(
    train: Dataset | None,
    test: Dataset | None,
    name: str,
    row_args: RowOptions,
    training_args: HealConfig,
    student: Student,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Dataset, Dataset | None]:
    """The training rows, written by the dense model if there are none, and the evaluation rows, ready for the trainer."""
    from hf_layerprune.families.multimodal import placeholders
    from hf_layerprune.heal.data import has_images, shape_rows
    from hf_layerprune.runtime.loading import load_config, load_processor

    seed = training_args.data_seed or training_args.seed
    if train is None:
        writer = make_writer(training_args, student, tokenizer, seed)
        return writer.rows(row_args.self_rows, row_args.self_length), None

    processor = partial(load_processor, student.folder) if placeholders(load_config(student.folder)) else None

    def shaped(rows: Dataset) -> Dataset:
        return shape_rows(rows, tokenizer, row_args.template, name, training_args.dataset_text_field, processor)

    train = shaped(train)
    if row_args.rewrite_answers:
        if has_images(train):
            raise CutError(f"{name} has images, and --rewrite_answers rewrites answers to text alone; leave it out")
        writer = make_writer(training_args, student, tokenizer, seed)
        train = writer.rewritten(train, row_args.rewrite_max_tokens, row_args.rewrite_temperature)
    return train, None if test is None else shaped(test)


def make_writer(training_args: HealConfig, student: Student, tokenizer: PreTrainedTokenizerBase, seed: int) -> Writer:
    """The dense model as a writer of rows; all processes share the work."""
    from accelerate.state import PartialState

    from hf_layerprune.heal.self_data import Writer
    from hf_layerprune.heal.stage import weights_dtype
    from hf_layerprune.runtime.loading import load_base
    from hf_layerprune.runtime.precision import in_fast_precision

    if training_args.teacher is None:
        raise LayerPruneError("writing rows needs the dense model; name it with --teacher")
    # In the student's type, since the weights of a GGUF file would be unpacked to float32.
    source, revision = training_args.teacher, training_args.teacher_revision
    dense: Any = load_base(source, revision=revision, dtype=weights_dtype(student))
    dense = in_fast_precision(dense.to(training_args.device))
    share = training_args.process_index, training_args.world_size
    folder = Path(str(training_args.output_dir)) / "self"
    return Writer(dense, tokenizer, folder, seed, share, PartialState().wait_for_everyone)


def save(trainer: HealTrainer, student: Student, entry: dict[str, Any]) -> Path:
    """Save the adapter and the merged model; the merge happens on disk, so it works with every engine."""
    from hf_layerprune.heal.stage import write_healed

    output = Path(str(trainer.args.output_dir))
    trained = output / ".trained"
    if trainer.is_world_process_zero():
        shutil.rmtree(trained, ignore_errors=True)  # what an earlier run left would be taken for this one's
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(trained))
    if trainer.is_world_process_zero():
        write_healed(student, trained, output / "model", entry, adapter=output / "adapter")
        shutil.rmtree(trained, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    return output / "model"


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
    where = f" --base-revision {revision}" if revision else ""
    logger.info("the model is in %s; next: hf-layerprune eval %s --base %s%s", folder, folder, base, where)
    if hub is not None and missed:
        logger.warning("the model was not pushed, because it misses a requirement")
    elif hub is not None:
        from hf_layerprune.publish.hub.push import push

        _, done = push(hub)
        logger.info("pushed to %s", done.url)
    return missed


def _names(words: str | None) -> tuple[str, ...] | None:
    return tuple(word.strip() for word in words.split(",")) if words else None


def make_parser() -> TrlParser:
    """The command line."""
    own = (ModelArguments, DatasetMixtureConfig, CutArguments, RowOptions, MeasureArguments)
    types: Any = (ScriptArguments, HealConfig, *own)
    return TrlParser(types)


if __name__ == "__main__":
    try:
        with boundary("can't read the settings", "--help lists the options, docs/options.md explains them", CutError):
            settings = make_parser().parse_args_and_config()
        missed = main(*settings)
    except LayerPruneError as error:
        if os.environ.get("HF_LAYERPRUNE_DEBUG", "0") not in ("", "0"):
            traceback.print_exc()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, CutError) else 1)
    for line in missed:
        print(f"error: {line}", file=sys.stderr)
    sys.exit(1 if missed else 0)
