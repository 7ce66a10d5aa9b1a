"""The chat's page about its model: the records, in the words of the card."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tests.chat_server  # noqa: F401 (makes the Space's files importable)
from hf_layerprune.publish.card import tables
from hf_layerprune.publish.card.render import Card
from hf_layerprune.records.figures import results
from hf_layerprune.records.history import Stage
from tests.publish_records import lineage_of, metrics_of

import about  # isort: skip


def records(tmp_path: Path, readme: str = "") -> about.Records:
    lineage = lineage_of()
    (tmp_path / "lineage.json").write_text(
        json.dumps({"schema_version": 1, "base": lineage.base, "entries": lineage.entries})
    )
    metrics_of(lineage).write(tmp_path)
    if readme:
        (tmp_path / "README.md").write_text(readme)
    return about.Records.of(str(tmp_path))


def test_the_page_says_what_the_records_say(tmp_path: Path) -> None:
    found = records(tmp_path, "---\nlicense: apache-2.0\nbase_model: HuggingFaceTB/SmolLM2-135M-Instruct\n---\n")
    text = about.page(found)
    assert text.count('class="kept"') == 23
    assert text.count('class="gone"') == 7
    assert "Layer 12: dropped" in text
    assert "Layer 19: kept" in text
    assert "dropped: 12-18" in text
    for role in ("dense", "cut", "repaired", "healed"):
        assert f'<th scope="col">{role}<br>' in text
    assert 'href="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct"' in text
    assert "Licence: apache-2.0" in text


def test_settings_are_told_in_words(tmp_path: Path) -> None:
    found = records(tmp_path)
    text = about.history(found.lineage)
    assert "Layers 12-18 dropped" in text
    (heal,) = (entry for entry in found.lineage["entries"] if entry["stage"] == "heal")
    heal["settings"] = {
        "method": "behind2",
        "learning_rate": 0.00017361111111111112,
        "packing": False,
        "max_steps": -1,
    }
    assert about.told(heal) == "What is trained: behind2; learning rate: 0.000174."
    table = str(tables.training_table(Stage("heal", heal, frozenset())))
    for value in ("behind2", "0.000174"):
        assert f"`{value}`" in table


def test_a_folder_has_its_models_name(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    assert about.Records.of(str(folder)).name == "model"
    found = records(folder)
    assert found.name == Card.of(lineage_of()).name == "SmolLM2-135M-Instruct-23L"
    found.lineage["published"] = {"name": "Small"}
    assert found.name == "Small"
    assert about.Records("me/other", found.lineage).name == "other"


def test_the_numbers_are_those_of_the_card(tmp_path: Path) -> None:
    """What the card says in a cell of its tables, the page says."""
    lineage = lineage_of()
    metrics = metrics_of(lineage)
    metrics.add(results=[one | {"metric": "nll"} for one in metrics.results if one["metric"] == "perplexity"])
    metrics.write(tmp_path)
    text = about.table(json.loads((tmp_path / "metrics.json").read_text()))
    rows = [re.findall(r"<td>(.*?)</td>", row) for row in re.findall(r"<tr.*?</tr>", text.partition("<tbody>")[2])]
    found = results.results_of(metrics)
    wanted = [row for kinds in (results.QUALITY, results.COST) for row in found.table(kinds)]
    assert len(rows) == len(wanted)
    for row, expected in zip(rows, wanted, strict=True):
        cells = [expected.cells.get(column.weights) for column in found.columns]
        for said, cell in zip(row, cells, strict=True):
            value, _, change = re.sub(r"</?(small|em)>", "", said).partition("<br>")
            assert (value, change) == ((cell.value, cell.change) if cell else ("", ""))
            assert ("<em>" in said) == bool(cell and cell.noise)


def test_damaged_numbers_are_no_reason_to_show_nothing(tmp_path: Path) -> None:
    found = records(tmp_path)
    del found.metrics["results"][0]["metric"]
    text = about.page(found)
    assert "is damaged" in text
    assert "dropped: 12-18" in text


def test_a_glance_at_a_model(tmp_path: Path) -> None:
    found = records(tmp_path)
    text = about.at_a_glance(found)
    assert [len(re.findall("<span", row)) for row in text.split("</div>")[:2]] == [15, 15]
    assert re.findall(r'class="(kept|gone)"', text) == ["kept"] * 12 + ["gone"] * 7 + ["kept"] * 11
    assert "SmolLM2-135M-Instruct without layers 12-18" in text
    found.card["base_model"] = "<img src=x>"
    assert "<img" not in about.at_a_glance(found)
    assert about.at_a_glance(about.Records("m")) == ""


def test_one_layer_is_not_layers(tmp_path: Path) -> None:
    found = records(tmp_path)
    prune = found.lineage["entries"][0]
    prune["settings"]["drop_layers"] = [12]
    assert "<p>Dropped: layer 12 of" in about.layer_map(found)
    assert about.told(prune).startswith("Layer 12 dropped")


def test_a_second_cut_counts_the_layers_that_the_first_left() -> None:
    cuts = [
        {"stage": "prune", "settings": {"drop_layers": [0, 1]}, "layers": {"base": 6, "left": 4}},
        {"stage": "prune", "settings": {"drop_layers": [0, 3]}, "layers": {"base": 4, "left": 2}},
    ]
    assert about.Records("m", {"entries": cuts}).layers() == (6, [3, 4])


@given(st.sets(st.integers(0, 60)))
def test_ranges_name_each_layer_once(layers: set[int]) -> None:
    text = about.ranges(sorted(layers))
    found = set()
    for part in text.split(", ") if layers else ():
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    assert found == layers


def test_a_model_without_records_has_a_page(tmp_path: Path) -> None:
    text = about.page(about.Records.of(str(tmp_path)))
    assert "the dropped layers are unknown" in text
    assert "Nothing has been measured" in text
    assert "the card names none" in text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lineage.json", "[]"),
        ("lineage.json", "[" * 100_000),
        ("lineage.json", '{"entries": [1]}'),
        ("lineage.json", '{"base": ["x"]}'),
        ("README.md", "---\nlicense: !!bool perhaps\n---\n"),
        ("README.md", "---\n- x\n---\n"),
    ],
)
def test_damaged_records_are_named(tmp_path: Path, name: str, text: str) -> None:
    records(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        about.Records.of(str(tmp_path))


@pytest.mark.parametrize("total", [0, -1, 10**8, 10**15, "<b>", 2.5])
def test_a_number_of_layers_that_no_model_has(tmp_path: Path, total: object) -> None:
    lineage = records(tmp_path).lineage
    lineage["entries"][0]["layers"]["base"] = total
    (tmp_path / "lineage.json").write_text(json.dumps(lineage))
    with pytest.raises(ValueError, match=r"lineage\.json"):
        about.Records.of(str(tmp_path))


@pytest.mark.parametrize("form", ["*a", "!!pairs [k: *a", "!!omap [k: *a"])
def test_metadata_that_grows_when_it_is_read(tmp_path: Path, form: str) -> None:
    tag, part = form.rpartition("[")[0], form.rpartition("[")[2]
    lines = [f"a{i}: &a{i} {tag}[{', '.join([f'{part}{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(ValueError, match=r"README\.md is damaged .*more than 1,000,000 values"):
        records(tmp_path, "\n".join(["---", "a0: &a0 [x, x]", *lines, "license: *a9", "---", ""]))


def test_many_numbers_are_arranged_at_once() -> None:
    metrics = metrics_of(lineage_of())
    one = next(one for one in metrics.results if one["kind"] == "accuracy")
    pair = next(one for one in metrics.comparisons if one["kind"] == "accuracy")
    metrics.results[:] = [one | {"task": f"t{i}"} for i in range(3000)]
    metrics.comparisons[:] = [pair | {"task": f"t{i}", "weights": one["weights"]} for i in range(3000)]
    began = time.process_time()
    assert len(results.results_of(metrics).rows) == 3000
    assert time.process_time() - began < 10


def test_records_can_hold_no_html(tmp_path: Path) -> None:
    found = records(tmp_path, "---\nlicense: <script>\n---\n")
    found.lineage["base"]["id"] = "<img src=x>"
    found.lineage["entries"][0]["settings"]["criterion"] = "<img src=x>"
    found.metrics["results"][0]["task"] = "<img src=x>"
    found.metrics["models"][found.metrics["weights"]]["name"] = "<img src=x>"
    text = about.page(found)
    assert "<img" not in text
    assert "<script" not in text
    found.metrics["models"][found.metrics["weights"]]["layers"] = "<img src=x>"
    assert "<img" not in about.page(found)
