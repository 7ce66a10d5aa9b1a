"""Checks before anything is pruned or written: a healing run is refused if a setting can't work or has no effect."""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, CutError, boundary
from ..families import check_stage, check_trainable, layer_count
from ..families.fields import cut_without
from ..options import AMOUNTS, CutOptions, option_fields, refuse_unused
from ..records.fingerprints import CONFIG
from ..records.lineage import FILE_NAME, Lineage
from ..runtime.loading import is_hub_id, load_config
from ..runtime.model_class import model_without_weights, without_zero3
from ..runtime.windows import check_context
from ..select.sets import drop_count
from .checkpoints import checkpoint_to_resume, last_checkpoint
from .features import trained_boundaries
from .methods import parse_method
from .options import RowOptions
from .self_data import SELF
from .student import Student, check_teacher_config, recorded_cut

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedConfig
    from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments

    from .config import HealConfig

logger = logging.getLogger(__name__)

# The options of TRL's `ModelConfig` that are used: for every method, and for LoRA alone.
_MODEL_OPTIONS = ("model_name_or_path", "model_revision", "dtype", "attn_implementation", "trust_remote_code")
_LORA_OPTIONS = (
    "lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_parameters", "lora_modules_to_save",
    "use_rslora", "use_dora",
)  # fmt: skip
_LORA_HINT = "experts need --lora_dropout 0, and --lora_target_modules says which layers LoRA is applied to"
# Settings that nothing is trained with, if they are not above 0.
_POSITIVE_OPTIONS = (
    "max_steps", "num_train_epochs", "learning_rate", "max_length", "per_device_train_batch_size",
    "per_device_eval_batch_size", "gradient_accumulation_steps",
)  # fmt: skip
_DATA_OPTIONS = ("dataset_config", "dataset_train_split", "dataset_test_split", "dataset_streaming")
_EVALUATION_OPTIONS = ("do_eval", "eval_on_start", "load_best_model_at_end")


def check_run(
    script_args: ScriptArguments,
    args: HealConfig,
    model_args: ModelConfig,
    dataset_args: DatasetMixtureConfig,
    cut_args: CutOptions,
    row_args: RowOptions,
) -> Student | None:
    """Refuse what would fail, or have no effect, after hours. Returns the model if it is pruned already."""
    is_finished = _check_output(args)
    if any(getattr(one, "trust_remote_code", False) for one in (args, model_args)):
        raise CutError("models that need code of their own can't be healed; leave --trust_remote_code out")
    if model_args.model_name_or_path is None:
        raise CutError("specify the model with --model_name_or_path")
    check_training(args)
    check_data(script_args, dataset_args, row_args, args)
    name, revision = model_args.model_name_or_path, model_revision_of(model_args)
    if not is_hub_id(name):
        refuse_unused(model_args, ("model_revision",), f"on {name}, which is a local path")
    config = load_config(name, revision=revision)
    cut = recorded_cut(config)
    check_cut(cut_args, name, cut is not None)
    check_method(args, model_args, cut_args, config)
    student = None if cut is None else Student.load(name, revision)
    if student is not None and Lineage.load(student.folder) is None:
        logger.warning(
            "%s has no %s, so the healed model will have no card, and can't be pushed or verified; hf-layerprune prune and "
            "prune_model write one",
            name,
            FILE_NAME,
        )
    output = Path(str(args.output_dir))
    if is_finished and student is None and not (output / "pruned").exists():
        raise CheckpointError(
            f"{output / 'pruned'}, which {output / 'model'} was made of, is gone; use hf-layerprune eval and push, or choose "
            "another --output_dir"
        )
    base, base_revision = (student.base, student.revision) if student else (name, revision)
    check_teacher(args, script_args, row_args, base, base_revision, config)
    return student


def _check_output(args: HealConfig) -> bool:
    """Refuse an output folder that holds something else, and resolve the checkpoint; whether the run was finished before."""
    output, resumes = Path(str(args.output_dir)), str(args.resume_from_checkpoint).lower() == "true"
    if (output / CONFIG).is_file():  # a model folder would get others into it
        raise CheckpointError(f"{output} is a model folder; choose another --output_dir")
    if resumes and os.path.lexists(output / "model"):
        return True
    for folder in (output / "model", output / "adapter"):
        if os.path.lexists(folder):
            raise CheckpointError(f"{folder} exists already; choose another --output_dir, or remove it")
    args.resume_from_checkpoint = checkpoint_to_resume(args.resume_from_checkpoint, str(output))
    begins = args.resume_from_checkpoint is None and not resumes
    if begins and (earlier := last_checkpoint(str(output))) is not None:  # it would be overwritten
        raise CheckpointError(
            f"{earlier} is from an earlier run; resume it with --resume_from_checkpoint true, choose another --output_dir, or "
            f"remove {output}"
        )
    return False


def model_revision_of(model_args: ModelConfig) -> str | None:
    """The branch, tag or commit of the model, if one is named."""
    return None if model_args.model_revision == "main" else model_args.model_revision


def check_data(
    script_args: ScriptArguments, dataset_args: DatasetMixtureConfig, row_args: RowOptions, args: HealConfig
) -> None:
    """Refuse settings that choose no training rows, contradict each other or have no effect, before any row is read."""
    name = script_args.dataset_name
    if not all(is_dataclass(part) for part in dataset_args.datasets):
        raise CutError("each entry of `datasets` is a mapping with a path, such as `- path: rows.jsonl`")
    if dataset_args.datasets:
        refuse_unused(script_args, ["dataset_name", *_DATA_OPTIONS], "with `datasets`, which the settings file names")
    elif not name:
        raise CutError("specify the training data with --dataset_name; with `self`, the dense model writes them")
    else:
        why = "without `datasets` in a settings file, where --dataset_streaming and --dataset_test_split say it"
        refuse_unused(dataset_args, ["streaming", "test_split_size"], why)
    if name == SELF:
        why = "with --dataset_name self, where the dense model writes the rows"
        refuse_unused(script_args, _DATA_OPTIONS, why)
        refuse_unused(row_args, ["template", "rewrite_answers"], why)
        refuse_unused(args, ["completion_only_loss", "dataset_text_field"], why)
    else:
        defaults = RowOptions()  # a settings file that has these may be used with other data
        if (row_args.self_rows, row_args.self_length) != (defaults.self_rows, defaults.self_length):
            logger.info("--self_rows and --self_length have no effect without --dataset_name self")
    refuse_unused(script_args, ["ignore_bias_buffers"], "on the models that this recipe trains")
    if not row_args.rewrite_answers:
        refuse_unused(row_args, ["rewrite_max_tokens", "rewrite_temperature"], "without --rewrite_answers true")
    if (script_args.dataset_streaming or dataset_args.streaming) and (args.distils or row_args.rewrite_answers):
        what = args.teacher_setting if args.distils else "--rewrite_answers"
        raise CutError(f"{what} needs all rows at once; leave out --dataset_streaming (`streaming` in a file)")


def check_training(args: HealConfig) -> None:
    """Refuse settings of the training that have no effect, train nothing, or change a tokenizer that is not kept."""
    for name in _POSITIVE_OPTIONS:
        value = getattr(args, name)
        if value is not None and (value == 0 if name == "max_steps" else value <= 0):  # a negative max_steps is none
            raise CutError(f"--{name} must be above 0")
    if args.eval_strategy == "no":
        # Settings files may keep eval_steps and the like.
        refuse_unused(args, _EVALUATION_OPTIONS, "without --eval_strategy")
    refuse_unused(args, ["model_init_kwargs"], "in this recipe, which has --dtype and --attn_implementation")
    pushes = ["hub_always_push"] if args.hub_strategy == "end" else ["hub_strategy", "hub_always_push"]
    refuse_unused(args, pushes, "in this recipe, which pushes the finished model alone")
    if args.hub_model_id and not args.push_to_hub:  # a settings file that has it may be tried without
        logger.warning("without --push_to_hub, nothing is pushed to %s", args.hub_model_id)
    for name in ("chat_template_path", "eos_token"):
        if getattr(args, name) is not None:
            raise CutError(
                f"--{name} changes the tokenizer only during training: the finished model has the one of its base, with which "
                "verify compares it; change it in a copy of the base, and specify that copy with --model_name_or_path"
            )
    if args.activation_offloading and args.device.type == "cpu":
        raise CutError(
            "--activation_offloading frees memory of a GPU, and training would run on the CPU; leave it out"
        )


def check_cut(cut_args: CutOptions, name: str, pruned: bool) -> None:
    """Refuse to choose layers twice, or on a model that is pruned already."""
    if pruned:
        defaults = replace(CutOptions(), criterion=cut_args.default_criterion)  # which a budget decides
        names = [name for name in option_fields(CutOptions) if getattr(cut_args, name) != getattr(defaults, name)]
        refuse_unused(cut_args, names, f"on {name}, which is pruned already, unlike its base")
    elif cut_args.drop_layers:
        refuse_unused(cut_args, AMOUNTS, "with drop_layers, which names the layers to drop")


def check_method(args: HealConfig, model_args: ModelConfig, cut_args: CutOptions, config: PreTrainedConfig) -> None:
    """Check that a model can be trained as a method asks, as far as that is known before the cut.

    Raises:
        CutError: The method trains more layers than are left, none that `features` needs, or does not use a setting of the
            model; or ZeRO-3 rules out distillation.
        UnsupportedModelError: This model type can't be healed.
        LayerPruneError: The method can't run here.
    """
    from transformers.integrations import is_deepspeed_zero3_enabled

    check_stage(config, "heal")
    check_trainable(config)
    if args.distils and is_deepspeed_zero3_enabled():
        raise CutError(
            f"{args.teacher_setting} needs the dense and the pruned model whole, and DeepSpeed ZeRO-3 splits them; train with "
            "ZeRO-2 (recipes/accelerate/deepspeed_zero2.yaml), or use loss=ce and features=0"
        )
    method = None if args.method == "auto" else parse_method(args.method)
    others = [field.name for field in fields(model_args) if field.name not in (*_MODEL_OPTIONS, *_LORA_OPTIONS)]
    refuse_unused(model_args, others, "in this recipe, where --method says what is trained, such as lora or qlora")
    if method is None or not method.is_lora:
        refuse_unused(model_args, _LORA_OPTIONS, f"with --method {args.method}, unlike with lora")
    if method is not None:
        method.loading_kwargs()
        count = layer_count(config)  # where it is not said which layers go, as many at the end stand for them
        last = range(count - (drop_count(cut_args.drop, count) if cut_args.drop else 1), count)
        cut = recorded_cut(config) or cut_without(cut_args.drop_layers or last, count)
        layers = [cut.new_index[layer] for layer in method.layers(cut)] if method.trains_layers else [0]
        if args.features:
            trained_boundaries(cut, min(layers, default=count))


def check_teacher(
    args: HealConfig,
    script_args: ScriptArguments,
    row_args: RowOptions,
    base: str | None,
    revision: str | None,
    config: PreTrainedConfig,
) -> None:
    """Check the dense model, if one is specified, or teaches or writes rows.

    The base is what the layers are dropped from, if that is known. The config is that of the model to train, or of its
    base.

    Raises:
        CutError: It is needed but not specified, or would have to write rows that are longer than its context.
        CheckpointError: It does not exist, or has another number of layers, vocabulary or width.
    """
    if script_args.dataset_name == SELF:
        check_context(config, row_args.self_length, "self_length")
    name = args.teacher or base
    if name is not None and not is_hub_id(name):
        refuse_unused(args, ("teacher_revision",), f"on {name}, which is a local path")
    used = args.distils or row_args.rewrite_answers or script_args.dataset_name == SELF
    if args.teacher is None and not used:
        return
    if name is None:
        raise CutError("distilling and writing rows need the dense model; specify it with --teacher")
    revision = args.teacher_revision or (revision if name == base else None)
    check_teacher_config(load_config(name, revision=revision), config, name, features=args.features > 0)


@without_zero3()
def dry_run_training(
    args: HealConfig, model_args: ModelConfig, config: PreTrainedConfig, rows: Dataset, evaluated: Any, processor: Any
) -> None:
    """Set up the whole training with a model without weights: its rows, adapter, kernels, optimizer and schedule.

    The config is that of the model to train, or of its base. `args` are left as they are.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from peft import get_peft_model
    from transformers.integrations.liger import apply_liger_kernel

    from .trainer import HealTrainer

    class DryRunTrainer(HealTrainer):
        output_head: Any = None  # it would be measured

        def _move_model_to_device(self, model: Any, device: Any) -> None:
            """Do nothing: there are no weights."""

    args = copy.deepcopy(args)
    features, args.features = args.features, 0.0  # which depends on the cut
    kernels = {"attn_implementation": model_args.attn_implementation} if model_args.attn_implementation else {}
    lora = None if args.method == "auto" else parse_method(args.method).adapter(model_args)
    # With what accelerate keeps of one trainer, the next could not use DeepSpeed, and would be in the first one's loop.
    states = [(each._shared_state, {**each._shared_state}) for each in (PartialState, AcceleratorState, GradientState)]
    silenced = logging.root.manager.disable
    logging.disable(max(silenced, logging.INFO))  # training says it again
    try:
        with TemporaryDirectory() as folder, boundary("can't train", kind=CutError):
            args.output_dir = folder
            if lora is not None:
                with boundary("can't apply LoRA", _LORA_HINT, CutError):
                    get_peft_model(model_without_weights(config), lora)
            model = model_without_weights(config, **kernels)
            data = {"train_dataset": rows, "eval_dataset": evaluated, "processing_class": processor}
            trainer = DryRunTrainer(model, args, peft_config=lora, **data)
            trainer.args.features = features
            trainer.check_loss()
            next(iter(trainer.get_train_dataloader()))
            trainer.create_optimizer_and_scheduler(max(args.max_steps, 1000))
            if args.use_liger_kernel:
                apply_liger_kernel(trainer.model, args.liger_kernel_config)
    finally:
        logging.disable(silenced)
        for state, before in states:
            state.clear()
            state.update(before)
