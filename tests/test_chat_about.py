"""The card and the records of the chat's model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, strategies as st

import tests.chat_server  # noqa: F401 (makes the Space's files importable)
from hf_layerprune.publish.card.render import NO_REPEAT_NGRAM, Card
from hf_layerprune.publish.card.writing import write_card
from tests.publish_records import lineage_of, metrics_of

import about  # isort: skip
import source  # isort: skip


def records(tmp_path: Path, readme: str = "") -> about.Records:
    lineage = lineage_of()
    (tmp_path / "lineage.json").write_text(
        json.dumps({"schema_version": 1, "base": lineage.base, "entries": lineage.entries})
    )
    metrics_of(lineage).write(tmp_path)
    if readme:
        (tmp_path / "README.md").write_text(readme)
    return about.Records.load(str(tmp_path))


def test_the_card_is_shown_with_its_pictures(tmp_path: Path) -> None:
    records(tmp_path)
    write_card(tmp_path, weights=False)
    (tmp_path / "README.md").open("a").write(
        "\n![far](https://evil.example/x.png) ![far][ref] <IMG src='https://evil.example'> ![up](assets/../README.md)\n"
    )
    text = about.Records.load(str(tmp_path)).text
    assert text.lstrip().startswith("<!-- hf-layerprune:begin summary")
    assert "| **PIQA**" in text
    assert [name for name in re.findall(r"!\[([^\]]*)\]\(data:image/png;base64,", text) if "decoder layers" in name]
    assert "](assets" not in text.replace("[up](assets/../README.md)", "")
    assert not re.search(r"!\[[^\]]*\](?!\(data:)|<img", text, re.IGNORECASE)
    assert "the records are lineage.json and metrics.json." in text  # no links: the page has no such files


@pytest.mark.parametrize(
    "text",
    [
        "<img alt='>' src=https://evil.example>",
        "<svg><image href='https://evil.example'></svg>",
        "<div style='position: fixed'>",
        "<form action='https://evil.example'>",
        "<br onclick=x>",
        "<sub<img src=x>",
        "<!--><img src=x>-->",
        "<!-- --!><img src=x> -->",
        "<https://evil.example onclick=x>",
        "`<img src=x>`",
        "</script>",
    ],
)
def test_html_is_shown_as_text(text: str) -> None:
    assert not re.search("<[a-z!/](?!ub&lt;|!-- --)", about.render_card("m", text).replace("<!-- -->", ""))


def test_what_a_card_needs_is_kept() -> None:
    text = (
        "a <br><sub>b</sub> <!-- hf-layerprune:end x --> https<!-- -->: <https://x.example> 1 < 2\n<details><summary>"
    )
    assert about.render_card("m", text) == text


def test_a_long_card_of_marks_is_read_at_once() -> None:
    for mark in ("<", "![", "<!--", "<a src", "[a"):
        about.render_card("m", mark * 200_000)


def test_what_is_too_large_or_elsewhere_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, secret = tmp_path / "model", tmp_path / "secret"
    (folder / "assets").mkdir(parents=True)
    secret.write_bytes(b"secret" * 100)
    (folder / "assets" / "far.png").symlink_to(secret)
    (folder / "assets" / "near.png").write_bytes(b"x" * 300)
    monkeypatch.setattr(about, "MAX_SHOWN", 900)
    text = records(folder, "![far](assets/far.png)" + "![near](assets/near.png)" * 5).text
    assert text.count("base64") == 2
    assert text.endswith("nearnearnear")
    assert records(folder, "x" * 901).text == about.LEFT_OUT
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(secret)
    assert records(folder).text == about.LEFT_OUT
    blob = tmp_path / "models--me--model" / "blobs" / "1"
    blob.parent.mkdir(parents=True)
    (folder / "README.md").unlink()
    (folder / "README.md").symlink_to(blob)
    blob.write_text("A card")
    assert records(folder).text == "A card"


def test_a_folder_has_its_models_name(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    assert about.Records.load(str(folder)).name == "model"
    found = records(folder)
    assert found.name == Card.from_records(lineage_of()).name == "SmolLM2-135M-Instruct-23L"
    found.lineage["published"] = {"name": "Small"}
    assert found.name == "Small"
    found.lineage["published"]["repo_id"] = "me/Pushed"
    assert found.name == "Pushed"
    assert about.Records("me/other", found.lineage).name == "other"


def test_a_glance_at_a_model(tmp_path: Path) -> None:
    found = records(tmp_path)
    text = about.layer_map_html(found)
    assert [len(re.findall("<span", row)) for row in text.split("</div>")[:2]] == [15, 15]
    assert re.findall(r'class="(kept|gone)"', text) == ["kept"] * 12 + ["gone"] * 7 + ["kept"] * 11
    assert "SmolLM2-135M-Instruct without layers 12-18" in text
    found.card["base_model"] = "<img src=x>"
    assert "<img" not in about.layer_map_html(found)
    assert about.layer_map_html(about.Records("m")) == ""


def test_one_layer_is_not_layers(tmp_path: Path) -> None:
    found = records(tmp_path)
    found.lineage["entries"][0]["settings"]["drop_layers"] = [12]
    assert "without layer 12<" in about.layer_map_html(found)


def test_a_second_cut_counts_the_layers_that_the_first_left() -> None:
    cuts = [
        {"stage": "prune", "settings": {"drop_layers": [0, 1]}, "layers": {"base": 6, "left": 4}},
        {"stage": "prune", "settings": {"drop_layers": [0, 3]}, "layers": {"base": 4, "left": 2}},
    ]
    assert about.Records("m", {"entries": cuts}).layers() == (6, [3, 4])


@given(st.sets(st.integers(0, 60)))
def test_ranges_name_each_layer_once(layers: set[int]) -> None:
    text = about.format_ranges(sorted(layers))
    found = set()
    for part in text.split(", ") if layers else ():
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    assert found == layers


def test_a_model_without_records(tmp_path: Path) -> None:
    found = about.Records.load(str(tmp_path))
    assert (found.layers(), found.text) == (None, about.NO_CARD)


def test_a_model_on_the_hub_is_linked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(about, "find_file", lambda model, name: None)
    text = about.Records.load("me/pruned").text
    assert text == f"[me/pruned](https://huggingface.co/me/pruned)\n\n{about.NO_CARD}"


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (219_500_000, "219.5 MB"), (7e10, "70.0 GB")])
def test_a_number_of_bytes(count: float, text: str) -> None:
    assert about.format_bytes(count) == text


def test_what_the_card_advises_against_repetition_is_done() -> None:
    assert source.NO_REPEAT_NGRAM == NO_REPEAT_NGRAM


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lineage.json", "[]"),
        ("lineage.json", "[" * 100_000),
        ("lineage.json", '{"entries": [1]}'),
        ("README.md", "---\nlicense: !!bool perhaps\n---\n"),
        ("README.md", "---\n- x\n---\n"),
    ],
)
def test_damaged_records_are_named(tmp_path: Path, name: str, text: str) -> None:
    records(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=name):
        about.Records.load(str(tmp_path))


@pytest.mark.parametrize("total", [0, -1, 10**8, 10**15, "<b>", 2.5])
def test_a_number_of_layers_that_no_model_has(tmp_path: Path, total: object) -> None:
    lineage = records(tmp_path).lineage
    lineage["entries"][0]["layers"]["base"] = total
    (tmp_path / "lineage.json").write_text(json.dumps(lineage))
    with pytest.raises(ValueError, match=r"lineage\.json"):
        about.Records.load(str(tmp_path))


@pytest.mark.parametrize("form", ["*a", "!!pairs [k: *a", "!!omap [k: *a"])
def test_metadata_that_grows_when_it_is_read(tmp_path: Path, form: str) -> None:
    tag, part = form.rpartition("[")[0], form.rpartition("[")[2]
    lines = [f"a{i}: &a{i} {tag}[{', '.join([f'{part}{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(ValueError, match=r"README\.md is damaged .*more than 1,000,000 values"):
        records(tmp_path, "\n".join(["---", "a0: &a0 [x, x]", *lines, "license: *a9", "---", ""]))
