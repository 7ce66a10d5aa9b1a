"""`HealTrainer`: TRL's `SFTTrainer`, with the frozen layers and the teacher taken out of the training loop.

Before the first step, the frozen layers and the teacher run once over all rows ([`precompute`]). Each batch then
contains the states that were computed for its rows, and the forward and backward passes run the trained layers and the
head alone. Everything else comes from TRL and transformers: rows, packing, optimizers, checkpoints, resuming, logging,
accelerate's engines.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from ..errors import CutError, LayerPruneError
from ..families import check_stage
from ..runtime.head import OutputHead
from ..runtime.precision import to_fast_precision
from .batches import Precomputed, StateCollator, count_tokens, distillation_mask, non_padding_mask
from .checkpoints import checkpoint_to_resume
from .config import HealConfig
from .data import has_images
from .features import FeaturePhase, allow_unused_parameters, phased_schedule
from .halving import BatchHalving
from .loss_inputs import LossInputs, compute_in_forward, log_batch
from .losses import Distillation
from .methods import parse_method
from .placement import (
    autocast_on_model_device,
    cast_trained_to_float32,
    check_not_offloaded,
    disable_weight_repacking,
    eager_attention_on_cpu,
    restore_prefix,
    use_one_gpu,
)
from .precompute import disable_input_require_grads, is_prompt_tuned, is_sharded_by_zero3, precompute
from .prepared import check_lengths, keep_labelled_rows, number_rows, sample_rows
from .saving import SavingTrainer

logger = logging.getLogger(__name__)

_EPSILON = 1e-9  # Shares of the steps that are closer are the same.


def _complete_settings(args: HealConfig, model: Any, images: bool) -> None:
    """Set what depends on the model, and what TRL or the engines need."""
    if args.router_aux_loss_coef is None:
        args.router_aux_loss_coef = 0.0  # the routers of the frozen layers do not run in training
    if args.learning_rate is None:
        method = parse_method("last1" if args.method == "auto" else args.method)
        args.learning_rate = method.learning_rate(model.config.get_text_config().hidden_size)
    if images:
        args.pad_to_multiple_of = None  # which TRL's collator for images can't do
    if args.features:
        allow_unused_parameters(args)


class HealTrainer(SavingTrainer):
    """Trains some of the layers of a pruned model.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The pruned model. Parameters with `requires_grad` are trained.
        args ([`HealConfig`]): The settings. Of `method`, only the default learning rate is used.
        teacher (`PreTrainedModel`, *optional*): The dense model, if it is loaded already. Its values do not change,
            but parts of it may be moved to another device or, on some CPUs, cast to float32. By default,
            `args.teacher` is loaded.
        kwargs: For [`~trl.SFTTrainer`]: `train_dataset`, `eval_dataset`, `processing_class`, `peft_config`, ...

    Raises:
        CutError: A row is longer than the model's context, or a trained weight is offloaded.
        LayerPruneError: No row has a token to learn within `max_length`, the settings exclude each other, or `args` or
            `model` is something else.
        UnsupportedModelError: This model type can't be healed.
    """

    loss_is_scaled_for_ga: Any

    def __init__(self, model: Any, args: HealConfig, *, teacher: PreTrainedModel | None = None, **kwargs: Any) -> None:
        if not isinstance(args, HealConfig) or not hasattr(model, "config"):
            raise LayerPruneError(
                "HealTrainer takes a loaded model, and a HealConfig, which is an SFTConfig with more fields"
            )
        check_stage(model.config, "heal")
        _complete_settings(args, model, has_images(kwargs.get("train_dataset")))
        use_one_gpu(model, args)
        disable_weight_repacking(model)
        if args.float32_weights and not (args.bf16 or args.fp16) and args.device.type == "cpu":
            for one in (model, teacher):
                if one is not None:
                    to_fast_precision(one)
        recompute: Any = args.gradient_checkpointing_kwargs or {}
        self._reentrant = bool(args.gradient_checkpointing and recompute.get("use_reentrant"))
        if args.gradient_checkpointing and not self._reentrant:
            disable_input_require_grads(model)
        super().__init__(model, args, **kwargs)
        check_not_offloaded(self.model)
        self.teacher_model, self._warned_no_teacher, self.resumed = teacher, False, False
        self.feature_phase: FeaturePhase | None = None
        if args.features:
            fsdp = getattr(self.accelerator.state, "fsdp_plugin", None)
            if fsdp is not None and getattr(fsdp, "fsdp_version", 1) == 1:
                raise CutError("features=... needs FSDP2; set fsdp_version: 2, or use features=0")
            self.feature_phase = FeaturePhase(self.plain_model)
        # TRL casts adapters of a quantised model to bfloat16. DeepSpeed holds its own float32 copy.
        in_16_bits = args.bf16 or args.fp16 or getattr(self.plain_model, "is_quantized", False)
        if args.float32_weights and in_16_bits and not self.is_deepspeed_enabled:
            cast_trained_to_float32(self.model)
        # DeepSpeed ZeRO-3 can't run the model yet, so its logits can't be checked.
        self._split = is_sharded_by_zero3(self.plain_model)
        self.check_loss()
        if not self.leaves_loss_to_trl:
            compute_in_forward(self, self.output_head)
            # `compute_loss` divides by all tokens of a step, for any model. Transformers before 5.19 reads the second attribute.
            self.loss_is_scaled_for_ga = self.model_accepts_loss_kwargs = True
        self.numbered_datasets: list[Dataset] = []
        if isinstance(self.train_dataset, Dataset):
            self._prepare_rows(kwargs.get("train_dataset"), kwargs.get("eval_dataset"))
        self.data_collator = StateCollator(self.data_collator, self.padding_free)

    def _prepare_rows(self, given: Any, given_for_evaluation: Any) -> None:
        """Leave out rows without a token to learn, check and sample the rest, and number them; `given` is what TRL was given."""
        if not self._is_vision_dataset:
            self.train_dataset = keep_labelled_rows(self.train_dataset, self.args, given)
            self.eval_dataset = keep_labelled_rows(self.eval_dataset, self.args, given_for_evaluation, "evaluation")
            check_lengths(self.train_dataset, self.eval_dataset, self.model.config, self.args)
        self.train_dataset = sample_rows(self.train_dataset, self.args)
        self.train_dataset, self.eval_dataset, self.numbered_datasets = number_rows(
            self.train_dataset, self.eval_dataset
        )

    @functools.cached_property
    def output_head(self) -> OutputHead:
        """The model's output head, checked against the model's own logits."""
        model = self.plain_model
        with eager_attention_on_cpu(model), autocast_on_model_device(model, self.accelerator):  # types may be mixed
            return OutputHead(model)

    # --- set-up ------------------------------------------------------------------------------------------

    @property
    def uses_model_parallelism(self) -> bool:
        """Whether the model or its sequences are split over devices."""
        parallel = self.accelerator.parallelism_config  # accelerate has sp since version 1.12
        return any(getattr(parallel, f"{kind}_enabled", False) for kind in ("cp", "sp", "tp"))

    @property
    def leaves_loss_to_trl(self) -> bool:
        """Whether a setting requires a loss that only TRL computes."""
        smoothed = self.label_smoother is not None or self.compute_loss_func is not None
        other = self.args.loss_type not in ("nll", "chunked_nll") or self.aux_loss_enabled or self._is_vision_dataset
        return self.uses_model_parallelism or smoothed or other or self._split or is_prompt_tuned(self.model)

    def check_loss(self) -> None:
        """Refuse settings of which some need the dense model, and others a loss that only TRL computes."""
        if self.leaves_loss_to_trl and self.args.distils:
            raise CutError(
                f"{self.args.teacher_setting} can't be combined with loss_type, label smoothing, a router loss, images, prompt "
                "tuning, or a model split over devices; use loss=ce and features=0, or do without these"
            )

    @property
    def can_add_gradients_in_forward(self) -> bool:
        """Whether the head's gradients may be added before `backward`: one process without loss scaling or compiling."""
        one = self.accelerator
        plain = one.distributed_type == DistributedType.NO and one.scaler is None
        return plain and self.model.training and not self.args.torch_compile and one.gradient_accumulation_steps == 1

    # --- training ----------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train; see [`~transformers.Trainer.train`].

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): A checkpoint to resume from; `True` for the last
                complete one in the output folder, if there is one.
            args: Passed on to [`~transformers.Trainer.train`].
            kwargs: Passed on to [`~transformers.Trainer.train`].

        Returns:
            `TrainOutput`: The result of [`~transformers.Trainer.train`].

        Raises:
            LayerPruneError: The loss, or a weight of a checkpoint, is not finite.
            CheckpointError: The cache can't be written, its disk is too small, or the checkpoint can't be resumed.
        """
        resume_from_checkpoint = checkpoint_to_resume(resume_from_checkpoint, str(self.args.output_dir))
        self.resumed = resume_from_checkpoint is not None
        if resume_from_checkpoint is not None:
            self.check_resumable(resume_from_checkpoint)
        self._batch_halving = BatchHalving(self)
        precomputed = self.data_collator.precomputed = precompute(self)
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        finally:
            self.data_collator.precomputed = Precomputed(teacher_head=precomputed.teacher_head)
            if precomputed.prefix is not None and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
                restore_prefix(precomputed.prefix, self.plain_model)
        if self.is_world_process_zero():
            for cache in precomputed.caches.values():
                cache.delete()
        return result

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of the learning rate; see [`~transformers.Trainer`]."""
        known = self.lr_scheduler is not None
        schedule = super().create_scheduler(num_training_steps, optimizer)
        if known or not self.args.features:
            return schedule
        if not isinstance(schedule, LambdaLR):
            logger.warning(
                "%s has no separate phases: features are trained at its learning rate", type(schedule).__name__
            )
            return schedule
        first = math.ceil(self.args.features * num_training_steps - _EPSILON)
        warmup = self.args.get_warmup_steps(num_training_steps)
        phases = phased_schedule(schedule.lr_lambdas[0], first, num_training_steps, warmup)
        self.lr_scheduler = LambdaLR(schedule.optimizer, phases)
        return self.lr_scheduler

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Run forward and backward for one batch, in parts if memory runs out, and stop if the loss is not finite."""
        whole = super().training_step
        loss = self._batch_halving.run(lambda batch: whole(model, batch, num_items_in_batch), inputs)
        if not torch.isfinite(loss):
            rows = ", ".join(map(str, inputs["rows"][:8].tolist())) if "rows" in inputs else ""
            where = f", in the batch of rows {rows}" if rows else ""
            raise LayerPruneError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}{where}; {self._recovery_hint()}"
            )
        return loss

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self.is_feature_step and self.is_fsdp_enabled:  # which can't load a state that some parameters lack
            logger.info("step %d is not saved: with FSDP, the first phase has no checkpoints", self.state.global_step)
            return
        super()._save_checkpoint(model, trial)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: `hf-layerprune card` writes the card from the model's history and metrics."""

    # --- the loss ----------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The loss of one batch; see [`~trl.SFTTrainer`]."""
        mode = "train" if self.model.training else "eval"
        local = count_tokens([inputs], self.args).to(inputs["labels"].device)
        feature_mask = non_padding_mask(inputs)
        inputs, features, teacher_states = self._take_states(inputs)
        outputs = None
        if self.leaves_loss_to_trl or return_outputs:
            count = None if num_items_in_batch is None else num_items_in_batch[0]
            found = super().compute_loss(model, dict(inputs), return_outputs, count)
            if self.leaves_loss_to_trl or teacher_states is None:
                return found
            outputs = found[1]
        labels = inputs.pop("labels")[:, 1:]
        counts = local if num_items_in_batch is None else num_items_in_batch
        labelled, distilled, seen = counts.clamp(min=1)
        keep, distillation, share = labels != -100, None, self._kd_share
        if share and teacher_states is None:
            self._handle_missing_teacher()
            share = 0.0
        if share and features is None:  # which are trained on alone
            mask = distillation_mask(inputs, labels, self.args)
            keep = keep | mask
            hidden, how = teacher_states[:, :-1][keep], (self.args.kd_temperature, self.args.kd_direction)
            head: Any = self.data_collator.precomputed.teacher_head
            distillation = Distillation(hidden, head, mask[keep], share / distilled, *how)
        heal = LossInputs(
            keep=keep,
            labels=labels[keep],
            ce_weight=None if share == 1 else (1 - share) / labelled,
            distillation=distillation,
            features=features,
            feature_mask=feature_mask,
            feature_weight=1 / seen,
        )
        # The engine's gradients start from what it returns, which may be rounded.
        loss = model(**inputs, use_cache=False, heal=heal)["loss"]
        loss = loss + (heal.loss - loss).detach().nan_to_num(0, 0, 0)  # an infinite loss stays one
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # DDP takes the mean over processes
        log_batch(self, mode, heal.sums, local)
        return (loss, outputs) if return_outputs else loss

    def _take_states(self, batch: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor | None, Any]:
        """Take what was precomputed out of a batch: the model's inputs, which begin after the frozen layers if these have
        run; the dense model's hidden states after the cut, if this step is to reproduce them; and its last ones, if any.
        """
        inputs = {name: value for name, value in batch.items() if name != "rows"}
        prefix, taught = inputs.pop("prefix_states", None), inputs.pop("teacher_states", None)
        precomputed, features = self.data_collator.precomputed, None
        if prefix is not None and precomputed.prefix is not None:
            prefix.requires_grad_(self._reentrant)  # such checkpointing gives gradients only where the input has one
            inputs = precomputed.prefix.set_output(prefix, inputs)
        if taught is not None and (width := precomputed.feature_width):
            features, taught = taught[..., :width] if self.is_feature_step else None, taught[..., width:]
        return inputs, features, taught

    @property
    def is_feature_step(self) -> bool:
        """Whether this step is one of the first phase."""
        return self.model.training and self.progress < self.args.features - _EPSILON

    @property
    def progress(self) -> float:
        """The share of the steps that are done."""
        return self.state.global_step / max(self.state.max_steps, 1)

    @property
    def _kd_share(self) -> float:
        """The weight of distillation in this step, or in the loss of an evaluation."""
        done = (self.progress - self.args.features) / (1 - self.args.features)  # since the first phase ended
        alone = self.model.training and done < self.args.kd_alone
        return {"ce": 0.0, "kd": 1.0, "ce+kd": 1.0 if alone else self.args.kd_share}[self.args.loss]

    def _handle_missing_teacher(self) -> None:
        """Distillation without the dense model's states can't go on, but an evaluation can measure cross-entropy."""
        if self.model.training:
            raise LayerPruneError(
                f"{self.args.teacher_setting} needs train_dataset when the trainer is created; pass it"
            )
        if not self._warned_no_teacher:
            logger.warning(
                "eval_loss is cross-entropy here: the dense model's states of eval_dataset exist only during train()"
            )
        self._warned_no_teacher = True

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """The evaluation loss of one batch, without its logits, which older versions of TRL compute in full."""
        if not prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs), None, None

    def _get_num_items_in_batch(self, batch_samples: list[dict], device: torch.device) -> Any:
        """The labelled, the distilled and all tokens in all batches of a step, `[3]`."""
        if self.leaves_loss_to_trl:
            count = super()._get_num_items_in_batch(batch_samples, device)
            return None if count is None else torch.as_tensor(count, device=device).reshape(1)
        counts = count_tokens(batch_samples, self.args).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        return counts

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        if "row" not in columns:
            columns.append("row")
