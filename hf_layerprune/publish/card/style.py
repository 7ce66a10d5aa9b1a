"""The style of the project's plots: one palette, one set of markers, transparent, and reproducible byte for byte.

    with draw(folder / "scores.svg", width=7.2, height=2.6) as (figure, axes):
        axes.bar(range(30), scores, color=ROLE_COLOURS["dense"])
        axes.set_ylabel("block influence")

A card is read on white and on near-black pages, and a picture can't know which. So the background is transparent and
every colour has a medium lightness: text has a contrast of 4.3:1 on white and on the dark pages of GitHub and the Hub,
marks have at least 3:1. The role colours remain distinguishable with any kind of colour blindness, and each role also
has its own marker; label bars and lines directly, so that nothing is conveyed by colour alone.
"""

from __future__ import annotations

from collections.abc import Iterator
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
    "model": "#c15bb0",
}
ROLE_MARKERS = {"dense": "s", "cut": "v", "repaired": "D", "healed": "o", "model": "^"}
# For series other than roles, such as criteria.
CYCLE = ("#2b73d1", "#d55e00", "#12a583", "#c15bb0", "#656b78")
# Scores that differ by more than this factor are drawn on a logarithmic axis: on a linear one, a very large score of
# the first layer would hide the differences between the others.
WIDE = 30
# A larger file has too many points for the size of the plot.
MAX_BYTES = 256 * 1024

_RC: dict[str, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "savefig.dpi": 160,  # for PNG: twice the resolution shown on a page
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.labelsize": 9.5,
    "axes.axisbelow": True,
    "axes.grid": False,
    "grid.color": "#73798538",
    "grid.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "font.family": "sans-serif",
    # Comes with matplotlib, so layout is the same everywhere; a browser without it uses its own sans-serif.
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "lines.linewidth": 1.8,
    # Text stays text: searchable, accessible to screen readers, and a tenth of the size.
    "svg.fonttype": "none",
    # Makes the file reproducible.
    "svg.hashsalt": "hf_layerprune",
}


@contextmanager
def draw(
    path: Path, *, width: float = 7.2, height: float = 3.0, columns: int = 1, rows: int = 1, **subplots: Any
) -> Iterator[tuple[Figure, Any]]:
    """Make a figure in the project's style, and write it when the block ends without an error.

    Args:
        path (`Path`): The file, `.svg` or `.png`. It is written completely or not at all.
        width (`float`, *optional*, defaults to 7.2): In inches of 100 pixels; a card's column is about 7.2 wide.
        height (`float`, *optional*, defaults to 3.0): In inches.
        columns (`int`, *optional*, defaults to 1): Axes side by side.
        rows (`int`, *optional*, defaults to 1): Axes below each other.
        subplots: Arguments for `Figure.subplots`: `sharey`, `width_ratios`, ...

    Yields:
        `tuple[Figure, Axes]`: The figure, and its axes; an array if there are several.

    Raises:
        LayerPruneError: matplotlib is not installed, or the file is too large for a card.
        CheckpointError: The file can't be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise LayerPruneError('plots need matplotlib; pip install "hf-layerprune[plots]"') from None
    settings: Any = _RC
    # Without pyplot, there is no window and no global state, and any thread can draw.
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(rows, columns, **subplots)
        _write(figure, path)


def grid(axes: Axes, axis: Literal["x", "y", "both"] = "y") -> None:
    """Add faint grid lines along one axis."""
    axes.grid(True, axis=axis)
    axes.tick_params(axis=axis, length=0)


def _write(figure: Figure, path: Path) -> None:
    kind = path.suffix.removeprefix(".")
    # By default, matplotlib writes the date and its version.
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    with new_file(path, force=True) as partial:
        figure.savefig(partial, format=kind, metadata=metadata)
        if (size := partial.stat().st_size) > MAX_BYTES:
            raise LayerPruneError(f"{path} would have {size} bytes, which is too large for a card; draw fewer points")
