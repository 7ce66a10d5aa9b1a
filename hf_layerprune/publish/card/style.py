"""How the project's plots look: one palette, one set of marks, transparent, and the same file from the same numbers.

    with draw(folder / "scores.svg", width=7.2, height=2.6) as (figure, axes):
        axes.bar(range(30), scores, color=ROLE_COLOURS["dense"])
        axes.set_ylabel("block influence")

A card is read on white and on near black, and a picture in it doesn't learn which. So the ground is transparent and
every colour has a lightness between the two: text reaches a contrast of 4.3 : 1 on white, on GitHub's and on the
Hub's dark pages, marks at least 3 : 1. The roles' colours stay apart for readers who see no red, green or blue, and
each role has a marker of its own besides; name bars and lines beside them, so that nothing is told by colour alone.
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

# Text and axes, and what should step back behind them.
INK = "#737985"
FAINT = "#7379855c"
# What each role of `metrics.json` is drawn in, in the order in which a model goes through them.
ROLE_COLOURS = {
    "dense": "#656b78",
    "cut": "#d55e00",
    "repaired": "#2b73d1",
    "healed": "#12a583",
    "model": "#c15bb0",
}
ROLE_MARKERS = {"dense": "s", "cut": "v", "repaired": "D", "healed": "o", "model": "^"}
# For series that are no roles, such as criteria.
CYCLE = ("#2b73d1", "#d55e00", "#12a583", "#c15bb0", "#656b78")
# Scores that differ by more than this factor are drawn on a logarithmic axis: on a plain one, a first layer that
# changes everything hides what tells the others apart.
WIDE = 30
# A picture that is heavier than this has too many points for its size.
MAX_BYTES = 256 * 1024

_RC: dict[str, Any] = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "savefig.dpi": 160,  # of a PNG; twice what a page shows
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
    # Comes with matplotlib, so text is measured alike everywhere; a browser without it takes its own sans-serif.
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "lines.linewidth": 1.8,
    # Text stays text: readable by a screen reader, searchable, and a tenth of the size.
    "svg.fonttype": "none",
    # The same numbers give the same file.
    "svg.hashsalt": "hf_layerprune",
}


@contextmanager
def draw(
    path: Path, *, width: float = 7.2, height: float = 3.0, columns: int = 1, rows: int = 1, **subplots: Any
) -> Iterator[tuple[Figure, Any]]:
    """Make a figure in the project's style, and write it when the block ends well.

    Args:
        path (`Path`): Where to, `.svg` or `.png`. It is there whole or not at all.
        width (`float`, *optional*, defaults to 7.2): In inches of 100 pixels: a card's column is about 7.2 wide.
        height (`float`, *optional*, defaults to 3.0): In inches.
        columns (`int`, *optional*, defaults to 1): Axes side by side.
        rows (`int`, *optional*, defaults to 1): Axes below each other.
        subplots: For `Figure.subplots`: `sharey`, `width_ratios`, ...

    Yields:
        `tuple[Figure, Axes]`: The figure, and its axes, an array of them where there are several.

    Raises:
        LayerPruneError: matplotlib is not installed, or the picture is too heavy for a card.
        CheckpointError: The file can't be written.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise LayerPruneError('plots need matplotlib; pip install "hf-layerprune[plots]"') from None
    settings: Any = _RC
    # Without pyplot: no window, no global list of figures, and it works in any thread.
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(rows, columns, **subplots)
        _write(figure, path)


def grid(axes: Axes, axis: Literal["x", "y", "both"] = "y") -> None:
    """Faint lines to read values from, along one axis."""
    axes.grid(True, axis=axis)
    axes.tick_params(axis=axis, length=0)


def _write(figure: Figure, path: Path) -> None:
    kind = path.suffix.removeprefix(".")
    # Left to itself, matplotlib writes the date and its version.
    metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
    with new_file(path, force=True) as partial:
        figure.savefig(partial, format=kind, metadata=metadata)
        if (size := partial.stat().st_size) > MAX_BYTES:
            raise LayerPruneError(f"{path} would have {size} bytes, too many for a card; draw fewer points")
