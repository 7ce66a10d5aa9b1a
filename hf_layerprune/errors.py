"""The errors that a user can cause. All are `ValueError`s with one line that says what, where, and the way out."""

from __future__ import annotations


class LayerPruneError(ValueError):
    """Base class: anything this package refuses."""


class UnsupportedModelError(LayerPruneError):
    """The model's architecture is not one that is proven to survive a cut."""


class CutError(LayerPruneError):
    """This set of layers cannot be dropped from this model."""


class CheckpointError(LayerPruneError):
    """A file or folder is missing, damaged, or not what it says it is."""
