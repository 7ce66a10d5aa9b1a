"""What `hf-layerprune card` writes into a folder, and what it leaves as people wrote it."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, strategies as st
from PIL import Image

from hf_layerprune import CheckpointError, LayerPruneError
from hf_layerprune.cli import main
from hf_layerprune.publish.card import regions
from hf_layerprune.publish.card.commands import list_commands
from hf_layerprune.publish.card.writing import record_declarations, write_card
from hf_layerprune.publish.requests import CardRequest
from hf_layerprune.records.declared import declared_fields, declared_gguf_fields, split_front_matter
from hf_layerprune.records.history import read_history
from hf_layerprune.records.lineage import Lineage

from .heal_makers import word_tokenizer
from .publish_multimodal import run_card
from .publish_records import lineage_of, measure_by_hand, metrics_of
from .tiny_models import tiny_model


def make(tmp_path: Path, **base: Any) -> Path:
    """A folder with records and without weights, as `model_cards/` keeps them."""
    folder = tmp_path / "model"
    folder.mkdir()
    lineage = lineage_of(**base)
    lineage.write(folder)
    metrics_of(lineage).write(folder)
    return folder


def measure_all_of_piqa(folder: Path) -> None:
    """Turn the number from a part of PIQA into one from all of its questions."""
    metrics = json.loads((folder / "metrics.json").read_text())
    for record in metrics["results"]:
        if record.get("task") == "piqa":
            record |= {"settings": {}, "dataset": "ybisk/piqa"}
    (folder / "metrics.json").write_text(json.dumps(metrics))


def test_card_of_a_pruned_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    tiny_model("llama").save_pretrained(base)
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: [en, no]\n---\n# Base\n")
    (base / "LICENSE").write_text("Do as you like.\n")
    assert main(["prune", str(base), str(out), "--drop", "2"]) == 0
    lineage = Lineage.load(out)
    assert (lineage.base["license"], lineage.base["language"]) == ("mit", ["en", "no"])
    assert (out / "LICENSE").read_text() == "Do as you like.\n"
    assert not (out / "README.md").exists()

    assert main(["card", str(out)]) == 0
    assert "wrote assets/layers.png, README.md" in capsys.readouterr().out
    fields, body = split_front_matter((out / "README.md").read_text())
    assert (fields["license"], fields["language"]) == ("mit", ["en", "no"])
    assert "without layers 6-7: 6 of 8 decoder layers remain" in body
    assert str(tmp_path) not in (out / "README.md").read_text()
    assert main(["card", str(out)]) == 0
    assert "is up to date" in capsys.readouterr().out

    measure_by_hand(out)
    assert main(["card", str(out)]) == 0
    assert "assets/accuracy.png" in capsys.readouterr().out
    assert "model-index" in (out / "README.md").read_text()
    assert sorted(path.name for path in (out / "assets").iterdir()) == ["accuracy.png", "layers.png"]

    # Numbers of other weights, or none any more.
    metrics = json.loads((out / "metrics.json").read_text())
    (out / "metrics.json").write_text(json.dumps(metrics).replace(metrics["weights"], "0" * 64))
    assert main(["card", str(out)]) == 1
    assert "was measured on other weights" in capsys.readouterr().err
    (out / "metrics.json").unlink()
    assert main(["card", str(out)]) == 0
    assert sorted(path.name for path in (out / "assets").iterdir()) == ["layers.png"]


@pytest.mark.parametrize("more", [[], ["--adapter"]], ids=["model", "adapter"])
@pytest.mark.parametrize("kind", ["llama", "llava"])
def test_the_code_of_a_card_runs_without_a_tokenizer_or_processor(
    kind: str, more: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the card names a local base without its path
    tiny_model(kind).save_pretrained("base")
    if kind == "llava":
        word_tokenizer().save_pretrained("base")
    assert main(["prune", "base", "out", "--drop", "2", *more]) == main(["card", "out"]) == 0
    assert run_card(Path("out"))[1] is False


@pytest.mark.parametrize("words", ["--tune-layers cut --no-tune-lm-head", "--tune-layers 2-2", "--tune-layers 1", ""])
def test_the_command_of_an_adapters_card_makes_it_again(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_model("llama").save_pretrained("base")
    assert main(["prune", "base", "out", "--drop-layers", "3", "--adapter", *words.split()]) == 0
    (command,) = list_commands(read_history(Lineage.load(Path("out")) or Lineage({})))
    assert main(shlex.split(command.replace("\\\n", " "))[1:]) == 0
    made, again = (json.loads(Path(name, "adapter_config.json").read_text()) for name in ("out", "pruned"))
    assert made["modules_to_save"] == again["modules_to_save"]


@pytest.mark.parametrize(("words", "fields"), [
    (["--license", "mit"], {"license": "mit"}),
    (["--license", "other", "--license-name", "house", "--license-link", "https://example.org/l"],
     {"license": "other", "license_name": "house", "license_link": "https://example.org/l"}),
    (["--base-model", "org/base"], {"id": "model.gguf", "hub_id": "org/base"}),
])  # fmt: skip
def test_what_only_the_user_knows(tmp_path: Path, words: list[str], fields: dict[str, str]) -> None:
    folder = make(tmp_path, id="/data/model.gguf", commit=None, license=None)
    (folder / "metrics.json").unlink()
    assert main(["card", str(folder), *words]) == 0
    assert fields.items() <= Lineage.load(folder).base.items()


def test_a_name_until_it_is_on_the_hub(tmp_path: Path) -> None:
    folder = make(tmp_path)
    (folder / "metrics.json").unlink()  # of weights that are not here
    assert main(["card", str(folder), "--name", "SmolLM2-small"]) == 0
    assert "\n# SmolLM2-small\n" in (folder / "README.md").read_text()
    record_declarations(CardRequest(folder), published={"repo_id": "org/other"})
    record_declarations(CardRequest(folder, name="late"))
    write_card(folder, weights=False)
    assert "\n# other\n" in (folder / "README.md").read_text()


@pytest.mark.parametrize(("words", "code", "message"), [
    (["--license-name", "x"], 2, "need --license"),
    (["--base-model", "no such id!"], 1, "is not a Hub id"),
    (["--name", "org/model"], 1, "is not a valid model name"),
    (["--base-model", "other/base"], 1, "not from other/base"),
])  # fmt: skip
def test_bad_words(
    tmp_path: Path, words: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path)
    assert main(["card", str(folder), *words]) == code
    assert message in capsys.readouterr().err
    assert not (folder / "README.md").exists()


@pytest.mark.parametrize(("content", "message"), [
    (None, "has no lineage.json"),
    ('{"schema_version": 99, "base": {}, "entries": []}', "unexpected value at schema_version: this version of hf_layerprune reads version 1; upgrade it"),
    ('{"schema_version": 1, "base": {}, "entries": [3]}', "unexpected value at entries/0:"),
    ('{"schema_version": 1, "base": {}, "entries": []}', "how many layers"),
    ('{"schema_version": 1, "base": {}, "entries": [{"stage": "prune", "layers": {"base": 4}, '
     '"settings": {"drop_layers": [4]}}]}', "drops layers"),
    ('{"schema_version": 1, "base": {}, "entries": [{"stage": "prune", "layers": {"base": 4.0}, '
     '"settings": {"drop_layers": [4]}}]}', "drops layers"),
    ('{"schema_version": 1, "base": {}, "entries": [{"stage": "prune", "layers": {"base": 4, "left": 4}, '
     '"settings": {"drop_layers": [3]}}]}', "it was edited"),
    ('{"schema_version": 1, "base": {}, "entries": [{"stage": "prune", "layers": {"base": 4}, '
     '"selection": {"scores": {"layers": [1, 2, 3, "x"]}}}]}', "scores.png can't be drawn"),
    ('{"schema_version": 1, "base": {}, "entries": [{"stage": "heal", "layers": {"base": 4, "left": 3}}]}',
     "does not say which layers were dropped"),
    ('{"schema_version": 1, "base": {}, "entries": [{"stage": "quantize", "layers": {"base": 4}}]}',
     "does not say how the model was quantised"),
    ('{"schema_version": 1, "base": {}, "entries": [{"stage": "quantize", "layers": {"base": 4}}, {"stage": "quantize"}]}',
     "quantised more than once"),
])  # fmt: skip
def test_records_that_say_nothing(
    tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "lineage.json").write_text(content)
    assert main(["card", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "README.md").exists()


def test_what_is_no_folder_has_no_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes").write_text("mine")
    for name, what in (("absent", "does not exist"), ("notes", "is a file")):
        assert main(["card", str(tmp_path / name)]) == 1
        assert f"{name} {what}; specify a model folder written by hf-layerprune prune" in capsys.readouterr().err


# Two authors.


def test_what_people_write_stays(tmp_path: Path) -> None:
    folder = make(tmp_path)
    write_card(folder, weights=False)
    card = folder / "README.md"
    text = card.read_text()
    text = text.replace("tags:\n", "widget:\n- text: Hello\ntags:\n- mine\n")
    first = "<!-- hf-layerprune:begin summary"
    text = text.replace(first, f"Before all.\n\n{first}")
    text = text.replace("end results -->\n", "end results -->\n\n## What I think\n\nIt *sings*.\n")
    text += "\nLast words.\n"
    card.write_text(text)
    lineage = Lineage.load(folder)
    lineage.entries[0]["settings"]["seed"] = 7
    lineage.write(folder)
    assert write_card(folder, weights=False)[-1] == "README.md"
    fields, body = split_front_matter(card.read_text())
    assert fields["widget"] == [{"text": "Hello"}]
    assert fields["tags"] == ["layer-pruning", "depth-pruning", "hf_layerprune", "conversational", "mine"]
    parts = regions.parse(body)
    order = [part.region or part.text.strip() for part in parts]
    assert order[0] == "Before all."
    assert order[order.index("results") + 1] == "## What I think\n\nIt *sings*."
    assert order[-1] == "Last words."
    assert "seed: 7" in body
    assert write_card(folder, weights=False) == []
    for words in ("no", "[en, no]"):  # false to a reader of YAML 1.1
        assert split_front_matter(f"---\nlanguage: {words}\n---\n")[0]["language"] in ("no", ["en", "no"])


@pytest.mark.parametrize(
    ("template", "chats"),
    [
        ("{{ 1 }}", True),
        (None, False),
        ([{"name": "rag"}], False),
        (["default"], False),
        ([{"name": "rag"}, {"name": "default"}], True),
    ],
)
def test_a_base_chats_if_it_has_a_default_template(template: Any, chats: bool, tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert declared_fields(tmp_path) == ({"chat": True} if chats else {})


@pytest.mark.parametrize(
    ("said", "declared"),
    [
        ("license: [mit]\nlanguage: en", {"license": "mit", "language": ["en"]}),
        ("license: [mit, gpl-3.0]\nlicense_name: [a, b]", {}),
        (
            "license: ' other '\nlicense_name: 7\nlicense_link: ./LICENSE",
            {"license": "other", "license_link": "./LICENSE"},
        ),
        ("license_link: https://x.org/l\nlicense: ' '", {"license_link": "https://x.org/l"}),
        ("language: [en, 7, 0, '<b>', no]", {"language": ["en", "no"]}),
        ("language: [7]", {}),
        ('license: mit\nlicense_name: "\\ud800"', {}),  # no file could hold it
        ("language: no", {"language": ["no"]}),
    ],
)
def test_what_the_card_of_a_base_declares(
    said: str, declared: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "card.md").write_text(f"---\n{said}\n---\n# Base\n")
    assert declared_fields(tmp_path, tmp_path / "card.md") == declared
    assert caplog.text.count("declares several licences") == ("gpl" in said)
    if "./" in said:
        declared = declared | {"license_link": "https://huggingface.co/org/base/blob/abc/LICENSE"}
    assert declared_fields(tmp_path, tmp_path / "card.md", "org/base/blob/abc") == declared
    (tmp_path / "chat_template.jinja").touch()
    assert declared_fields(tmp_path) == {"chat": True}


def test_what_a_gguf_file_declares() -> None:
    keys = {"general.license": " mit ", "general.license.link": "LICENSE", "general.license.name": ""}
    assert declared_gguf_fields(keys) == {"license": "mit", "license_link": "LICENSE"}
    assert declared_gguf_fields({"tokenizer.chat_template": "{{ 1 }}"}) == {"chat": True}


def test_a_card_without_fields() -> None:
    assert split_front_matter("# Base\n---\na: b\n") == ({}, "# Base\n---\na: b\n")


def test_what_people_write_inside_is_not_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path)
    write_card(folder, weights=False)
    card = folder / "README.md"
    edited = card.read_text().replace("## Limits\n", "## Limits\n\nIt bites.\n")
    card.write_text(edited)
    with pytest.raises(CheckpointError, match=r"changed inside .*\(limits\)"):
        write_card(folder, weights=False)
    assert card.read_text() == edited
    write_card(folder, weights=False, force=True)
    assert "It bites." not in card.read_text()


@pytest.mark.parametrize("mark", [r"begin summary \w+", "end citation", "end speed"])
def test_one_broken_mark_loses_no_words(tmp_path: Path, mark: str) -> None:
    folder = make(tmp_path)
    write_card(folder, weights=False)
    card = folder / "README.md"
    said = [f"Words of somebody, {i}." for i in range(4)]
    text = card.read_text().replace(
        "<!-- hf-layerprune:begin summary", f"{said[0]}\n\n<!-- hf-layerprune:begin summary"
    )
    text = text.replace("end summary -->", f"end summary -->\n\n{said[1]}").replace(
        "end speed -->", f"end speed -->\n\n{said[2]}"
    )
    whole = f"{text}\n{said[3]}\n"
    for broken in (
        re.sub(f"<!-- hf-layerprune:{mark} -->", new, whole) for new in ("", "<!- oops -->", r"\g<0>\n\g<0>")
    ):
        assert broken != whole
        card.write_text(broken)
        with pytest.raises(CheckpointError, match=r"README\.md has an unmatched or repeated mark"):
            write_card(folder, weights=False)
        assert card.read_text() == broken
        write_card(folder, weights=False, force=True)
        assert all(card.read_text().count(words) == 1 for words in said)
        assert write_card(folder, weights=False) == []


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
def test_a_card_in_another_encoding_is_not_lost(tmp_path: Path, encoding: str) -> None:
    folder = make(tmp_path)
    content = "# Größe\n\nMeine Worte.\n".encode(encoding)
    (folder / "README.md").write_bytes(content)
    for force in (False, True):
        with pytest.raises(CheckpointError, match=r"README.md is not UTF-8.*convert it"):
            write_card(folder, weights=False, force=force)
        assert (folder / "README.md").read_bytes() == content


@pytest.mark.parametrize("yaml", [
    "license: [mit", "a: b: c", "- a\n- b", "key: value\n\ttab: no", "a: 1\n a: 2", "!!python/object:os.system {}",
    "x: &a [*a", "? {}: {}",
])  # fmt: skip
def test_a_card_with_broken_yaml_is_not_lost(tmp_path: Path, yaml: str) -> None:
    folder = make(tmp_path)
    for end in ("---\n", ""):
        content = f"---\n{yaml}\n{end}# Mine\n"
        if not end and not re.match(r"[\w-]+:", yaml):
            continue
        (folder / "README.md").write_text(content)
        for force in (False, True):
            with pytest.raises(CheckpointError, match=r"the YAML block of .*README.md (can't be read|has no end)"):
                write_card(folder, weights=False, force=force)
            assert (folder / "README.md").read_text() == content


def test_fields_of_others_stay_as_they_are(tmp_path: Path) -> None:
    folder = make(tmp_path)
    (folder / "README.md").write_bytes(
        "\ufeff---\r\nmine: {a: [1, {b: null}]}\r\nnothing:\r\n---\r\n# Mine\r\n".encode()
    )
    write_card(folder, weights=False)
    fields, body = split_front_matter((folder / "README.md").read_text())
    assert (fields["mine"], fields["nothing"]) == ({"a": [1, {"b": None}]}, None)
    assert body.endswith("# Mine\n")


@pytest.mark.parametrize("name", ["README.md", "assets", ".eval_results", "assets/layers.png", "NOTICE"])
def test_nothing_is_written_through_a_link(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path, license="llama3.1")
    outside = tmp_path / "outside"
    outside.mkdir() if name in ("assets", ".eval_results") else outside.write_text("mine")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(outside)
    with pytest.raises(CheckpointError, match=re.escape(name)):
        write_card(folder, weights=False)
    assert outside.read_text() == "mine" if outside.is_file() else not list(outside.iterdir())
    assert not (folder / "README.md").is_file() or name == "README.md"


def test_a_folder_in_place_of_the_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make(tmp_path)
    (folder / "metrics.json").unlink()
    (folder / "README.md").mkdir()
    assert main(["card", str(folder)]) == 1
    error = capsys.readouterr().err
    assert "README.md is not a file" in error
    assert error.count("\n") == 1


def test_files_of_others_are_not_replaced(tmp_path: Path) -> None:
    folder = make(tmp_path)
    measure_all_of_piqa(folder)
    (folder / ".eval_results").mkdir()
    (folder / ".eval_results" / "piqa.yaml").write_text("- mine\n")
    write_card(folder, weights=False)
    assert (folder / ".eval_results" / "piqa.yaml").read_text() == "- mine\n"
    Image.new("RGB", (2, 2)).save(folder / "assets" / "layers.png")
    picture = (folder / "assets" / "layers.png").read_bytes()
    with pytest.raises(CheckpointError, match=r"layers.png was not drawn by hf-layerprune; move it,"):
        write_card(folder, weights=False)
    assert (folder / "assets" / "layers.png").read_bytes() == picture
    assert write_card(folder, weights=False, force=True) == ["assets/layers.png"]


def test_another_licence_leaves_nothing_of_the_one_before(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = make(tmp_path)
    path = folder / "README.md"
    path.write_text(
        "---\nlicense: other\nlicense_name: x\nlicense_link: https://x.org\ndatasets: [a/b]\n---\n# Mine\n"
    )
    with caplog.at_level("INFO"):
        write_card(folder, weights=False)
        write_card(folder, weights=False)
    (said,) = [message for message in caplog.messages if "licence" in message]  # never silently, and once
    assert said.startswith(f"{path} named the licence other, which is now apache-2.0")
    fields = split_front_matter(path.read_text())[0]
    assert fields["license"] == "apache-2.0"
    assert not fields.keys() & {"license_name", "license_link"}
    assert fields.get("datasets") != ["a/b"]


def test_a_card_of_somebody_else_is_kept_below(tmp_path: Path) -> None:
    folder = make(tmp_path)
    (folder / "README.md").write_text("---\nlicense: mit\nthumbnail: x.png\n---\n\n# My own card\n\nWords.\n")
    write_card(folder, weights=False)
    text = (folder / "README.md").read_text()
    assert text.endswith("<!-- hf-layerprune:end citation -->\n\n# My own card\n\nWords.\n")
    assert split_front_matter(text)[0]["license"] == "apache-2.0"
    assert split_front_matter(text)[0]["thumbnail"] == "x.png"


def test_a_template_that_nobody_filled_in_goes(tmp_path: Path) -> None:
    from huggingface_hub import ModelCard, ModelCardData

    folder = make(tmp_path)
    ModelCard.from_template(ModelCardData(library_name="peft")).save(folder / "README.md")
    write_card(folder, weights=False)
    text = (folder / "README.md").read_text()
    assert "Model Card for Model ID" not in text
    # One in which somebody wrote a single line is theirs.
    card = ModelCard.from_template(ModelCardData(library_name="peft"))
    card.text = card.text.replace("[More Information Needed]", "It rhymes.", 1)
    card.save(folder / "README.md")
    write_card(folder, weights=False)
    assert "It rhymes." in (folder / "README.md").read_text()


words = st.text(st.characters(blacklist_categories=("Cs", "Cc")), max_size=40).map(str.strip)
names = st.lists(st.sampled_from(["a", "b", "c", "d"]), unique=True)


@given(old=names, new=st.lists(st.sampled_from(["a", "b", "c", "d"]), unique=True, min_size=1), theirs=st.lists(words))
def test_merging_loses_nothing(old: list[str], new: list[str], theirs: list[str]) -> None:
    pieces, between = [], iter(theirs)
    for name in [None, *old]:
        pieces += [regions.add_markers(name, f"old {name}")] if name else []
        pieces += [text] if (text := next(between, "")) else []
    before = regions.parse("\n\n".join(pieces))
    merged = regions.merge(
        regions.parse("\n\n".join(regions.add_markers(name, f"new {name}") for name in new)), before
    )
    after = regions.parse(merged)
    assert [part.region for part in after if part.region] == new
    assert all(part.text == f"new {part.region}" for part in after if part.region)
    said = [" ".join(regions.foreign_texts(parts)).split() for parts in (before, after)]
    assert sorted(said[0]) == sorted(said[1])
    assert regions.merge(after, after) == merged


# The files beside it.


def test_a_licence_that_asks_for_a_notice(tmp_path: Path) -> None:
    folder = make(tmp_path, license="llama3.1")
    assert "NOTICE" in write_card(folder, weights=False)
    notice = (folder / "NOTICE").read_text()
    assert notice.startswith("Llama 3.1 is licensed under the Llama 3.1 Community License, Copyright ©")
    assert "7 of its decoder layers were removed" in notice
    assert "**Built with Llama**" in (folder / "README.md").read_text()
    assert write_card(folder, weights=False) == []
    (folder / "NOTICE").rename(folder / "NOTICE.txt")
    (folder / "NOTICE.txt").write_text("Of the base.\n")
    assert write_card(folder, weights=False) == ["NOTICE.txt"]
    assert (folder / "NOTICE.txt").read_text().startswith("Of the base.\n\nLlama 3.1")


def test_a_notice_that_is_no_text_stays(tmp_path: Path) -> None:
    folder = make(tmp_path, license="llama3.1")
    for name in ("NOTICE.pdf", "Notices.PDF"):
        (folder / name).write_bytes(b"%PDF-1.7\n\xff\x00")
    assert {"NOTICE", "NOTICE.pdf", "Notices.PDF"} & {*write_card(folder, weights=False)} == {"NOTICE"}
    assert (folder / "NOTICE").read_text().startswith("Llama 3.1")
    assert (folder / "NOTICE.pdf").read_bytes() == b"%PDF-1.7\n\xff\x00"


def test_a_notice_follows_the_records(tmp_path: Path) -> None:
    folder = make(tmp_path, license="llama3.1")
    notice = folder / "NOTICE"
    write_card(folder, weights=False)
    notice.write_text(f"Mine.\n\n{notice.read_text()}Also mine.\n")
    assert write_card(folder, weights=False) == []
    record_declarations(CardRequest(folder, license="gemma"))
    assert "NOTICE" in write_card(folder, weights=False)
    lines = notice.read_text().split("\n")
    assert [lines[0], *lines[-2:]] == ["Mine.", "Also mine.", ""]
    assert lines[2].startswith("Gemma is provided")
    assert "Llama" not in notice.read_text()
    record_declarations(CardRequest(folder, license="mit"))
    assert "NOTICE" in write_card(folder, weights=False)
    assert notice.read_text() == "Mine.\n\nAlso mine.\n"
    record_declarations(CardRequest(folder, license="gemma"))
    write_card(folder, weights=False)
    notice.write_text(notice.read_text().split("\n\n", 2)[2])  # ours alone
    record_declarations(CardRequest(folder, license="mit"))
    assert "NOTICE" in write_card(folder, weights=False)
    assert not notice.exists()


def test_results_of_whole_benchmarks(tmp_path: Path) -> None:
    folder = make(tmp_path)
    measure_all_of_piqa(folder)
    assert ".eval_results/piqa.yaml" in write_card(folder, weights=False)
    (folder / ".eval_results" / "mine.yaml").write_text("- dataset: {id: a/b, task_id: c}\n  value: 1\n")
    metrics_of(Lineage.load(folder)).write(folder)  # of 200 questions again
    assert ".eval_results/piqa.yaml" in write_card(folder, weights=False)
    assert [path.name for path in (folder / ".eval_results").iterdir()] == ["mine.yaml"]


def test_without_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (folder / "metrics.json").unlink()
    assert main(["card", str(folder)]) == 1
    assert 'pip install "hf-layerprune[plots]"' in capsys.readouterr().err
    assert not (folder / "README.md").exists()
    monkeypatch.undo()
    write_card(folder, weights=False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert write_card(folder, weights=False) == []  # the pictures are those of these records
    (folder / "assets" / "layers.png").unlink()
    with pytest.raises(LayerPruneError, match="plots need matplotlib"):
        write_card(folder, weights=False)


def test_a_base_that_gets_a_name_has_it_in_the_commands(tmp_path: Path) -> None:
    """A recipe that pruned the base still starts from it, so no other command prunes it into the base's own path."""
    path = ".venv/models/small model.gguf"
    lineage = lineage_of(id=path, commit=None)
    lineage.entries[-1]["command"] = f"accelerate launch recipes/sft_tail.py --model_name_or_path '{path}' --drop 0.25"
    lineage.write(tmp_path)
    record_declarations(CardRequest(tmp_path, base_model="org/base"))
    (command,) = list_commands(read_history(Lineage.load_required(tmp_path)))
    assert "--model_name_or_path 'small model.gguf'" in command
