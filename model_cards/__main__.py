"""Renders the cards of models that were made with this project, from their records.

python -m model_cards               rewrite every card
python -m model_cards --check       report files that today's code would write otherwise
python -m model_cards --take DIR    copy the records of a model, and write its card
python -m model_cards --make WORK --data DATA    first make and measure all models in WORK (see make.py)

The records contain hashes of the weights; the weights themselves are not kept.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from hf_layerprune.errors import CheckpointError, LayerPruneError
from hf_layerprune.publish.card.writing import read_card, write_card
from hf_layerprune.records.lineage import Lineage
from hf_layerprune.records.metrics import Metrics
from hf_layerprune.records.names import is_local

from .make import LIMIT, WINDOWS, Budget, make

HERE = Path(__file__).parent
RECORDS = ("lineage.json", "metrics.json")


def models() -> list[Path]:
    """The folders that contain records."""
    return sorted(path.parent for path in HERE.glob("*/lineage.json"))


def take(folder: Path) -> Path:
    """Copy the records of a model; returns the folder that they were copied to.

    Raises:
        CheckpointError: The records are incomplete, don't belong to the weights, or name the base by a path.
    """
    read_card(folder)
    lineage = Lineage.load(folder)
    if is_local(lineage.base):
        raise CheckpointError(
            f"{folder} names its base by a path; run hf-layerprune card {folder} --base-model ORG/NAME"
        )
    target = HERE / folder.resolve().name
    target.mkdir(exist_ok=True)
    for name in RECORDS:
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder} has no {name}; measure the model first")
        shutil.copyfile(folder / name, target / name)
    return target


def outdated(folder: Path) -> list[str]:
    """The files of a card that today's code would not write as they are, as far as that shows without weights.

    Raises:
        CheckpointError: The records don't follow their schemas, or the card was edited inside a generated section.
    """
    lineage, metrics = Lineage.load_required(folder), Metrics.load(folder)
    with tempfile.TemporaryDirectory() as place:
        again = Path(shutil.copytree(folder, Path(place, folder.name)))
        lineage.write(again)
        metrics.write(again)
        found = [name for name in RECORDS if (folder / name).read_bytes() != (again / name).read_bytes()]
        found += write_card(again, weights=False)
    if text := metrics.mismatch(metrics.recorded_identity(lineage), lineage):
        found.append(f"{RECORDS[1]}, which {text}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m model_cards", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 if a file is outdated")
    parser.add_argument("--take", type=Path, metavar="DIR", help="first copy the records of this model")
    parser.add_argument("--make", type=Path, metavar="WORK", help="first make and measure the models in this folder")
    only = parser.add_argument_group("with --make")
    only.add_argument("--data", type=Path, metavar="DATA", help="folder with the questions and the text")
    only.add_argument("--rows", type=int, metavar="N", help="training rows; by default the recipe's")
    only.add_argument("--samples", type=int, metavar="N", help="calibration rows; by default the package's")
    only.add_argument("--length", type=int, metavar="N", help="tokens in a calibration row; by default the package's")
    only.add_argument(
        "--limit", type=int, default=LIMIT, metavar="N", help="questions per task, 0 for all (%(default)s)"
    )
    only.add_argument("--windows", type=int, default=WINDOWS, metavar="N", help="windows of text (%(default)s)")
    args = parser.parse_args()
    if args.make:
        if not args.data:
            parser.error("--make needs --data")
        names = ("rows", "samples", "length", "limit", "windows")
        budget = Budget(**{name: getattr(args, name) for name in names})
        for folder in make(args.make, args.data, budget):
            take(folder)
    if args.take:
        take(args.take)
    stale = False
    for folder in models():
        if args.check:
            old = outdated(folder)
            stale |= bool(old)
            print(f"{folder.name}: {'outdated: ' + ', '.join(old) if old else 'up to date'}")
        else:
            changed = write_card(folder, weights=False)
            print(f"{folder.name}: {', '.join(changed) or 'up to date'}")
    return 1 if stale else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except LayerPruneError as error:
        sys.exit(f"model_cards: {error}")
