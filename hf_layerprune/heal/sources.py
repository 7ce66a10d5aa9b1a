"""The rows of a run, read and shaped as the recipe's options say."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CutError
from ..families.multimodal import placeholder_tokens
from ..runtime.loading import load_config, load_processor
from .data import has_images, load_mixture, load_rows, pick_split, shape_rows
from .row_checks import check_chats, check_rows
from .self_data import SELF

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedTokenizerBase
    from trl import DatasetMixtureConfig, ScriptArguments

    from .config import HealConfig
    from .options import RowOptions


@dataclass(frozen=True)
class Sources:
    """The rows of a run, and what TRL's `DatasetConfig` holds for each data set that they come from.

    There are none to train on if the dense model is to write them.
    """

    parts: list[dict[str, Any]]
    train: Dataset | None = None
    test: Dataset | None = None

    @classmethod
    def read(
        cls,
        script_args: ScriptArguments,
        dataset_args: DatasetMixtureConfig,
        row_args: RowOptions,
        args: HealConfig,
        tokenizer: PreTrainedTokenizerBase,
        model: str,
        revision: str | None = None,
    ) -> Sources:
        """Read the rows that are named, in the form that the trainer takes, for a model with this tokenizer.

        Those to evaluate on are read only if there is an `eval_strategy`.

        Raises:
            CutError: A split does not exist, or the rows can't be used as the options say.
            CheckpointError: A data set can't be read.
        """
        if script_args.dataset_name == SELF:
            return cls([{"path": SELF}])
        parts, splits = _load_splits(script_args, dataset_args, args.row_seed)
        name, folder = "+".join(part["path"] for part in parts), _common_folder(parts)
        config = load_config(model, revision=revision)
        vocabulary = getattr(config.get_text_config(), "vocab_size", None)
        processor = partial(load_processor, model, revision=revision) if placeholder_tokens(config) else None
        field, whole = args.dataset_text_field, args.assistant_only_loss and not row_args.rewrite_answers

        def shaped(split: str) -> Dataset:
            rows = pick_split(splits, split, name)
            rows = shape_rows(rows, tokenizer, row_args.template, name, field, processor, whole, folder)
            check_rows(rows, name, field, vocabulary)
            if has_images(rows):
                return rows
            check_chats(rows, name, tokenizer)
            columns = set(rows.column_names or ("completion",))  # unknown of some that are streamed
            if args.completion_only_loss and not columns & {"completion", "completion_mask", "labels"}:
                raise CutError(f"--completion_only_loss needs completions, and {name} has only text; leave it out")
            return rows

        train = shaped(script_args.dataset_train_split)
        if row_args.rewrite_answers and has_images(train):
            raise CutError(f"{name} has images, and --rewrite_answers rewrites answers to text alone; leave it out")
        test = shaped(script_args.dataset_test_split) if args.eval_strategy != "no" else None
        return cls(parts, train, test)


def _load_splits(
    script_args: ScriptArguments, dataset_args: DatasetMixtureConfig, seed: int
) -> tuple[list[dict[str, Any]], DatasetDict]:
    """What TRL's `DatasetConfig` holds for each data set that is named, and their splits."""
    if dataset_args.datasets:
        return [asdict(part) for part in dataset_args.datasets], load_mixture(dataset_args, seed)
    name, config, split = str(script_args.dataset_name), script_args.dataset_config, script_args.dataset_train_split
    splits = load_rows(name, config=config, streaming=script_args.dataset_streaming)
    return [{"path": name, "name": config, "split": split}], splits


def _common_folder(parts: list[dict[str, Any]]) -> Path:
    """The folder that paths in the rows are relative to; the present one if the rows come from several."""
    paths = [Path(part["path"]).expanduser() for part in parts]
    folders = {path if path.is_dir() else path.parent for path in paths}
    return folders.pop() if len(folders) == 1 else Path()
