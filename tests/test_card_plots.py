"""The pictures: what they say, and that they can be read on light and on dark."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from hf_layerprune.publish.card import style
from hf_layerprune.publish.card.plots import available_plots, draw_layer_map, draw_scores
from hf_layerprune.records.figures.results import build_results
from hf_layerprune.records.history import read_history

from .publish_records import ROLES, lineage_of, metrics_of

# White, and the dark pages of the Hub and of GitHub.
PAGES = ("#ffffff", "#0b0f19", "#0d1117")


def linear(colour: str) -> np.ndarray:
    values = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    light, dark = sorted((float(linear(c) @ [0.2126, 0.7152, 0.0722]) for c in (one, other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_can_be_read_on_light_and_dark() -> None:
    for page in PAGES:
        assert contrast(style.INK, page) >= 4.3, page
        assert all(contrast(colour, page) >= 3 for colour in (*style.ROLE_COLOURS.values(), *style.CYCLE)), page
    assert len(set(style.ROLE_MARKERS.values())) == len(style.ROLE_MARKERS)


def words(path: Path) -> list[str]:
    """What stands in a picture: text stays text in an SVG file."""
    return [text.strip() for text in re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    folder = tmp_path_factory.mktemp("pictures")
    lineage = lineage_of()
    told = {"unit": "1 - cosine", "layers": [0.1 * i for i in range(29)] + [None]}
    lineage.entries[0]["selection"] = {"criterion": "block_influence", "why": "the lowest", "scores": told}
    found: dict[str, list[Path]] = {}
    for name, draw in available_plots(read_history(lineage), build_results(metrics_of(lineage))).items():
        found[name] = [folder / f"{name}.{kind}" for kind in ("svg", "png")]
        for path in found[name]:
            draw(path)
    return found


def test_every_picture(drawn: dict[str, list[Path]]) -> None:
    assert set(drawn) == {"layers", "scores", "accuracy", "tradeoff"}
    from matplotlib.image import imread

    for svg, png in drawn.values():
        assert max(svg.stat().st_size, png.stat().st_size) < 64_000
        pixels = imread(png)
        assert pixels.shape[1] > 1000
        assert pixels[0, 0, 3] == 0  # no ground of its own
        assert (pixels[..., 3] > 0.5).mean() > 0.003  # and yet not empty


def test_the_legend_has_stages_that_lack_the_first_task(tmp_path: Path) -> None:
    lineage = lineage_of()
    metrics = metrics_of(lineage)
    first = [one for one in metrics.results if one.get("task") == "piqa"]
    metrics.results = [one for one in metrics.results if one not in first or one["weights"] != metrics.weights]
    for one in first:
        del one["chance"]
    available_plots(read_history(lineage), build_results(metrics))["accuracy"](tmp_path / "accuracy.svg")
    assert {*ROLES, "PIQA", "chance"} <= {*words(tmp_path / "accuracy.svg")}


def test_what_the_pictures_say(drawn: dict[str, list[Path]]) -> None:
    layers = words(drawn["layers"][0])
    assert [str(i) for i in range(30)] == layers[:30]
    # Tensors of layers 10, 11 and 12 of the cut model were trained: 10, 11 and 19 of the base.
    assert layers[30:] == ["kept as it was (20)", "dropped (7)", "trained (3)"]
    accuracy = words(drawn["accuracy"][0])
    assert {*ROLES, "PIQA", "ARC-Easy", "OpenBookQA", "chance", "accuracy in %, with standard errors"} <= {*accuracy}
    tradeoff = words(drawn["tradeoff"][0])
    assert {"dense, 30 layers", "healed, 23 layers", "decode throughput, as a multiple of the dense model's"} <= set(
        tradeoff
    )
    assert "block influence" in words(drawn["scores"][0])


def test_the_same_records_give_the_same_picture(tmp_path: Path) -> None:
    history = read_history(lineage_of())
    for kind in ("svg", "png"):
        for name in ("a", "b"):
            draw_layer_map(history, tmp_path / f"{name}.{kind}")
        assert (tmp_path / f"a.{kind}").read_bytes() == (tmp_path / f"b.{kind}").read_bytes()


@pytest.mark.parametrize(("layers", "dropped"), [(2, [0]), (32, [31]), (126, list(range(50, 82)))])
def test_stacks_of_all_heights(tmp_path: Path, layers: int, dropped: list[int]) -> None:
    lineage = lineage_of(("dense", "cut"))
    lineage.entries[0] |= {"layers": {"base": layers, "left": layers - len(dropped)}}
    lineage.entries[0]["settings"]["drop_layers"] = dropped
    draw_layer_map(read_history(lineage), tmp_path / "map.svg")
    shown = words(tmp_path / "map.svg")
    assert shown[:layers] == [str(i) for i in range(layers)]
    assert shown[layers:] == [f"kept as it was ({layers - len(dropped)})", f"dropped ({len(dropped)})"]


@pytest.mark.parametrize("values", [[1.0] * 4, [0.0, 0.0, 0.0, 0.0], [1e-8, 1.0, 1e8, 3.0], [-1.0, 0.5, -2.0, 0.0]])
def test_scores_of_any_kind(tmp_path: Path, values: list[float]) -> None:
    draw_scores(values, [1, 3], "a score", tmp_path / "scores.svg")
    assert {"kept", "dropped", "a score"} <= set(words(tmp_path / "scores.svg"))


def test_records_that_do_not_suffice_give_no_picture() -> None:
    lineage = lineage_of(("dense", "cut"))
    lineage.entries[0]["selection"] = {"criterion": "x", "scores": {"layers": [1.0]}}  # of another model
    assert set(available_plots(read_history(lineage), None)) == {"layers"}
    alone = metrics_of(lineage, ("cut",))
    assert set(available_plots(read_history(lineage), build_results(alone))) == {"layers"}


def test_nothing_half_drawn(tmp_path: Path) -> None:
    def drawing(values: object) -> None:
        with style.new_figure(tmp_path / "a.svg") as (_, axes):
            axes.plot(values)

    with pytest.raises(ValueError, match="could not be cast"):
        drawing([[1, "x"], {}])
    assert list(tmp_path.iterdir()) == []
