"""Model cards of the models that were really made here, from their records.

python -m model_cards               write every card again
python -m model_cards --check       say which card is not what its records give
python -m model_cards --take DIR    take over the records of a model that was made, and write its card
python -m model_cards --make WORK --data DATA    make and measure all of them in WORK first (see make.py)

What the weights were is in the records; the weights themselves are not kept.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from hf_layerprune.errors import CheckpointError, LayerPruneError
from hf_layerprune.publish.card.writing import compose, read_card, write_card
from hf_layerprune.records.lineage import Lineage
from hf_layerprune.records.names import is_local

from .make import make

HERE = Path(__file__).parent
RECORDS = ("lineage.json", "metrics.json")


def models() -> list[Path]:
    """The folders with records."""
    return sorted(path.parent for path in HERE.glob("*/lineage.json"))


def take(folder: Path) -> Path:
    """Take over the records of a model.

    Args:
        folder (`Path`): The folder of a model that was made.

    Returns:
        `Path`: Where its records are now.

    Raises:
        CheckpointError: They are not complete, don't belong to its weights, or name the base by a path.
    """
    read_card(folder)
    lineage = Lineage.of(folder)
    if is_local(lineage.base):
        raise CheckpointError(f"{folder} names its base by a path; hf-layerprune card {folder} --base-model ORG/NAME")
    target = HERE / folder.resolve().name
    target.mkdir(exist_ok=True)
    for name in RECORDS:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}; measure the model first")
        shutil.copyfile(folder / name, target / name)
    return target


def main() -> int:
    """Write or check the cards."""
    parser = argparse.ArgumentParser(prog="python -m model_cards", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a card would change")
    parser.add_argument("--take", type=Path, metavar="DIR", help="take over the records of this model first")
    parser.add_argument("--make", type=Path, metavar="WORK", help="make and measure the models in this folder first")
    parser.add_argument(
        "--data", type=Path, metavar="DATA", help="with --make: the folder of the questions and the text"
    )
    parser.add_argument(
        "--limit", type=int, default=200, metavar="N", help="with --make: questions a task, 0: all (200)"
    )
    parser.add_argument("--rows", type=int, default=64, metavar="N", help="with --make: rows to train on (64)")
    args = parser.parse_args()
    if args.make:
        if not args.data:
            parser.error("--make needs --data")
        for folder in make(args.make, args.data, limit=args.limit, rows=args.rows):
            take(folder)
    if args.take:
        take(args.take)
    stale = False
    for folder in models():
        if args.check:
            text = (folder / "README.md").read_text(encoding="utf-8")
            same = compose(read_card(folder, weights=False), text) == text
            stale |= not same
            print(f"{folder.name}: {'as its records say' if same else 'not what its records give'}")
        else:
            changed = write_card(folder, weights=False)
            print(f"{folder.name}: {', '.join(changed) or 'as it should be'}")
    return 1 if stale else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LayerPruneError as error:
        sys.exit(f"model_cards: {error}")
