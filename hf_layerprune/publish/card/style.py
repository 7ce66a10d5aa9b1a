"""The style of the project's plots: one palette, one set of markers, transparent, and reproducible byte for byte.

    with new_figure(folder / "scores.svg", height=2.6) as (figure, axes):
        axes.bar(range(30), scores, color=ROLE_COLOURS["dense"])
        axes.set_ylabel("block influence")

A card is read on white and on near-black pages, and a picture can't know which. So the background is transparent and
every colour has a medium lightness: text has a contrast of 4.3:1 on white and on the dark pages of GitHub and the Hub,
marks have at least 3:1. The role colours remain distinguishable with any kind of colour blindness, and each role also
has its own marker; label bars and lines directly, so that nothing is conveyed by colour alone.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...errors import LayerPruneError
from ...files.copy import new_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Text and axes, and less prominent elements.
INK = "#737985"
FAINT = "#7379855c"
# The colour of each role in `metrics.json`, in the order of the stages.
ROLE_COLOURS = {
    "dense": "#656b78",
    "cut": "#d55e00",
    "repaired": "#2b73d1",
    "healed": "#12a583",
    "trained": "#a68a00",
    "quantized": "#8e663d",
    "model": "#c15bb0",
}
ROLE_MARKERS = {
    "dense": "s",
    "cut": "v",
    "repaired": "D",
    "healed": "o",
    "trained": "X",
    "quantized": "P",
    "model": "^",
}
# For series other than roles, such as criteria.
CYCLE = ("#2b73d1", "#d55e00", "#12a583", "#c15bb0", "#656b78")
# The outline of a dropped layer, and with it the fill of one among those that are kept.
DASHED: dict[str, Any] = {"edgecolor": ROLE_COLOURS["cut"], "lw": 1.2, "ls": (0, (2, 1.4))}
DROPPED = {"facecolor": f"{ROLE_COLOURS['cut']}2e", **DASHED}
# Scores that differ by more than this factor are drawn on a logarithmic axis: on a linear one, a very large score of
# the first layer would hide the differences between the others.
WIDE = 30
_STAMP = "hf-layerprune"


@contextmanager
def new_figure(
    path: Path, *, height: float = 3.0, digest: str | None = None, **subplots: Any
) -> Iterator[tuple[Figure, Any]]:
    """Make a figure in the project's style, and write it when the block ends without an error.

    Import matplotlib only inside the block, where it is known to be installed.

    Args:
        path (`Path`): The file, `.svg` or `.png`. It is written completely or not at all.
        height (`float`, *optional*, defaults to 3.0): In inches of 100 pixels. The width is 7.2, that of a card's column.
        digest (`str`, *optional*): A hash of the data, which is stored in a PNG file; see [`read_digest`].
        subplots: Arguments for `Figure.subplots`: `nrows`, `ncols`, `sharey`, ...

    Yields:
        `tuple[Figure, Axes]`: The figure, and its axes; an array if there are several.

    Raises:
        LayerPruneError: matplotlib is not installed.
        CheckpointError: The file can't be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise LayerPruneError('plots need matplotlib; pip install "hf-layerprune[plots]"') from None
    # Without pyplot, there is no window and no global state, and any thread can draw.
    with matplotlib.rc_context(fname=Path(__file__).with_name("card.mplstyle")):
        figure = Figure(figsize=(7.2, height), layout="constrained")
        yield figure, figure.subplots(**subplots)
        # By default, matplotlib writes the date and its version.
        svg = {"metadata": {"Date": None, "Creator": None}}
        png = {"metadata": {"Software": None, _STAMP: digest}, "pil_kwargs": {"optimize": True}}
        with new_file(path, force=True) as partial:
            figure.savefig(partial, format=path.suffix[1:], **(svg if path.suffix == ".svg" else png))


def read_digest(path: Path) -> str | None:
    """The digest of the data that a PNG file was drawn from; `None` if it has none, or is missing or unreadable."""
    try:
        from PIL import Image

        with Image.open(path, formats=["PNG"]) as picture:
            return picture.info.get(_STAMP)
    except Exception:  # also without Pillow
        return None


def draw_bars(
    axes: Axes, values: Mapping[int, float], dropped: Collection[int], label: str = "would be dropped"
) -> None:
    """Draw a score for each layer, with those that are dropped outlined; `label` is what the legend says of these."""
    kept, chosen = ([i for i in values if (i in dropped) is flag] for flag in (False, True))
    axes.bar(kept, [values[i] for i in kept], 0.78, label="kept", color=CYCLE[4])
    axes.bar(chosen, [values[i] for i in chosen], 0.78, label=label, **DROPPED)
    if dynamic_range(values.values()) > WIDE:
        axes.set_yscale("log")
    else:
        axes.axhline(0, color=FAINT, lw=0.8)
    draw_grid(axes, "y")


def dynamic_range(values: Collection[float]) -> float:
    """The ratio of the largest to the smallest value; 0 if they are not all positive."""
    return max(values) / min(values) if values and min(values) > 0 else 0.0


def draw_grid(axes: Axes, axis: Literal["x", "y", "both"]) -> None:
    """Add faint grid lines along one axis."""
    axes.grid(True, axis=axis)
    axes.tick_params(axis=axis, length=0)
