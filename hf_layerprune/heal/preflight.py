"""Checks before anything is pruned or written: a healing run is refused if a setting can't work or has no effect."""

from __future__ import annotations

import copy
import logging
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, CutError, boundary
from ..families import check_stage, check_trainable, layer_count
from ..families.fields import cut_without
from ..options import AMOUNTS, CutOptions, declared, refuse_unused
from ..runtime.loading import load_config
from ..runtime.model_class import model_without_weights, whole_models
from ..runtime.windows import check_context
from ..select.sets import drop_count
from .features import trained_places
from .methods import parse_method
from .options import RowOptions
from .self_data import SELF
from .student import check_dense, cut_of

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    from .config import HealConfig

# The options of TRL's `ModelConfig` that are used: for every method, and for LoRA alone, with PEFT's names.
_MODEL = ("model_name_or_path", "model_revision", "dtype", "attn_implementation", "trust_remote_code")
_LORA = {
    "lora_r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "lora_target_modules": "target_modules",
    "lora_target_parameters": "target_parameters", "lora_modules_to_save": "modules_to_save",
    "use_rslora": "use_rslora", "use_dora": "use_dora",
}  # fmt: skip
# Settings of the training that count something.
_COUNTS = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_length")
_DATA = ("dataset_config", "dataset_train_split", "dataset_test_split", "dataset_streaming")


def lora_settings(model_args: ModelConfig) -> dict[str, Any]:
    """The settings of LoRA; those that are not set have PEFT's defaults."""
    found = {ours: getattr(model_args, name, None) for name, ours in _LORA.items()}
    return {name: value for name, value in found.items() if value is not None or name == "target_modules"}


def check_data(
    script_args: ScriptArguments, dataset_args: DatasetMixtureConfig, row_args: RowOptions, args: HealConfig
) -> None:
    """Check the settings that choose the training rows, before any row is read.

    Raises:
        CutError: No data set is named, or a setting has no effect on these rows or does not work with them.
    """
    name = script_args.dataset_name
    if not all(is_dataclass(part) for part in dataset_args.datasets):
        raise CutError("each entry of `datasets` is a mapping with a path, such as `- path: rows.jsonl`")
    refuse_unused(script_args, ["ignore_bias_buffers"], "in this recipe")
    if dataset_args.datasets:
        refuse_unused(script_args, ["dataset_name", *_DATA], "beside `datasets`, which the settings file names")
    elif not name:
        raise CutError("specify the training data with --dataset_name; with `self`, the dense model writes them")
    else:
        why = "without `datasets` in a settings file, where --dataset_streaming and --dataset_test_split say it"
        refuse_unused(dataset_args, ["streaming", "test_split_size"], why)
    if name == SELF:
        why = "with --dataset_name self, where the dense model writes the rows"
        refuse_unused(script_args, _DATA, why)
        refuse_unused(row_args, ["template", "rewrite_answers"], why)
        if str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no":
            raise CutError(
                "--eval_strategy needs evaluation rows, and --dataset_name self has none; leave it out, and measure the "
                "finished model with --eval_texts or --eval_tasks"
            )
    if script_args.dataset_streaming or dataset_args.streaming:
        if args.distils or row_args.rewrite_answers:
            what = args.teacher_setting if args.distils else "--rewrite_answers"
            raise CutError(f"{what} needs all rows at once; leave out --dataset_streaming (`streaming` in a file)")
        if args.max_steps <= 0:
            raise CutError("the number of streamed rows is not known; set --max_steps N")


def check_training(args: HealConfig) -> None:
    """Check the settings of the training itself, before anything is read.

    Raises:
        CutError: A setting can't be followed or trains nothing, or it changes a tokenizer that is not kept.
    """
    refuse_unused(args, ["model_init_kwargs"], "in this recipe, which has --dtype and --attn_implementation")
    for name in ("chat_template_path", "eos_token"):
        if getattr(args, name) is not None:
            raise CutError(
                f"--{name} changes the tokenizer only during training: the finished model has the one of its base, with which "
                "verify compares it; change it in a copy of the base, and specify that copy with --model_name_or_path"
            )
    if args.max_steps == 0 or (args.max_steps < 0 and args.num_train_epochs <= 0):
        name = "max_steps" if args.max_steps == 0 else "num_train_epochs"
        raise CutError(f"--{name} {getattr(args, name):g} trains nothing; raise it")
    if args.learning_rate == 0:
        raise CutError("--learning_rate 0 trains nothing; raise it, or leave it out for the method's own")
    for name in _COUNTS:
        count = getattr(args, name)
        if count is not None and count < 1:
            raise CutError(f"--{name} {count} must be at least 1")
    if args.activation_offloading and args.device.type == "cpu":
        raise CutError(
            "--activation_offloading frees memory of a GPU, and training would run on the CPU; leave it out"
        )
    if args.eval_strategy == "no":
        refuse_unused(args, ["do_eval", "eval_on_start", "load_best_model_at_end"], "without --eval_strategy")


def check_cut(cut_args: CutOptions, name: str, pruned: bool) -> None:
    """Check the options that choose the layers to drop.

    Raises:
        CutError: The model is pruned already, or two options choose them.
    """
    if pruned:
        usual = replace(CutOptions(), criterion=cut_args.default_criterion)  # which a budget decides
        names = [option for option in declared(CutOptions) if getattr(cut_args, option) != getattr(usual, option)]
        refuse_unused(cut_args, names, f"on {name}, which is pruned already, unlike its base")
    elif cut_args.drop_layers:
        refuse_unused(cut_args, AMOUNTS, "beside drop_layers, which say which layers go")


def check_method(args: HealConfig, model_args: ModelConfig, cut_args: CutOptions, config: PreTrainedConfig) -> None:
    """Check that a model can be trained as a method asks, as far as that is known before the cut.

    Raises:
        CutError: The method trains more layers than are left, or does not use a setting of the model; or ZeRO-3 rules out
            distillation.
        UnsupportedModelError: This model type can't be healed.
        LayerPruneError: The method can't run here.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    check_stage(config, "heal")
    check_trainable(config)
    if args.distils and is_deepspeed_zero3_enabled():
        raise CutError(
            f"{args.teacher_setting} needs the dense and the pruned model whole, and DeepSpeed ZeRO-3 splits them; train with "
            "ZeRO-2 (recipes/accelerate/deepspeed_zero2.yaml), or use loss=ce without features"
        )
    method = None if args.method == "auto" else parse_method(args.method)
    others = [field.name for field in fields(model_args) if field.name not in (*_MODEL, *_LORA)]
    refuse_unused(model_args, others, "in this recipe, where --method says what is trained, such as lora or qlora")
    if method is None or not method.is_lora:
        refuse_unused(model_args, _LORA, f"with --method {args.method}, unlike with lora")
    if method is not None:
        method.loading()
        method.layers(cut_of(config) or _expected_cut(cut_args, layer_count(config)))
    cut = cut_of(config) or (_expected_cut(cut_args, layer_count(config)) if cut_args.drop_layers else None)
    if args.features and cut is not None:
        trains = method is not None and method.trains_layers
        layers = method.layers(cut) if method is not None and trains else cut.keep
        trained_places(cut, [cut.new_index[layer] for layer in layers])


def _expected_cut(cut_args: CutOptions, num_layers: int) -> Any:
    """A cut of as many layers as the options name, or of a single layer if a target or a budget decides the number."""
    if cut_args.drop_layers:
        return cut_without(cut_args.drop_layers, num_layers)
    count = 1 if cut_args.drop is None else drop_count(cut_args.drop, num_layers)
    return cut_without(range(num_layers - count, num_layers), num_layers)


def check_teacher(
    args: HealConfig,
    script_args: ScriptArguments,
    row_args: RowOptions,
    base: str | None,
    revision: str | None,
    config: PreTrainedConfig,
) -> None:
    """Check the dense model, if one is specified, or teaches or writes rows.

    Args:
        args ([`HealConfig`]): The settings of the training.
        script_args (`ScriptArguments`): The data set.
        row_args ([`RowOptions`]): The settings of the rows.
        base (`str`, *optional*): What the layers are dropped from, if that is known.
        revision (`str`, *optional*): Branch, tag or commit of the base.
        config (`PreTrainedConfig`): The config of the model to train, or of its base.

    Raises:
        CutError: It is needed but not specified, or would have to write rows that are longer than its context.
        CheckpointError: It does not exist, or has another number of layers, vocabulary or width.
    """
    if script_args.dataset_name == SELF:
        check_context(config, row_args.self_length, "self_length")
    used = args.distils or row_args.rewrite_answers or script_args.dataset_name == SELF
    if args.teacher is None and not used:
        return
    name = args.teacher or base
    if name is None:
        raise CutError("distilling and writing rows need the dense model; specify it with --teacher")
    revision = args.teacher_revision or (revision if name == base else None)
    check_dense(load_config(name, revision=revision), config, name, features=args.features > 0)


@whole_models()
def rehearse(
    args: HealConfig, model_args: ModelConfig, config: PreTrainedConfig, rows: Dataset, evaluated: Any, processor: Any
) -> None:
    """Set up the whole training with a model without weights: its rows, adapter, kernels, optimizer and schedule.

    Args:
        args ([`HealConfig`]): The settings of the training, which are left as they are.
        model_args (`ModelConfig`): The settings of the model.
        config (`PreTrainedConfig`): The config of the model to train, or of its base.
        rows (`Dataset`): The training rows, as the trainer takes them.
        evaluated (`Dataset`, *optional*): The evaluation rows.
        processor (`PreTrainedTokenizerBase` or `ProcessorMixin`): The tokenizer, or what also prepares images.

    Raises:
        LayerPruneError: Something can't be set up.
    """
    from transformers.integrations.liger import apply_liger_kernel

    from .trainer import HealTrainer

    class Rehearsal(HealTrainer):
        output_head: Any = None  # it would be measured

        def _move_model_to_device(self, model: Any, device: Any) -> None:
            """Do nothing: there are no weights."""

    args = copy.deepcopy(args)
    args.features = 0.0  # which depends on the cut
    kernels = {"attn_implementation": model_args.attn_implementation} if model_args.attn_implementation else {}
    lora = None if args.method == "auto" else parse_method(args.method).adapter(**lora_settings(model_args))
    logging.disable(logging.INFO)  # training says it again
    try:
        with TemporaryDirectory() as folder, boundary("can't train", kind=CutError):
            args.output_dir = folder
            model = model_without_weights(config, **kernels)
            data = {"train_dataset": rows, "eval_dataset": evaluated, "processing_class": processor}
            trainer = Rehearsal(model, args, peft_config=lora, **data)
            next(iter(trainer.get_train_dataloader()))
            trainer.create_optimizer_and_scheduler(max(args.max_steps, 1000))
            if args.use_liger_kernel:
                apply_liger_kernel(trainer.model, args.liger_kernel_config)
            trainer.accelerator.free_memory()  # or all later steps would be taken for those of an unfinished loop
    finally:
        logging.disable(logging.NOTSET)


def check_resume(word: Any) -> None:
    """Check the checkpoint to go on from.

    Raises:
        CheckpointError: A path is not that of a complete checkpoint.
    """
    from transformers.trainer import TRAINER_STATE_NAME

    named = word is not None and str(word).lower() not in ("true", "false")
    if named and not (Path(word) / TRAINER_STATE_NAME).is_file():
        raise CheckpointError(
            f"{word} has no {TRAINER_STATE_NAME}, so it is not a checkpoint; specify a folder checkpoint-N, or use "
            "--resume_from_checkpoint true for the last one"
        )
