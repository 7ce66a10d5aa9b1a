"""How a trainer whose frozen layers are taken out saves what it trains, and goes on from a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer import OPTIMIZER_NAME

from ..cut.header import read_header
from ..errors import LayerPruneError, boundary
from ..runtime.parts import replace_method
from .batches import StateCollator
from .checkpoints import last_checkpoint
from .config import HealConfig

from trl import SFTTrainer  # isort: skip (if TRL is missing, `.config` raises an error that says what to install)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_RESUME_HINT = (
    "train the same weights as it does, with the same optim, kind of schedule and engine (FSDP, DeepSpeed or neither), or start "
    "in another --output_dir"
)
# Settings of optimizers, as these name them; `lr` follows the schedule. Some keep their own state beside them.
_OPTIMIZER_SETTINGS = ("betas", "eps", "momentum", "weight_decay")
# Entries of their groups that schedules add, and stable_adamw in training.
_ADDED = {"initial_lr", "step"}


class SavingTrainer(SFTTrainer):
    """The part of [`HealTrainer`] that saves and resumes."""

    args: HealConfig
    model: Any
    data_collator: StateCollator
    _split: bool  # by DeepSpeed ZeRO-3
    _gathered: dict[str, torch.Tensor] | None = None
    _present_groups: Sequence[dict[str, Any]] = ()

    @property
    def plain_model(self) -> PreTrainedModel:
        """The transformers model itself, without PEFT's and accelerate's wrappers."""
        model = self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=True)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the adapter, or the model; called by all processes.

        In a checkpoint, tensors have the names that they have in the model, by which the Trainer loads them: those that some
        types have on disk would be skipped with a warning (huggingface/transformers#48805).

        Raises:
            LayerPruneError: A weight is not finite.
        """
        broken = [n for n, p in self.model.named_parameters() if p.requires_grad and not torch.isfinite(p).all()]
        if broken:
            raise LayerPruneError(
                f"{broken[0]} has a value that is not finite after step {self.state.global_step}; {self._recovery_hint()}"
            )
        adapters = getattr(self.model, "peft_config", {}).values()
        if self._split and any(getattr(adapter, "repaired_modules", None) for adapter in adapters):
            # Of an adapter, transformers passes on trained weights alone under ZeRO-3; a repair is frozen.
            engine: Any = self.deepspeed
            self._gathered = engine._zero3_consolidated_16bit_state_dict()
        save, in_checkpoint = self.plain_model.save_pretrained, _internal_call and not adapters
        by_own_names = partial(save, save_original_format=False) if in_checkpoint else save
        with replace_method(self.plain_model, "save_pretrained", by_own_names):
            super().save_model(output_dir, _internal_call)
        self._gathered = None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        state_dict, prefix = self._gathered or state_dict, self.data_collator.precomputed.prefix
        if prefix is not None and self.model is self.plain_model:  # a whole model, not an adapter
            state_dict = (state_dict or self.model.state_dict()) | prefix.state_dict()
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        with boundary(f"can't resume {resume_from_checkpoint}", _RESUME_HINT):
            super()._load_from_checkpoint(resume_from_checkpoint, *args, **kwargs)

    def check_resumable(self, checkpoint: str) -> None:
        """Refuse a checkpoint of other weights or another optimizer before anything is computed. No weight is read.

        Another optimizer is refused later, by `train`, under FSDP and DeepSpeed, which can't load one yet; and with LOMO, whose
        optimizer has the frozen weights as well, which are not taken out yet.
        """
        engine = self.is_fsdp_enabled or self.is_deepspeed_enabled
        with boundary(f"can't resume {checkpoint}", _RESUME_HINT):
            adapter = self.model.active_adapter if hasattr(self.model, "peft_config") else "default"
            folder = Path(checkpoint, "" if adapter == "default" else adapter)  # as PEFT saves it
            headers = [read_header(path) for path in folder.glob("*.safetensors")]
            if headers or not engine:  # which may have them in files of its own
                self._check_weights({one.name: one.shape for header in headers for one in header.tensors})
            if engine or self.args.optim in ("lomo", "adalomo"):
                return
            state = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="meta", mmap=True, weights_only=True)
            present: Any = self.create_optimizer().param_groups
            # Loading adds what older versions of the optimizer did not have.
            _check_groups(
                [{**now, **group} for group, now in zip(state["param_groups"], present, strict=True)], present
            )
            if [len(group["params"]) for group in state["param_groups"]] != [len(now["params"]) for now in present]:
                raise ValueError("its optimizer has other weights")

    def _check_weights(self, stored: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse the weights of a checkpoint, given by their names and shapes, that are not those that it would be saved with."""
        from peft import get_peft_model_state_dict

        own: Mapping[str, torch.Tensor]
        if hasattr(self.model, "peft_config"):
            own, unsaved = get_peft_model_state_dict(self.model, adapter_name=self.model.active_adapter), set[str]()
        else:
            model = self.plain_model
            own, unsaved = model.state_dict(), {*model.all_tied_weights_keys, *(model._keys_to_ignore_on_save or ())}
        # Split, they have no shapes of their own.
        shapes = {
            name: stored.get(name, ()) if self._split else tuple(one.shape)
            for name, one in own.items()
            if name in stored or name not in unsaved
        }
        for name in sorted(shapes.keys() | stored.keys()):
            if stored.get(name) != shapes.get(name):
                what = "lacks" if name not in stored else "has" if name not in shapes else "has another shape of"
                raise ValueError(f"it {what} {name}")

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule of the learning rate; see [`~transformers.Trainer`]."""
        schedule = super().create_scheduler(num_training_steps, optimizer)
        groups: Any = getattr(self.optimizer, "param_groups", ())
        for group in groups:
            group.setdefault("initial_lr", group["lr"])  # reduce_lr_on_plateau does not say it, and a run may resume
        self._present_groups = [dict(group) for group in groups]  # DeepSpeed loads a checkpoint right after this
        return schedule

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Load their states, but not the optimizer's settings, which torch and DeepSpeed restore with them."""
        optimizer: Any = self.optimizer
        # Accelerate wraps the schedule of an optimizer that DeepSpeed's settings name.
        schedule: Any = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)
        present = self._present_groups
        with boundary(f"can't resume {checkpoint}", _RESUME_HINT):
            super()._load_optimizer_and_scheduler(checkpoint)
            _check_groups(optimizer.param_groups, present)
            for group, now in zip(optimizer.param_groups, present, strict=True):
                group.update({name: now[name] for name in _OPTIMIZER_SETTINGS if name in now})
                if "initial_lr" in group and "initial_lr" in now:
                    group["lr"] *= now["initial_lr"] / group["initial_lr"]
                    group["initial_lr"] = now["initial_lr"]
            if isinstance(schedule, LambdaLR):  # whose other settings may have changed as well
                factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
                for group, factor in zip(optimizer.param_groups, factors, strict=True):
                    group["lr"] = group["initial_lr"] * factor
            if hasattr(schedule, "base_lrs"):
                schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
                schedule._last_lr = [group["lr"] for group in optimizer.param_groups]  # for the log

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Of a whole model's checkpoint, the frozen layers are not loaded: they were taken out, and are the same."""
        prefix = self.data_collator.precomputed.prefix
        out = prefix.state_dict() if prefix is not None else {}
        left = [name for name in load_result.unexpected_keys if name not in out]
        super()._issue_warnings_after_load(load_result._replace(unexpected_keys=left))

    def _recovery_hint(self) -> str:
        last = last_checkpoint(str(self.args.output_dir))
        kept = f"the last checkpoint is {last}" if last else "no checkpoint was saved before"
        return f"{kept}; try a learning rate below {self.args.learning_rate:g}, or check the data"


def _check_groups(groups: Sequence[Mapping[str, Any]], present: Sequence[Mapping[str, Any]]) -> None:
    """Refuse the parameter groups of an optimizer of another kind than the present one."""
    for group, now in zip(groups, present, strict=True):
        if (group.keys() ^ now.keys()) - _ADDED:
            raise ValueError("its optimizer has other settings")
