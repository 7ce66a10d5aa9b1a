"""Computed once per training run: the frozen layers' output, and the dense model's last hidden states, for each row.

There is one pass with the student, whose frozen layers are then unloaded, and one with the teacher, which starts at
the first layer that differs from the student's. Both are divided among processes, and resume after an interruption.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import LayerPruneError
from ..runtime.parts import TROUBLE, close
from ..runtime.prefix import Prefix, first_trained_layer
from .batches import Precomputed
from .store import Column, StateStore, fill, hash_rows, hash_tensors
from .student import cut_of
from .teacher import Teacher

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .trainer import HealTrainer

logger = logging.getLogger(__name__)

# The columns that TRL's collator takes.
_FED = ("input_ids", "labels", "seq_lengths")
_CPU_TOKENS, _DEVICE_TOKENS = 4096, 32768


def precompute(trainer: HealTrainer, teacher: PreTrainedModel | None = None) -> Precomputed:
    """Compute the states that training does not change.

    Args:
        trainer ([`HealTrainer`]): The trainer, before training.
        teacher (`PreTrainedModel`, *optional*): The dense model, if it is loaded already.

    Returns:
        `Precomputed`: The stored states. If the frozen layers' output was computed, these layers are unloaded from the
            trainer's model.

    Raises:
        LayerPruneError: `cache="on"` is not possible, or there is no teacher.
        CheckpointError: The cache can't be written, or its disk is too small.
    """
    return _Run(trainer).run(teacher)


class _Run:
    """The passes of one trainer."""

    def __init__(self, trainer: HealTrainer) -> None:
        self.args = trainer.args
        self.accelerator = trainer.accelerator
        self.collator = trainer.data_collator
        self.model: Any = trainer.plain_model
        self.output = trainer.output_head
        self.device = trainer.args.device
        self.datasets = trainer.numbered_datasets
        self.lengths = [len(ids) for dataset in self.datasets for ids in dataset["input_ids"]]
        self.main = trainer.accelerator.is_main_process
        self.why_not = _why_not(trainer)

    def run(self, teacher_model: PreTrainedModel | None) -> Precomputed:
        args, precomputed = self.args, Precomputed()
        prefix = self._prefix() if args.cache != "off" else None
        if prefix is None and args.cache == "on":
            raise LayerPruneError(f"the frozen layers can't be precomputed: {self.why_not}; use cache=auto or off")
        if prefix is None and args.cache == "auto":
            logger.warning("the frozen layers run in every step: %s", self.why_not)
        if prefix is None and not args.distils:
            return precomputed
        if is_split_by_deepspeed(self.model):
            raise LayerPruneError(
                f"loss={args.loss} needs the dense model whole, but DeepSpeed ZeRO-3 splits every model; use ZeRO-2, "
                "FSDP or DDP, or loss=ce"
            )
        if not self.datasets:
            raise LayerPruneError(f"loss={args.loss} does not work with streamed data; use loss=ce, or do not stream")
        teacher = self._teacher(teacher_model, prefix) if args.distils else None
        store = precomputed.store = self._open(prefix, teacher)
        if prefix is not None:
            self._run_student(store, prefix, teacher)
            self.accelerator.wait_for_everyone()
            prefix.skip()
            prefix.unload()
            precomputed.prefix = prefix
        if teacher is not None:
            self._run_teacher(store, teacher, prefix)
            teacher.let_go(self.device, self.output.head())
            precomputed.teacher_head = teacher.head
            self.accelerator.wait_for_everyone()
            if self.main:
                store.forget("shared")
        return precomputed

    # --- what can be precomputed -------------------------------------------------------------------------

    def _prefix(self) -> Prefix | None:
        """The frozen layers, if a trial on a few rows shows that their recorded output can replace them."""
        if self.why_not:
            return None
        depth = first_trained_layer(self.model)
        if depth == 0:
            self.why_not = "there are none below the first trained parameter"
            return None
        self.model.to(self.device)
        for needs_ids in (False, True):
            prefix = Prefix(self.model, depth, needs_ids=needs_ids)
            try:
                self.why_not = self._try_out(prefix)
            except TROUBLE as error:
                self.why_not = f"the model fails without them ({str(error).splitlines()[0][:120]})"
            prefix.restore()
            if not self.why_not:
                return prefix
        return None

    def _try_out(self, prefix: Prefix) -> str:
        """Why the recorded states can't replace the layers; empty if they can."""
        rows = list(range(min(2, len(self.datasets[0]))))
        inputs = self._inputs(rows)
        with self._inference():
            with prefix.recorded() as states:
                wanted = self.output.states(**inputs, use_cache=False)
            recorded = states[prefix.depth]
            if recorded.shape[:-1] != inputs["input_ids"].shape:
                return "layers pass on several streams of hidden states"
            with self._training():
                again = prefix.run(**inputs)[prefix.depth]
            if not close(again, recorded):
                return "their output differs in training mode, as with dropout"
            alone = prefix.run(**self._inputs(rows[:1]))[prefix.depth]
            pair = [self.collator.parted(s, [self.lengths[rows[0]]])[0] for s in (alone, recorded[:1])]
            if not close(*pair):
                return "their output for a row depends on the other rows of the batch"
            prefix.skip()
            states = self.output.states(**prefix.put(recorded, inputs), use_cache=False)
        return "" if close(states, wanted) else "layers pass more than hidden states to each other"

    def _teacher(self, model: PreTrainedModel | None, prefix: Prefix | None) -> Teacher:
        source = model if model is not None else self.args.teacher
        if source is None:
            raise LayerPruneError(f"loss={self.args.loss} needs the dense model; name it with --teacher")
        kwargs = {"attn_implementation": self.model.config._attn_implementation}
        return Teacher(
            self.model, cut_of(self.model.config), source, prefix.depth if prefix is not None else 0, **kwargs
        )

    # --- the passes --------------------------------------------------------------------------------------

    def _open(self, prefix: Prefix | None, teacher: Teacher | None) -> StateStore:
        columns = []
        if prefix is not None:
            columns.append(self._column(prefix, "prefix", prefix.depth))
        if teacher is not None:
            source = hash_tensors([], teacher.fingerprint, self._settings())
            columns.append(Column("teacher", teacher.width, teacher.dtype, source))
        folder = Path(self.args.cache_dir or Path(str(self.args.output_dir)) / "cache")
        rows = "-".join(hash_rows(dataset) for dataset in self.datasets)
        with self.accelerator.main_process_first():
            return StateStore(folder, self.lengths, rows, columns, main=self.main)

    def _column(self, prefix: Prefix, name: str, depth: int) -> Column:
        with self._inference():
            state = prefix.run((depth,), **self._inputs([0]))[depth]
        source = hash_tensors(prefix.parameters(), depth, self._settings())
        return Column(name, state.shape[-1], state.dtype, source)

    def _settings(self) -> tuple[Any, ...]:
        precision = self.accelerator.mixed_precision
        return precision, str(self.model.dtype), self.model.config._attn_implementation, self.collator.padding_free

    def _run_student(self, store: StateStore, prefix: Prefix, teacher: Teacher | None) -> None:
        shards = set(store.missing("prefix"))
        depths = {"prefix": prefix.depth}
        if teacher is not None and 0 < teacher.shared < prefix.depth and (untaught := store.missing("teacher")):
            store.add(self._column(prefix, "shared", teacher.shared))
            depths["shared"] = teacher.shared
            shards |= set(store.missing("shared")) & set(untaught)

        def run(rows: list[int]) -> dict[str, list[torch.Tensor]]:
            states = prefix.run(tuple(depths.values()), **self._inputs(rows))
            lengths = [self.lengths[row] for row in rows]
            return {name: self.collator.parted(states[depth], lengths) for name, depth in depths.items()}

        self._fill(store, list(depths), shards, run, "Frozen layers")

    def _run_teacher(self, store: StateStore, teacher: Teacher, prefix: Prefix | None) -> None:
        shards = store.missing("teacher")
        if not shards:
            return
        column = "shared" if prefix is not None and teacher.shared < prefix.depth else "prefix"
        with self._inference():
            teacher.prepare(self._inputs([0]), self.device, needs_ids=prefix is not None and prefix.needs_ids)

        def run(rows: list[int]) -> dict[str, list[torch.Tensor]]:
            inputs, shared = self._inputs(rows), None
            if teacher.shared:
                shared = self.collator.joined(store.read(column, rows), inputs["input_ids"].shape[1]).to(self.device)
            states = teacher.states(inputs, shared).to(store.columns["teacher"].dtype)
            return {"teacher": self.collator.parted(states, [self.lengths[row] for row in rows])}

        self._fill(store, ["teacher"], shards, run, "Dense model")

    def _fill(
        self, store: StateStore, columns: list[str], shards: Iterable[int], run: Callable, description: str
    ) -> None:
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        mine = [shard for shard in sorted(shards) if shard % world == rank]
        usual = _CPU_TOKENS if self.device.type == "cpu" else _DEVICE_TOKENS
        tokens = self.args.cache_batch_tokens or usual
        if self.collator.padding_free:  # all rows form one sequence, so attention spans all of them
            tokens = min(tokens, self.args.per_device_train_batch_size * (self.args.max_length or tokens))
        with self._inference():
            fill(store, columns, mine, run, tokens, description, show=self.main)

    @contextmanager
    def _inference(self) -> Any:
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode(), self.accelerator.autocast():
                yield
        finally:
            self.model.train(was_training)

    @contextmanager
    def _training(self) -> Any:
        self.model.train()
        yield
        self.model.eval()

    def _inputs(self, rows: list[int]) -> dict[str, Any]:
        """The model's arguments for some rows."""
        batch = self.collator.inner([self._example(row) for row in rows])
        moved = {name: v.to(self.device) if torch.is_tensor(v) else v for name, v in batch.items()}
        moved.pop("labels", None)
        return moved

    def _example(self, row: int) -> dict[str, Any]:
        for dataset in self.datasets:
            if row < len(dataset):
                return {name: value for name, value in dataset[row].items() if name in _FED}
            row -= len(dataset)
        raise IndexError(row)


def _why_not(trainer: HealTrainer) -> str:
    """Settings that rule out precomputing the frozen layers; empty if there are none."""
    args, parallel = trainer.args, trainer.accelerator.parallelism_config
    model: Any = trainer.plain_model
    if not trainer.numbered_datasets:
        return "the data are streamed, so rows can't be numbered"
    if args.neftune_noise_alpha is not None:
        return "neftune_noise_alpha adds noise to their input"
    if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled or parallel.tp_enabled):
        return "the model or its sequences are split over devices"
    if getattr(model, "hf_device_map", None) and len(set(model.hf_device_map.values())) > 1:
        return "the model is split over devices"
    if is_split_by_deepspeed(model):
        return "DeepSpeed ZeRO-3 has split the weights"
    if trainer._is_vision_dataset:
        return "the rows contain images"
    return ""


def is_split_by_deepspeed(model: PreTrainedModel) -> bool:
    """Whether DeepSpeed ZeRO-3 has split the weights, so that the model only runs inside its engine."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
