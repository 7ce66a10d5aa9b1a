"""Healing on rows with images: the recipe, on TRL's own path for them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, Image, load_dataset
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, AutoProcessor
from trl import DatasetMixtureConfig
from trl.scripts.utils import DatasetConfig

from hf_layerprune.errors import CheckpointError, CutError, LayerPruneError
from hf_layerprune.heal.data import load_rows, shape_rows
from hf_layerprune.heal.options import RowOptions
from hf_layerprune.heal.sources import Sources
from hf_layerprune.publish.requests import VerifyRequest
from hf_layerprune.publish.verify.verdict import verify
from hf_layerprune.records.lineage import Lineage
from hf_layerprune.runtime.loading import load_processor, load_tokenizer

from .heal_makers import load_recipe, recipe_words
from .multimodal_makers import half_a_jpeg, lay_postscript, noise, words, write_llava
from .tiny_models import EAGER

pytestmark = pytest.mark.processes
SETTINGS = {
    "drop_layers": "3,4", "method": "last2", "max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 0.01,
    "max_length": 64, "attn_implementation": "eager", "use_cpu": "true", "bf16": "false", "report_to": "none",
    "disable_tqdm": "true", "save_strategy": "no", "logging_steps": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    return load_recipe()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llava, and beside it `rows.jsonl`: six chats with an image each."""
    folder = write_llava(tmp_path_factory.mktemp("images") / "base")
    rows = []
    for i in range(6):
        noise(i).save(folder.parent / f"{i}.png")
        chat = [{"role": "user", "content": words(i, 3)}, {"role": "assistant", "content": words(50 + i, 4)}]
        rows.append({"messages": chat, "images": [f"{i}.png"]})
    folder.parent.joinpath("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(recipe: ModuleType, base: Path, output: Path, **settings: Any) -> None:
    options = recipe_words(base, output, **SETTINGS | settings)
    recipe.main(*recipe.make_parser().parse_args_and_config(options))


def test_rows_hold_opened_images(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, read, decode = load_rows(str(base.parent / "rows.jsonl"))["train"], [], Image.decode_example
    monkeypatch.setattr(Image, "decode_example", lambda *given, **more: read.append(1) or decode(*given, **more))
    name, processor = str(base.parent / "rows.jsonl"), lambda: load_processor(base)
    shaped = shape_rows(rows, load_tokenizer(base), name=name, load_processor=processor, folder=base.parent)
    assert set(shaped.column_names) == {"prompt", "completion", "images"}
    count = len(read)
    assert len(list(shaped)) == len(rows)
    assert len(read) == 2 * count  # each image had been read once
    assert [image.size for image in shaped[1]["images"]] == [noise(1).size]
    assert list(shaped[1]["images"][0].get_flattened_data()) == list(noise(1).get_flattened_data())
    single = Dataset.from_list([{"instruction": "w5", "output": "w6", "image": "1.png"}])
    shaped = shape_rows(single, load_tokenizer(base), name=name, load_processor=processor, folder=base.parent)
    assert shaped[0]["image"].size == noise(1).size
    assert shaped[0]["prompt"] == [{"role": "user", "content": "w5"}]
    missing = Dataset.from_list([{"instruction": "w5", "output": "w6", "image": "no.png"}])
    with pytest.raises(CheckpointError, match=r"the rows name the image no.png, and .*no.png is not a file"):
        shape_rows(missing, load_tokenizer(base), name=name, load_processor=processor, folder=base.parent)
    text = Dataset.from_list([{"text": "w5", "image": "1.png"}])
    with pytest.raises(CutError, match=r"has image, and training on images needs prompt and completion.* as well"):
        shape_rows(text, load_tokenizer(base), name=name, load_processor=processor, folder=base.parent)


@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("postscript", [False, True])
def test_an_image_that_can_not_be_read_is_found_before_training(
    base: Path, tmp_path: Path, held: bool, postscript: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("0.png", "1.png"):
        noise(0).save(tmp_path / name)
    half_a_jpeg(tmp_path / "1.png")
    ran = lay_postscript(tmp_path / "1.png", tmp_path, monkeypatch) if postscript else tmp_path / "ran"
    chat = {"prompt": [{"role": "user", "content": "w5"}], "completion": [{"role": "assistant", "content": "w6"}]}
    rows = Dataset.from_list([chat | {"image": f"{i}.png"} for i in range(2)])
    if held:
        images = [{"bytes": (tmp_path / f"{i}.png").read_bytes(), "path": None} for i in range(2)]
        rows = rows.remove_columns("image").add_column("image", images).cast_column("image", Image())
    name, processor = str(tmp_path / "rows.jsonl"), lambda: load_processor(base)
    with pytest.raises(CheckpointError, match=r"an image in row 2 of .*rows.jsonl can't be read: .*; replace it, or"):
        shape_rows(rows, load_tokenizer(base), name=name, load_processor=processor, folder=tmp_path)
    assert not ran.exists()


def test_a_mixture_finds_its_images(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = base.parent
    (folder / "more.jsonl").write_text((folder / "rows.jsonl").read_text())
    monkeypatch.setenv("HOME", str(folder))
    parts = [DatasetConfig(path=path) for path in ("~/rows.jsonl", str(folder / "more.jsonl"))]
    names: Any = SimpleNamespace(dataset_name=None, dataset_train_split="train")
    args: Any = SimpleNamespace(
        row_seed=0, dataset_text_field="text", assistant_only_loss=False, completion_only_loss=None, eval_strategy="no"
    )
    mixture = DatasetMixtureConfig(datasets=parts)
    rows = Sources.read(names, mixture, RowOptions(), args, load_tokenizer(base), str(base)).train
    assert [image.size for image in rows[9]["images"]] == [noise(3).size]


def test_the_recipe_trains_on_images(
    recipe: ModuleType, base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Images change what is learned; only the tail changes; what is left is a whole folder with its processor."""
    output = tmp_path / "run"
    with caplog.at_level(logging.INFO):
        run(recipe, base, output)
    assert "the rows have images: TRL's own loss is used" in caplog.text
    model = output / "model"
    before, after = (load_file(folder / "model.safetensors") for folder in (output / "pruned", model))
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    trained = ("language_model.model.layers.4.", "language_model.model.layers.5.", "language_model.model.norm.")
    assert all(name.startswith(trained) for name in changed), changed
    assert all(any(name.startswith(part) for name in changed) for part in trained), changed
    entry = (Lineage.load(model) or Lineage({})).entries[-1]
    assert entry["data"][0] == {"name": "rows.jsonl", "rows": 6, "images": True}
    assert (model / "README.md").is_file()
    question = AutoProcessor.from_pretrained(model)(images=noise(1), text="<image> w5", return_tensors="pt")
    healed = AutoModelForMultimodalLM.from_pretrained(model, **EAGER).eval()
    with torch.no_grad():
        assert healed(**question).logits.isfinite().all()
    assert str(verify(VerifyRequest(model=str(model), accept_trained=True)).verdict).startswith("YES")


def test_the_adapter_of_a_repaired_cut_is_verified(recipe: ModuleType, base: Path, tmp_path: Path) -> None:
    """The cut's records name the repaired tensors as llava's checkpoints do, and the adapter as its modules do."""
    rows = {
        "calibration": f"{base.parent / 'rows.jsonl'}:messages",
        "calibration_samples": 6,
        "calibration_length": 64,
    }
    run(recipe, base, tmp_path / "run", repair="linear", **rows)
    adapter = tmp_path / "run" / "adapter"
    assert str(verify(VerifyRequest(model=str(adapter), accept_trained=True)).verdict).startswith("YES")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["repaired_modules"] == ["model.language_model.layers.2.mlp.down_proj"]
    config["repaired_modules"] = ["model.language_model.layers.1.mlp.down_proj"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert str(verify(VerifyRequest(model=str(adapter), accept_trained=True)).verdict).startswith("NO")


def test_all_weights_are_trained(recipe: ModuleType, base: Path, tmp_path: Path) -> None:
    """The trainer sets tokens in the decoder's section of the config, too, which the finished model does not keep."""
    run(recipe, base, tmp_path / "run", method="full", max_steps=1)
    outcome = verify(VerifyRequest(model=str(tmp_path / "run" / "model"), accept_trained=True))
    assert outcome.good, [line.text for line in outcome.lines if not line.good]


def test_the_images_are_seen(recipe: ModuleType, base: Path, tmp_path: Path) -> None:
    """The same words about other pictures train other weights."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "rows.jsonl").write_text((base.parent / "rows.jsonl").read_text())
    for i in range(6):
        noise(100 + i).save(other / f"{i}.png")
    trained = []
    for number, rows in enumerate((base.parent, base.parent, other)):
        output = tmp_path / f"run{number}"
        run(recipe, base, output, dataset_name=rows / "rows.jsonl", max_steps=1, warmup_steps=0)
        trained.append(load_file(output / "model" / "model.safetensors"))
    name = next(name for name in trained[0] if name.endswith("layers.5.mlp.down_proj.weight"))
    first, again, changed = (weights[name] for weights in trained)
    assert torch.equal(first, again)
    assert not torch.equal(first, changed)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"loss": "kd"}, LayerPruneError, "loss=kd can't be combined with .* images"),
        (
            {"cache": "on"},
            LayerPruneError,
            "cache=on needs rows of text, and these have images; use cache=auto or off",
        ),
        ({"rewrite_answers": "true"}, CutError, "has images, and --rewrite_answers rewrites answers to text alone"),
        ({"packing": "true"}, LayerPruneError, "Packing is not supported for vision datasets"),
    ],
)
def test_what_images_do_not_go_with(
    recipe: ModuleType, base: Path, tmp_path: Path, settings: Any, kind: Any, message: str
) -> None:
    with pytest.raises(kind, match=message):
        run(recipe, base, tmp_path / "run", **settings)


def test_images_of_a_data_set(recipe: ModuleType, base: Path, tmp_path: Path) -> None:
    """A data set that holds its images, with an evaluation during training."""
    rows = load_rows(str(base.parent / "rows.jsonl"))["train"]
    processor = lambda: load_processor(base)  # noqa: E731
    shaped = shape_rows(rows, load_tokenizer(base), load_processor=processor, folder=base.parent)
    folder = tmp_path / "set"
    folder.mkdir()
    for split in ("train", "test"):
        shaped.to_parquet(folder / f"{split}.parquet")
    assert load_dataset(str(folder))["test"].num_rows == 6
    run(recipe, base, tmp_path / "run", dataset_name=folder, eval_strategy="steps", eval_steps=1, max_steps=1)
    assert (tmp_path / "run" / "model" / "README.md").is_file()
