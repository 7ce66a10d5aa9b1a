"""Calibration sets with images: files, parquet, chats, what is refused, and the commands on them."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from datasets import Dataset, Features, Image, Value
from transformers import AutoProcessor

from hf_layerprune import CheckpointError, CutError
from hf_layerprune.calibration.documents import Document
from hf_layerprune.calibration.rows import CalibrationSet, _tokenize, load_calibration
from hf_layerprune.cli import main
from hf_layerprune.records.lineage import Lineage
from hf_layerprune.runtime.loading import load_base, load_processor, load_tokenizer

from .heal_makers import word_tokenizer
from .measure_models import write_model
from .multimodal_makers import TEMPLATE, lay_postscript, noise, words, write_llava, write_rows
from .tiny_models import tiny_config

IMAGE_TOKENS = 16


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def model(base: Path) -> Any:
    return load_base(base)


def loaded(base: Path, model: Any, source: str, **how: Any) -> CalibrationSet:
    tokenizer, processor = load_tokenizer(base), partial(load_processor, base)
    return load_calibration(source, tokenizer, model=model, processor=processor, **{"length": 40} | how)


def test_each_row_is_what_the_processor_makes(base: Path, model: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path)
    found = loaded(base, model, str(path), samples=8)
    processor = AutoProcessor.from_pretrained(base)
    wanted = {}
    for i in range(8):
        made = processor(text=f"<image> {words(i, 5 + i)} ", images=noise(i), return_tensors="pt")
        wanted[tuple(made["input_ids"][0].tolist())] = made["pixel_values"]
    rows = list(found.batches(4))
    assert len(rows) == 8
    assert {tuple(ids[0].tolist()) for ids, _ in rows} == set(wanted)
    for ids, media in rows:
        assert torch.equal(media["pixel_values"], wanted[tuple(ids[0].tolist())])
    assert found.tokens == sum(ids.numel() for ids, _ in rows)
    assert found.record()["images"] is True
    assert found.record()["length"] == 40
    again, other = (loaded(base, model, str(path), samples=8, seed=seed) for seed in (42, 1))
    assert again.fingerprint == found.fingerprint != other.fingerprint
    noise(99).save(tmp_path / "pictures" / "0.png")
    assert loaded(base, model, str(path), samples=8).fingerprint != found.fingerprint


def test_long_rows_end_behind_their_image(base: Path, model: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path)
    found = loaded(base, model, str(path), samples=8, length=IMAGE_TOKENS + 3)
    assert all(ids.shape[1] == media["attention_mask"].shape[1] == IMAGE_TOKENS + 3 for ids, media in found.batches(1))
    with pytest.raises(CutError, match=r"has 0 rows .* 8 whose images take up to 16 tokens, not 8; use"):
        loaded(base, model, str(path), samples=8, length=10)
    with pytest.raises(CutError, match=r"has 8 rows within .* not 9; use"):
        loaded(base, model, str(path), samples=9)


def test_data_sets_hold_images_themselves(base: Path, model: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path)
    features = Features({"text": Value("string"), "images": [Image()]})
    rows = {"text": [words(i, 5 + i) for i in range(8)], "images": [[noise(i)] for i in range(8)]}
    folder = tmp_path / "set"
    folder.mkdir()
    Dataset.from_dict(rows, features).to_parquet(folder / "train.parquet")
    wanted = {tuple(ids[0].tolist()): media for ids, media in loaded(base, model, str(path), samples=8).batches(1)}
    for source in ("", "/train.parquet", "/train.parquet:text", "/train.parquet:train:text"):
        found = loaded(base, model, f"{folder}{source}", samples=8)
        for ids, media in found.batches(1):
            assert torch.equal(media["pixel_values"], wanted[tuple(ids[0].tolist())]["pixel_values"])
    with pytest.raises(CheckpointError, match=r"no text in 'words', only text, images; .*/train\.parquet:COLUMN$"):
        loaded(base, model, f"{folder}/train.parquet:words", samples=8)


def test_chats(base: Path, model: Any, tmp_path: Path) -> None:
    noise(0).save(tmp_path / "0.png")
    answer = {"role": "assistant", "content": words(2, 4)}
    asked = {"role": "user", "content": words(1, 4)}
    placed = {"role": "user", "content": [{"type": "text", "text": words(1, 4)}, {"type": "image"}]}
    own = {"role": "user", "content": [{"type": "image", "path": "0.png"}, {"type": "text", "text": words(1, 4)}]}
    path = tmp_path / "chats.jsonl"
    found = []
    for chat, images in (([asked, answer], ["0.png"]), ([own, answer], None), ([placed, answer], ["0.png"])):
        row = {"messages": chat} | ({"images": images} if images else {})
        path.write_text(json.dumps(row) + "\n")
        found.append(next(loaded(base, model, f"{path}:messages", samples=1).batches(1)))
    (first, media), (second, same), (third, _) = found
    assert torch.equal(first, second)
    assert torch.equal(media["pixel_values"], same["pixel_values"])
    place = model.config.image_token_id
    assert first[0, :IMAGE_TOKENS].eq(place).all()
    assert third[0, 4 : 4 + IMAGE_TOKENS].eq(place).all()
    path.write_text(json.dumps({"messages": [placed], "images": ["0.png", "0.png"]}) + "\n")
    with pytest.raises(CheckpointError, match=r"chats.jsonl, line 1 has 2 images for 1 place in its messages"):
        loaded(base, model, f"{path}:messages", samples=1)


def test_what_can_not_be_read(base: Path, model: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path)
    tmp_path.joinpath("pictures", "3.png").unlink()
    with pytest.raises(CheckpointError, match=r"line 4 names the image pictures/3.png, and .*3.png is not a file"):
        loaded(base, model, str(path), samples=8)
    tmp_path.joinpath("pictures", "3.png").write_bytes(b"no image")
    with pytest.raises(CheckpointError, match=r"the processor can't read .*rows.jsonl, line 4: .*identify image"):
        loaded(base, model, str(path), samples=8)


def test_labels_are_not_inputs(base: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PaliGemma's processor makes labels of every text, from which the model would compute a loss."""
    call = transformers.LlavaProcessor.__call__

    def as_paligemma(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = call(self, *args, **kwargs)
        return made | {"labels": made["input_ids"]}

    monkeypatch.setattr(transformers.LlavaProcessor, "__call__", as_paligemma)
    found = loaded(base, model, str(write_rows(tmp_path)), samples=2)
    assert all("pixel_values" in media and "labels" not in media for _, media in found.batches(1))


def test_no_image_is_run(base: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path)
    ran = lay_postscript(tmp_path / "pictures" / "3.png", tmp_path, monkeypatch)
    with pytest.raises(CheckpointError, match=r"the processor can't read .*rows.jsonl, line 4: it is PostScript"):
        loaded(base, model, str(path), samples=8)
    assert not ran.exists()


def test_no_image_of_a_data_set_is_run(
    base: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a row of a data set decodes its images."""
    ran = lay_postscript(tmp_path / "0.png", tmp_path, monkeypatch)
    rows = {"text": [words(0, 5)], "image": [str(tmp_path / "0.png")]}
    Dataset.from_dict(rows, Features({"text": Value("string"), "image": Image()})).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(CheckpointError, match="it is PostScript"):
        loaded(base, model, str(tmp_path / "a.parquet"), samples=1)
    assert not ran.exists()


def test_some_rows_without_an_image(base: Path, model: Any, tmp_path: Path) -> None:
    noise(0).save(tmp_path / "0.png")
    path = tmp_path / "mixed.jsonl"
    rows = [{"text": words(0, 5), "image": "0.png"}, {"text": words(1, 5), "image": None}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = dict(
        zip(
            ("without", "with"),
            sorted(loaded(base, model, str(path), samples=2).batches(1), key=lambda x: x[0].shape),
            strict=True,
        )
    )
    assert "pixel_values" in found["with"][1]
    assert "pixel_values" not in found["without"][1]
    rows = [{"text": words(0, 5)}, {"text": words(1, 5), "image": "0.png"}]
    with pytest.raises(CheckpointError, match="one has images, and the first row has none"):
        _tokenize(
            iter([Document(rows[0]["text"]), Document(rows[1]["text"], ("0.png",), "one")]), load_tokenizer(base), 99
        )


def test_a_text_model_takes_no_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_model(tmp_path / "text")
    rows = write_rows(tmp_path / "rows")
    assert main(["rank", str(folder), "--criterion", "kl", "--calibration", str(rows)]) != 0
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith(f"hf-layerprune: {rows} has images, but ")
    assert "is a llama model that reads only text; specify a data set without images" in said[-1]


def test_a_conversation_for_a_processor_without_a_chat_template(base: Path, model: Any, tmp_path: Path) -> None:
    bare = Path(shutil.copytree(base, tmp_path / "bare"))
    (bare / "chat_template.jinja").unlink()
    rows = write_rows(tmp_path / "rows", 2)
    chats = [json.loads(line) for line in rows.read_text().splitlines()]
    chats = [{"messages": [{"role": "user", "content": row["text"]}], "image": row["image"]} for row in chats]
    (rows.parent / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    assert len(loaded(bare, model, f"{rows}:text", samples=2).input_ids) == 2
    with pytest.raises(
        CheckpointError, match=r"line \d is a conversation, .* no chat template for it; specify a column"
    ):
        loaded(bare, model, f"{rows.parent / 'chats.jsonl'}:messages", samples=2)


def test_a_processor_for_audio(tmp_path: Path) -> None:
    extractor = transformers.WhisperFeatureExtractor(feature_size=16)
    tokenizer = word_tokenizer()
    tokenizer.chat_template = TEMPLATE
    transformers.Qwen2AudioProcessor(extractor, tokenizer, chat_template=TEMPLATE).save_pretrained(tmp_path)
    tiny_config("qwen2_audio").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has a processor for audio, and none for images; specify data without"):
        load_processor(tmp_path)


def test_a_folder_without_a_processor(base: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_tokenizer(base).save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"has no processor .*; copy the processor files of its base into it"):
        load_processor(tmp_path)
    with pytest.raises(CutError, match="has images, which need the model and its processor"):
        load_calibration(str(write_rows(tmp_path / "rows")), load_tokenizer(base), samples=2, length=40)

    def without_torchvision(*args: Any, **kwargs: Any) -> None:
        raise ImportError("Qwen2VLVideoProcessor requires the Torchvision library")

    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", without_torchvision)
    with pytest.raises(CheckpointError, match=r"Torchvision library; install the package that is missing$"):
        load_processor(base)


OPTIONS = ["--calibration-samples", "8", "--calibration-length", "40"]


@pytest.mark.parametrize("images", [False, True], ids=["text", "images"])
def test_ranked_to_the_end(base: Path, tmp_path: Path, images: bool) -> None:
    """Every criterion, and the search, on both kinds of rows."""
    if images:
        rows = write_rows(tmp_path / "rows")
    else:
        rows = tmp_path / "rows.txt"
        rows.write_text("\n".join(words(i, 40) for i in range(20)))
    scores = tmp_path / "scores"
    text = ["--calibration", str(rows), *OPTIONS]
    assert main(["rank", str(base), str(scores), "--criterion", "all,auto", "--drop", "2", *text]) == 0
    record = json.loads((scores / "scores.json").read_text())
    assert record["calibration"].get("images", False) is images
    for name, found in record["criteria"].items():
        assert len(found["drop_layers"]) == 2, name
    curve = tmp_path / "curve"
    assert main(["rank", str(base), str(curve), "--curve", "--curve-up-to", "2", "--repair", "linear", *text]) == 0
    assert len(json.loads((curve / "curve.json").read_text())["points"]) == 2


def test_repaired_and_verified(base: Path, tmp_path: Path) -> None:
    text = ["--calibration", str(write_rows(tmp_path / "rows")), *OPTIONS]
    out, adapter = tmp_path / "out", tmp_path / "adapter"
    how = ["--drop", "2", "--criterion", "block_influence", "--repair", "linear", *text]
    assert main(["prune", str(base), str(out), *how]) == 0
    entry = (Lineage.load(out) or Lineage({})).entries[-1]
    assert entry["calibration"]["images"] is True
    assert entry["repair"]["cuts"][0]["tokens"] > 0
    assert main(["verify", str(out), "--accept-trained"]) == 0
    assert main(["prune", str(base), str(adapter), "--adapter", *how]) == 0
    from hf_layerprune.adapter.loading import load_model

    one, other = load_base(out), load_model(adapter)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
