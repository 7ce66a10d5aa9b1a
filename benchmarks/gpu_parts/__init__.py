"""The parts of `benchmarks/gpu.py`: each a file, with a function that lists its steps. None imports torch at first."""

from __future__ import annotations

from collections.abc import Callable

from . import decoding, disk, engines, healing, proofs, training
from .steps import Step

PARTS: dict[str, Callable[[int], list[Step]]] = {
    "a": proofs.steps,
    "b": training.steps,
    "c": disk.steps,
    "d": decoding.steps,
    "e": healing.steps,
    "f": engines.steps,
}
