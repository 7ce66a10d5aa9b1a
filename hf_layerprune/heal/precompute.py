"""Computed once per training run: the frozen layers' output, and the dense model's last hidden states, for each row.

There is one pass with the student, whose frozen layers are then unloaded, and one with the teacher, which starts from
the frozen layers' output if it has the same layers. Both are divided among processes, and resume after an interruption.
"""

from __future__ import annotations

import logging
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import CutError
from ..runtime.head import Head
from ..runtime.parts import TrialError, agree, evaluation_mode, trial
from ..runtime.prefix import Prefix, first_trained_layer
from ..versions import installed_version
from .batches import Precomputed
from .isolation import rows_are_isolated
from .placement import is_on_several_devices, restore_prefix
from .store import StateCache, create_cache_folders, hash_rows, hash_tensors
from .teacher import Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .trainer import HealTrainer

logger = logging.getLogger(__name__)

# The columns that TRL's collator takes.
_COLLATOR_COLUMNS = ("input_ids", "labels", "seq_lengths")
_CPU_TOKENS, _DEVICE_TOKENS = 4096, 32768
# Computes the states of a batch from the model's inputs and the numbers of its rows.
_Pass = Callable[[dict[str, Any], Sequence[int]], torch.Tensor]


def precompute(trainer: HealTrainer) -> Precomputed:
    """Compute the states that training does not change, and unload the frozen layers from the trainer's model.

    Raises:
        CutError: The frozen layers can't be cached and `cache="on"`, or the teacher is missing.
        CheckpointError: The cache can't be written, or its disk is too small.
    """
    if trainer._is_vision_dataset:
        if trainer.args.cache == "on":
            raise CutError("cache=on needs rows of text, and these have images; use cache=auto or off")
        logger.warning(
            "the rows have images: TRL's own loss is used, all layers run in every step, and nothing is cached"
        )
        return Precomputed()
    return _Precomputation(trainer).run()


class _Precomputation:
    """The passes of one trainer."""

    def __init__(self, trainer: HealTrainer) -> None:
        self.args = trainer.args
        self.accelerator = trainer.accelerator
        self.collator = trainer.data_collator
        self.model: Any = trainer.plain_model
        self.trainer = trainer
        self.device = trainer.args.device
        self.datasets = trainer.numbered_datasets
        self.packed = any("seq_lengths" in dataset.column_names for dataset in self.datasets)
        self.lengths = [len(ids) for dataset in self.datasets for ids in dataset["input_ids"]]
        self.obstacle = _find_obstacle(trainer)
        self.state_bytes = 0  # size of the prefix's output for a token

    def run(self) -> Precomputed:
        prefix = self._find_prefix() if self.args.cache != "off" else None
        if prefix is None and self.args.cache == "on":
            raise CutError(
                f"cache=on is impossible, since the frozen layers can't be precomputed: {self.obstacle}; use cache=auto or off"
            )
        if prefix is None and self.args.cache == "auto":
            logger.warning("all layers run in every step: %s", self.obstacle)
        teacher = self._load_teacher(prefix) if self.args.distils else None
        if prefix is None and teacher is None:
            return Precomputed()
        caches = dict[str, StateCache]()
        if prefix is not None:
            source = hash_tensors(prefix.parameters(), prefix.depth, self.model.config.to_json_string())
            caches["prefix"] = self._make_cache("prefix", self.state_bytes, source)
        if teacher is not None:
            caches["teacher"] = self._make_cache("teacher", teacher.token_bytes, teacher.fingerprint)
        try:
            with self.accelerator.main_process_first():
                if self.accelerator.is_main_process:
                    create_cache_folders(list(caches.values()))
            if prefix is not None:
                self._run_student(caches["prefix"], prefix)
            head = None if teacher is None else self._run_teacher(caches["teacher"], teacher, caches.get("prefix"))
        except BaseException:  # leave both models as they were
            if teacher is not None:
                teacher.put_back()
            if prefix is not None:
                restore_prefix(prefix, self.model)
            raise
        return Precomputed(caches, prefix, head, 0 if teacher is None else teacher.feature_width)

    def _load_teacher(self, prefix: Prefix | None) -> Teacher:
        args, trainer = self.args, self.trainer
        if not self.datasets:
            raise CutError(
                f"{args.teacher_setting} does not work with streamed data; use loss=ce and features=0, or do not stream"
            )
        dense = args.teacher if trainer.teacher_model is None else trainer.teacher_model
        if dense is None:
            raise CutError(f"{args.teacher_setting} needs the dense model; specify it with teacher=...")
        depths = trainer.feature_phase.teacher_depths if trainer.feature_phase else ()
        return Teacher(dense, self.model, prefix, args.teacher_revision, depths)

    # --- what can be precomputed -------------------------------------------------------------------------

    def _find_prefix(self) -> Prefix | None:
        """The frozen layers, if a trial on a few rows shows that their recorded output can replace them."""
        if self.obstacle:
            return None
        depth = first_trained_layer(self.model)
        if depth == 0:
            self.obstacle = "no layer lies below the first trained parameter"
            return None
        self.model.to(self.device)
        for needs_ids in (False, True):
            prefix = Prefix(self.model, depth, needs_ids=needs_ids)
            try:
                with trial():
                    self.obstacle = self._find_prefix_obstacle(prefix)
            except TrialError as error:
                self.obstacle = f"the model fails without them ({error})"
            finally:
                prefix.restore()
            if not self.obstacle:
                return prefix
        return None

    def _find_prefix_obstacle(self, prefix: Prefix) -> str:
        """Why the recorded states can't replace the layers; empty if they can."""
        rows = list(range(min(2, len(self.datasets[0]))))
        inputs, output = self._collate(rows), self.trainer.output_head
        with self._inference():
            with prefix.record() as states:
                wanted = output.states(**inputs, use_cache=False)
            recorded = states[prefix.depth]
            self.state_bytes = recorded.shape[-1] * recorded.dtype.itemsize
            if recorded.shape[:-1] != inputs["input_ids"].shape:
                return "layers pass on several streams of hidden states"
            self.model.train()
            rerun = prefix.run(**inputs)[prefix.depth]
            self.model.eval()
            if not agree(rerun, recorded):
                return "their output differs in training mode, as with dropout"
            if not self._rows_are_isolated(lambda inputs, _: prefix.run(**inputs)[prefix.depth], self.model):
                return "their output for a row depends on the other rows of the batch"
            prefix.skip()
            states = output.states(**prefix.set_output(recorded, inputs), use_cache=False)
        return "" if agree(states, wanted) else "layers pass more than hidden states to each other"

    # --- the passes --------------------------------------------------------------------------------------

    def _make_cache(self, name: str, token_bytes: int, source: str) -> StateCache:
        """A cache in a folder that is named by a hash of all that decides its states."""
        precision, attention = self.accelerator.mixed_precision, self.model.config._attn_implementation
        library = str(installed_version("transformers"))
        settings = (precision, str(self.model.dtype), attention, self.collator.padding_free, library)
        known = hash_tensors([], source, *map(hash_rows, self.datasets), token_bytes, settings)
        # With `push_to_hub`, transformers uploads the output folder at each save, but nothing that begins with `_`.
        folder = Path(self.args.cache_dir or Path(str(self.args.output_dir)) / "_cache").expanduser()
        return StateCache(folder / f"{name}-{known[:16]}", self.lengths, token_bytes, keep=self.args.keep_cache)

    def _run_student(self, cache: StateCache, prefix: Prefix) -> None:
        self._fill_cache(cache, lambda inputs, _: prefix.run(**inputs)[prefix.depth], "Frozen layers")
        prefix.skip()
        prefix.unload()

    def _run_teacher(self, cache: StateCache, teacher: Teacher, prefix: StateCache | None) -> Head:
        def run(inputs: dict[str, Any], rows: Sequence[int]) -> torch.Tensor:
            shared = None
            if prefix is not None and teacher.shared_depth:
                shared = self.collator.join(prefix.read(rows), inputs).to(self.device)
            return teacher.states(inputs, shared)

        if cache.missing():
            teacher.model.to(self.device)
            with self._inference():
                first = teacher.shared_depth
                if self.collator.padding_free and not self._rows_are_isolated(run, teacher.model, first):
                    raise CutError(
                        f"{self.args.teacher_setting} needs rows that are kept apart, and in this model, those that share a sequence "
                        "see each other; pass packing_strategy=wrapped, or leave out packing and padding_free"
                    )
        self._fill_cache(cache, run, "Dense model")
        return teacher.release(self.device, self.trainer.output_head.head())

    def _compute_states(self, run: _Pass, rows: Sequence[int]) -> list[torch.Tensor]:
        """The states of some rows, which run as one batch."""
        inputs = self._collate(rows)
        return self.collator.split(run(inputs, rows), [self.lengths[row] for row in rows], inputs)

    def _rows_are_isolated(self, run: _Pass, model: Any, first: int = 0) -> bool:
        """Whether the first rows are kept apart in a pass that begins with one of the model's layers."""

        def split(batch: torch.Tensor, rows: Sequence[int]) -> list[torch.Tensor]:
            return self.collator.split(batch, [self.lengths[row] for row in rows], self._collate(rows))

        rows = list(range(min(2, len(self.datasets[0]))))
        return rows_are_isolated(rows, lambda rows: self._compute_states(run, rows), split, model, first)

    def _fill_cache(self, cache: StateCache, run: _Pass, description: str) -> None:
        tokens = _CPU_TOKENS if self.device.type == "cpu" else _DEVICE_TOKENS
        if self.collator.padding_free:  # all rows form one sequence, so attention spans all of them
            tokens = min(tokens, self.args.per_device_train_batch_size * (self.args.max_length or tokens))
        share = self.accelerator.process_index, self.accelerator.num_processes
        with self._inference():
            cache.fill(lambda rows: self._compute_states(run, rows), tokens, description, share)
        self.accelerator.wait_for_everyone()

    @contextmanager
    def _inference(self) -> Iterator[None]:
        with evaluation_mode(self.model), torch.inference_mode(), self.accelerator.autocast():
            yield

    def _collate(self, rows: Sequence[int]) -> dict[str, Any]:
        """The model's arguments for some rows."""
        batch = self.collator.inner([self._example(row) for row in rows])
        moved = {name: v.to(self.device) if torch.is_tensor(v) else v for name, v in batch.items()}
        moved.pop("labels", None)
        return moved

    def _example(self, row: int) -> dict[str, Any]:
        for dataset in self.datasets:
            if row < len(dataset):
                columns = {name: value for name, value in dataset[row].items() if name in _COLLATOR_COLUMNS}
                # Rows of several sets form a batch here, and of these, only some may be packed.
                return {"seq_lengths": [len(columns["input_ids"])]} | columns if self.packed else columns
            row -= len(dataset)
        raise IndexError(row)


def _find_obstacle(trainer: HealTrainer) -> str:
    """Settings that rule out precomputing the frozen layers; empty if there are none."""
    args, model = trainer.args, trainer.plain_model
    if not trainer.numbered_datasets:
        return "the data are streamed, so rows can't be numbered"
    if args.neftune_noise_alpha is not None:
        return "neftune_noise_alpha adds noise to their input"
    if is_prompt_tuned(trainer.model):
        return "their input is trained"
    if trainer.uses_model_parallelism or is_on_several_devices(model):
        return "the model or its sequences are split over devices"
    if is_sharded_by_zero3(model):
        return "DeepSpeed ZeRO-3 has split the weights"
    return ""


def is_sharded_by_zero3(model: PreTrainedModel) -> bool:
    """Whether DeepSpeed ZeRO-3 has split the weights, so that the model only runs inside its engine."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def is_prompt_tuned(model: Any) -> bool:
    """Whether what is trained stands before a model's input, as in prompt and prefix tuning."""
    return any(adapter.is_prompt_learning for adapter in getattr(model, "peft_config", {}).values())


def disable_input_require_grads(model: Any) -> None:
    """Keep gradients from flowing through all frozen layers.

    Gradient checkpointing makes the output of the embeddings require gradients; only reentrant checkpointing needs it.
    """
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    plain.enable_input_require_grads = types.MethodType(lambda self: None, plain)
