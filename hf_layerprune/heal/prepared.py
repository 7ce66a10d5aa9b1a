"""Rows that TRL has prepared: which of them are trained on, and their numbers."""

from __future__ import annotations

import logging
import math
import random
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from ..errors import CutError, LayerPruneError
from ..runtime.windows import max_positions
from ..versions import trl_cuts_batches

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from .config import HealConfig

logger = logging.getLogger(__name__)


def keep_labelled_rows(rows: Any, args: HealConfig, given: Any, what: str = "training") -> Any:
    """The rows with a labelled token; logs how many of the `given` rows are left out, and how many may be truncated.

    Both may be several sets by name: the `given` rows, and what they became when they were prepared. Streamed rows are
    returned as they are. `what` says in messages what they are for.

    Raises:
        CutError: There are none.
    """
    if isinstance(rows, dict):
        return {name: keep_labelled_rows(part, args, given[name], what) for name, part in rows.items()}
    if not isinstance(rows, Dataset):
        return rows
    limit, count, kept = args.max_length, len(given), _part_in_batches(args)

    def is_labelled(row: dict[str, Any]) -> bool:
        """Whether a token has a label, apart from the first, which nothing predicts."""
        if "labels" in row:
            return any(label != -100 for label in row["labels"][kept][1:])
        masks = [row[name][kept][1:] for name in ("completion_mask", "assistant_masks") if name in row]
        return any(map(all, zip(*masks, strict=True))) if masks else len(row["input_ids"]) > 1

    rows = rows.filter(is_labelled)
    if not len(rows):
        within, way_out = ("", "") if limit is None else (f" within max_length={limit}", "raise max_length, or ")
        raise CutError(
            f"none of the {count} {what} rows has a labelled token{within}, after its first token: they are empty, or "
            f"their prompts are longer; {way_out}check the rows"
        )
    packed = args.packing if what == "training" or args.eval_packing is None else args.eval_packing
    if not packed and len(rows) < count:
        logger.info("left out: %d of %d %s rows, which have no labelled token", count - len(rows), count, what)
    if limit is not None and not packed:
        least, known = (limit + 1, given) if "input_ids" in given.column_names else (limit, rows)
        if cut := sum(len(ids) >= least for ids in known["input_ids"]):
            logger.info("of %d %s rows, %d reach max_length=%d and may have been cut", count, what, cut, limit)
    return rows


def _part_in_batches(args: HealConfig) -> slice:
    """What batches have of a prepared row: TRL below 1.8 cuts rows only as it makes batches of them."""
    if args.max_length is None or args.padding_free or not trl_cuts_batches():
        return slice(None)
    return slice(-args.max_length, None) if args.truncation_mode == "keep_end" else slice(args.max_length)


def check_lengths(train: Dataset, evaluated: Any, config: PreTrainedConfig, args: HealConfig) -> None:
    """Refuse prepared rows, in any set that is not streamed, that are longer than a model's context."""
    others = evaluated.values() if isinstance(evaluated, dict) else [evaluated]
    most, kept = max_positions(config), _part_in_batches(args)
    for rows in (train, *others):
        if most is None or not isinstance(rows, Dataset):
            continue
        packed = "seq_lengths" in rows.column_names
        longest = max(map(max, rows["seq_lengths"]) if packed else map(len, rows["input_ids"]), default=0)
        if len(range(longest)[kept]) > most:
            raise CutError(f"a row has {longest} tokens, and the model {most} positions; use max_length={most}")


def sample_rows(rows: Dataset, args: HealConfig) -> Dataset:
    """If training ends before it has seen all rows, a sample of them, or the first ones if it takes them in order.

    Only these are computed. A part of an epoch becomes as many steps in `args.max_steps`.

    Raises:
        LayerPruneError: The rows fill no batch, and smaller ones are left out.
    """
    batch_rows = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and len(rows) < batch_rows:
        raise LayerPruneError(
            f"the {len(rows)} training rows do not fill a batch of {batch_rows}, and dataloader_drop_last leaves it out; "
            "lower per_device_train_batch_size, or leave dataloader_drop_last out"
        )
    step_rows = batch_rows * args.gradient_accumulation_steps
    if args.max_steps <= 0 and args.num_train_epochs < 1:  # the Trainer would take that part of the sample again
        args.max_steps = math.ceil(args.num_train_epochs * math.ceil(len(rows) / step_rows))
    seen = args.max_steps * step_rows
    if args.max_steps <= 0 or seen >= len(rows):
        return rows
    logger.info("training ends after %d of %d rows; the other rows are left out", seen, len(rows))
    if getattr(args, "train_sampling_strategy", "random") == "sequential":
        return rows.select(range(seen))
    return rows.select(sorted(random.Random(args.row_seed).sample(range(len(rows)), seen)))


def number_rows(train: Dataset, evaluated: Any) -> tuple[Dataset, Any, list[Dataset]]:
    """Number the rows of all data sets consecutively in a column `row`; also returns a list of all sets.

    If one of them is streamed, they stay as they are, and the list is empty. Those to evaluate on may be several, by
    name.
    """
    others = evaluated if isinstance(evaluated, dict) else {} if evaluated is None else {"eval": evaluated}
    sets = {"": train} | others
    if not all(isinstance(rows, Dataset) for rows in sets.values()):
        return train, evaluated, []
    first = 0
    for name, rows in sets.items():
        sets[name] = rows.add_column("row", list(range(first, first + len(rows))))
        first += len(rows)
    every = list(sets.values())
    train = sets.pop("")
    return train, sets if isinstance(evaluated, dict) else sets.get("eval"), every
