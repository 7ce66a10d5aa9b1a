"""The rows of a run, read and shaped as the recipe's options say."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import CutError
from ..families.multimodal import placeholders
from ..runtime.loading import load_config, load_processor
from .data import has_images, load_mixture, load_rows, pick_split, shape_rows
from .row_checks import check_chats, check_rows
from .self_data import SELF

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase
    from trl import DatasetMixtureConfig, ScriptArguments

    from .config import HealConfig
    from .options import RowOptions


@dataclass(frozen=True)
class Sources:
    """The rows of a run.

    Args:
        parts (`list[dict[str, Any]]`): What TRL's `DatasetConfig` holds, for each data set that they come from.
        train (`Dataset`, *optional*): The training rows; `None` if the dense model is to write them.
        test (`Dataset`, *optional*): The evaluation rows, if there are any.
    """

    parts: list[dict[str, Any]]
    train: Dataset | None = None
    test: Dataset | None = None

    @classmethod
    def read(cls, script_args: ScriptArguments, dataset_args: DatasetMixtureConfig, args: HealConfig) -> Sources:
        """Read the rows that are named, those to evaluate on only if there is an `eval_strategy`.

        Raises:
            CutError: A split does not exist.
            CheckpointError: A data set can't be read.
        """
        name = str(script_args.dataset_name)
        if dataset_args.datasets:
            parts = [asdict(part) for part in dataset_args.datasets]
            splits = load_mixture(dataset_args, args.row_seed)
        else:
            parts = [{"path": name, "name": script_args.dataset_config, "split": script_args.dataset_train_split}]
            if name == SELF:
                return cls(parts)
            splits = load_rows(name, config=script_args.dataset_config, streaming=script_args.dataset_streaming)
        train, evaluated = pick_split(splits, script_args.dataset_train_split, cls(parts).name), None
        if args.eval_strategy != "no":
            evaluated = pick_split(splits, script_args.dataset_test_split, cls(parts).name)
        return cls(parts, train, evaluated)

    @property
    def name(self) -> str:
        """The data sets as errors name them."""
        return "+".join(part["path"] for part in self.parts)

    def shaped(
        self,
        row_args: RowOptions,
        args: HealConfig,
        tokenizer: PreTrainedTokenizerBase,
        model: str,
        revision: str | None = None,
    ) -> Sources:
        """The same rows in the form that the trainer takes, for a model with this tokenizer.

        Raises:
            CutError: They can't be used as the options say.
        """
        config = load_config(model, revision=revision)
        reads_images, vocabulary = bool(placeholders(config)), getattr(config.get_text_config(), "vocab_size", None)
        processor = partial(load_processor, model, revision=revision) if reads_images else None

        def shape(rows: Dataset | None) -> Dataset | None:
            if rows is None:
                return None
            field, whole = args.dataset_text_field, args.assistant_only_loss and not row_args.rewrite_answers
            shaped = shape_rows(rows, tokenizer, row_args.template, self.name, field, processor, whole)
            check_rows(shaped, self.name, field, vocabulary)
            if not has_images(shaped):
                check_chats(shaped, self.name, tokenizer)
                columns = set(shaped.column_names or ("completion",))  # unknown of some that are streamed
                if args.completion_only_loss and not columns & {"completion", "completion_mask", "labels"}:
                    raise CutError(
                        f"--completion_only_loss needs completions, and {self.name} has only text; leave it out"
                    )
            return shaped

        train, evaluated = shape(self.train), shape(self.test)
        if row_args.rewrite_answers and has_images(train):
            raise CutError(
                f"{self.name} has images, and --rewrite_answers rewrites answers to text alone; leave it out"
            )
        return Sources(self.parts, train, evaluated)
