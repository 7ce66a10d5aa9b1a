"""Multimodal models in every command: the language decoder is cut, and all else stays as it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING, AutoModelForMultimodalLM, AutoProcessor, CLIPVisionConfig, T5Config
from transformers.utils.import_utils import BACKENDS_MAPPING

from hf_layerprune import CutError, LayerDropConfig, UnsupportedModelError, families, prune_with
from hf_layerprune.cli import main
from hf_layerprune.errors import LayerPruneError
from hf_layerprune.heal.data import shape_rows
from hf_layerprune.publish.requests import VerifyRequest
from hf_layerprune.publish.verify.verdict import verify
from hf_layerprune.runtime.loading import load_base
from hf_layerprune.runtime.model_class import auto_class_for, auto_class_of, layer_modules, stored_names

from . import chat_server  # noqa: F401 (makes the Space's files importable)
from .heal_makers import word_tokenizer
from .matrix import identities
from .multimodal_makers import noise, write_llava, write_qwen2_vl, write_rows
from .publish_multimodal import run_card
from .tiny_models import EAGER, tiny_config, tiny_input, tiny_model
from .tiny_multimodal import multimodal_config

import weights  # isort: skip

DROP = [2, 3, 5]
LAYERS = "model.language_model.layers"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llava with a processor as its own code makes it."""
    return write_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def cut(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `prune` leaves of it on disk."""
    folder = tmp_path_factory.mktemp("cut") / "cut"
    assert main(["prune", str(base), str(folder), "--drop-layers", ",".join(map(str, DROP))]) == 0
    return folder


def asked(folder: Path) -> dict[str, torch.Tensor]:
    """A question about an image, as the folder's own processor puts it."""
    from PIL import Image

    processor = AutoProcessor.from_pretrained(folder)
    image = Image.effect_noise((20, 24), 60).convert("RGB")
    return dict(processor(images=image, text="w5 w9 <image> w7", return_tensors="pt"))


def test_all_but_the_decoder_stays_to_the_byte(base: Path, cut: Path) -> None:
    with safe_open(base / "model.safetensors", "pt") as old, safe_open(cut / "model.safetensors", "pt") as new:
        names = [set(file.keys()) for file in (old, new)]
        outside = [name for name in names[0] if "language_model.model.layers." not in name]
        assert any("vision_tower" in name for name in outside)
        assert any("multi_modal_projector" in name for name in outside)
        for name in outside:
            assert torch.equal(old.get_tensor(name), new.get_tensor(name)), name
        assert len(names[0]) - len(names[1]) == len(DROP) * 9
    for name in ("processor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        assert (base / name).read_bytes() == (cut / name).read_bytes(), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (base, cut)]
    assert configs[0]["vision_config"].items() <= configs[1]["vision_config"].items()
    assert [config["text_config"]["num_hidden_layers"] for config in configs] == [8, 5]
    assert configs[1]["architectures"] == ["LlavaForConditionalGeneration"]


@torch.no_grad()
def test_an_image_through_the_real_processor(base: Path, cut: Path) -> None:
    dense, pruned = (AutoModelForMultimodalLM.from_pretrained(folder, **EAGER).eval() for folder in (base, cut))
    question = asked(cut)
    assert (question["input_ids"] == dense.config.image_token_id).sum() == 16
    with identities(dense, DROP):
        wanted = dense(**question).logits
    torch.testing.assert_close(pruned(**question).logits, wanted)
    blind = dict(question, pixel_values=torch.zeros_like(question["pixel_values"]))
    assert not torch.allclose(pruned(**blind).logits, wanted, atol=1e-3)


@torch.no_grad()
def test_ranked_on_images_that_torchvision_prepares(tmp_path: Path) -> None:
    """Most published processors need it; LLaVA's here does not."""
    base, cut = write_qwen2_vl(tmp_path / "base"), tmp_path / "cut"
    rows = ["--calibration", f"{write_rows(tmp_path / 'rows')}:text", "--calibration-samples", "6"]
    options = ["--drop", "2", "--criterion", "taylor", "--repair", "linear", "--calibration-length", "32"]
    assert main(["prune", str(base), str(cut), *options, *rows]) == 0
    assert main(["verify", str(cut), "--accept-trained"]) == 0
    processor = AutoProcessor.from_pretrained(cut)
    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " w5 w6"}]}]
    text = processor.apply_chat_template(said, add_generation_prompt=True)
    asked = [processor(images=noise(seed), text=text, return_tensors="pt") for seed in (0, 1)]
    pruned = AutoModelForMultimodalLM.from_pretrained(cut, **EAGER).eval()
    assert (asked[0]["input_ids"] == pruned.config.image_token_id).any()
    assert not torch.allclose(pruned(**asked[0]).logits[:, -1], pruned(**asked[1]).logits[:, -1], atol=1e-4)


@torch.no_grad()
def test_as_an_adapter(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`prune_with` loads it without the layers, and the saved adapter makes the same model of the base again."""
    config = LayerDropConfig(base_model_name_or_path=str(base), drop_layers=DROP, tune_layers=1)
    model = prune_with(config, **EAGER).eval()
    assert type(model.get_base_model()).__name__ == "LlavaForConditionalGeneration"
    question = asked(base)
    mine = model(**question).logits
    adapter = tmp_path / "adapter"
    assert main(["prune", str(base), str(adapter), "--adapter", "--drop-layers", "2,3,5", "--tune-layers", "1"]) == 0
    from hf_layerprune.adapter.loading import load_model

    torch.testing.assert_close(load_model(adapter, **EAGER)(**question).logits, mine)
    assert str(verify(VerifyRequest(model=str(adapter))).verdict).startswith("YES: "), capsys.readouterr()


def test_ranked_repaired_verified(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = torch.randint(3, 120, (40, 40), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "rows.txt").write_text("\n".join(" ".join(f"w{i}" for i in row) for row in words))
    text = ["--calibration", str(tmp_path / "rows.txt"), "--calibration-samples", "6", "--calibration-length", "24"]
    out = tmp_path / "repaired"
    options = ["--drop", "2", "--criterion", "block_influence", "--repair", "linear", *text]
    assert main(["prune", str(base), str(out), *options]) == 0
    assert main(["verify", str(out), "--accept-trained"]) == 0
    assert "that repair changed " in capsys.readouterr().out


def test_the_checkpoint_names_its_class() -> None:
    for model_type, architecture, auto in (
        ("qwen3_5", "Qwen3_5ForConditionalGeneration", "AutoModelForMultimodalLM"),
        ("qwen3_5", "Qwen3_5ForCausalLM", "AutoModelForCausalLM"),
        ("qwen2_vl", "Qwen2VLForConditionalGeneration", "AutoModelForMultimodalLM"),
        ("llama4", "Llama4ForConditionalGeneration", "AutoModelForCausalLM"),
        ("llama", "LlamaForSequenceClassification", "AutoModelForCausalLM"),
    ):
        assert auto_class_for(model_type, [architecture]).__name__ == auto


def test_names_in_the_checkpoint(tmp_path: Path) -> None:
    """Those that this transformers writes; 5.4 itself writes others."""
    live = "model.language_model.layers.0.mlp.down_proj.weight"
    tiny_model("llava").save_pretrained(tmp_path)
    stored = stored_names(tiny_config("llava"), [live, "no.such.tensor"])
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        written = set(file.keys())
    assert [name for name in written if name.endswith("layers.0.mlp.down_proj.weight")] == list(stored.values())
    assert list(stored) == [live]


@pytest.mark.parametrize("repair", [False, True])
def test_an_encoder_with_as_many_layers_as_the_cut_decoder(repair: bool, tmp_path: Path) -> None:
    """Names alone don't tell which is which."""
    tiny_model("granite_speech").save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    (tmp_path / "rows.txt").write_text("w1 w2 w3 w4 w5 w6 w7 w8\n" * 8)
    assert main(["prune", str(tmp_path / "base"), str(tmp_path / "one"), "--drop", "6"]) == 0
    assert {"encoder.layers.1", "language_model.model.layers.1"} <= {
        ".".join(name.split(".")[: name.split(".").index("layers") + 2])
        for name in load_file(tmp_path / "one" / "model.safetensors")
        if ".layers.1." in name
    }
    rows = ["--calibration", str(tmp_path / "rows.txt"), "--calibration-samples", "8", "--calibration-length", "8"]
    words = ["--repair", "refit", *rows] if repair else []
    assert main(["prune", str(tmp_path / "one"), str(tmp_path / "two"), "--drop-layers", "1", *words]) == 0
    left = load_file(tmp_path / "two" / "model.safetensors")
    assert [name for name in left if "language_model.model.layers.1." in name] == []
    assert any("encoder.layers.1." in name for name in left)


def test_the_module_of_a_tensor_in_a_layer_whose_experts_have_no_stored_names_of_their_own() -> None:
    """ERNIE's checkpoints store the experts for text and for images together, so transformers can't rename them apart."""
    stored = "model.layers.1.self_attn.o_proj.weight"
    modules = layer_modules(tiny_config("ernie4_5_vl_moe"), [stored])
    assert modules == ["model.language_model.layers.1.self_attn.o_proj"]


def test_layers_that_take_in_features_stay() -> None:
    config = tiny_config("qwen3_vl")
    assert sorted(families.protected_layers(config)) == [0, 1, 2]
    with pytest.raises(CutError, match=r"layer 1 .* can't be dropped: the features of the vision tower's layer"):
        families.make_cut(config, [1, 5])
    config = tiny_config("granite4_vision")
    after = families.cut_config(config, families.make_cut(config, [2, 3]))
    assert (config.spatial_target_layers, after.spatial_target_layers) == ([1, 1, 4, 4], [1, 1, 2, 2])
    with pytest.raises(CutError, match=r"layer 4 .* to its input"):
        families.make_cut(config, [4])


def test_an_unknown_field_is_refused() -> None:
    for name, value in (("deepstack_targets", [1]), ("injection_layer", 3), ("gate_of_layer", list(range(8)))):
        config = tiny_config("llava")
        setattr(config, name, value)
        with pytest.raises(CutError, match=f"config field '{name}' of the llava model may refer to layers"):
            families.cut_config(config, families.make_cut(config, DROP))


def test_a_model_keeps_a_layer_that_attends_to_images() -> None:
    """Without any, it would run, and ignore images."""
    config = multimodal_config("mllama")
    for drop, left in (([1], [3]), ([4, 5], [1])):
        cut = families.make_cut(config, drop)
        assert families.cut_config(config, cut).text_config.cross_attention_layers == left
    with pytest.raises(CutError, match=r"no layer that attends to images would be left, .* keep one of \[1, 4\]"):
        families.cut_config(config, families.make_cut(config, [1, 4, 5]))
    text = config.text_config  # which reads no images
    assert families.cut_config(text, families.make_cut(text, [1, 4])).cross_attention_layers == []


def test_the_code_of_a_card_without_a_chat_template_shows_an_image(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PaliGemma's processor, for one, takes no text alone."""
    bare, folder = Path(shutil.copytree(base, tmp_path / "bare")), tmp_path / "cut"
    (bare / "chat_template.jinja").unlink()
    assert main(["prune", str(bare), str(folder), "--drop-layers", "3"]) == 0
    assert main(["card", str(folder), "--license", "mit"]) == 0
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"image\.png"):
        run_card(folder)
    noise(0).save("image.png")
    run_card(folder)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("blip-2", "needs an image with every text"),
        ("instructblip", "needs an image with every text"),
        ("instructblipvideo", "needs an image with every text"),
        ("kosmos-2", "needs an image with every text"),
        ("kyutai_speech_to_text", "is a token and a row of audio codes"),
        ("voxtral_realtime", "adds a stretch of audio to every token"),
    ],
)
def test_what_can_not_run_on_text_alone_is_refused(model_type: str, reason: str) -> None:
    """And the reason is true: a model of the type that is built and given text fails."""
    if model_type not in CONFIG_MAPPING:
        pytest.skip("this transformers doesn't have the type")
    config = multimodal_config(model_type)
    with pytest.raises(UnsupportedModelError, match=reason):
        families.check_supported(config)
    model = auto_class_of(config).from_config(config).eval()
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        model(input_ids=tiny_input())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T5Config(num_layers=2, d_model=8, d_kv=4), "it is an encoder-decoder"),
        (CLIPVisionConfig(), "it has no language decoder of its own"),
    ],
)
def test_without_a_language_decoder_there_is_one_line(config: Any, reason: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(LayerPruneError, match=f"is a {config.model_type} model, which can't be pruned .*: {reason}"):
        load_base(tmp_path)
    with pytest.raises(LayerPruneError):
        families.check_supported(config)


def test_what_a_tower_of_timm_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without timm, which builds the vision tower, each command says in one line what to install."""
    base, cut, text = (str(tmp_path / name) for name in ("base", "cut", "text.txt"))
    tiny_model("gemma3n").save_pretrained(base)
    word_tokenizer().save_pretrained(base)
    Path(text).write_text("w5 w9 w7 w8 " * 40)
    assert main(["prune", base, cut, "--drop-layers", "6-7"]) == 0
    monkeypatch.setitem(BACKENDS_MAPPING, "timm", (lambda: False, BACKENDS_MAPPING["timm"][1]))
    for words in (
        ["inspect", base],
        ["prune", base, f"{cut}-again", "--drop-layers", "6-7"],
        ["prune", base, f"{cut}-again", "--drop", "2", "--criterion", "magnitude_l1", "--adapter"],
        ["eval", cut, "--text", text, "--length", "32", "--quiet"],
        ["verify", cut],
    ):
        capsys.readouterr()
        assert main(words) == 1, words
        said = capsys.readouterr().err
        assert said.startswith("hf-layerprune: "), words
        assert "`pip install timm`" in said, words
        assert len(said.splitlines()) == 1, said
        assert "internal error" not in said, words
        assert "check that" not in said, words
    assert not Path(f"{cut}-again").exists()


def test_media_that_healing_can_not_take() -> None:
    rows = Dataset.from_list([{"prompt": "w5", "completion": "w6", "images": ["a.png"]}])
    with pytest.raises(LayerPruneError, match=r"rows.jsonl has images, and the model reads only text; leave that"):
        shape_rows(rows, word_tokenizer(), name="rows.jsonl")
    rows = Dataset.from_list([{"prompt": "w5", "completion": "w6", "audio": "a.wav"}])
    with pytest.raises(
        LayerPruneError, match=r"rows.jsonl has audio, and healing trains on text and images; leave it"
    ):
        shape_rows(rows, word_tokenizer(), name="rows.jsonl")


def test_trained_on_images_by_trl(base: Path, tmp_path: Path) -> None:
    """TRL's own trainer takes images with this method: only the tail of the language decoder changes."""
    from PIL import Image
    from trl import SFTConfig, SFTTrainer

    said = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " w5 w6"}]}]
    row = {
        "images": [Image.effect_noise((20, 24), 60).convert("RGB")],
        "prompt": said,
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": " w7 w8"}]}],
    }
    args = SFTConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[],
        use_cpu=True, bf16=False, max_length=None, save_strategy="no", disable_tqdm=True, warmup_steps=0,
    )  # fmt: skip
    model = AutoModelForMultimodalLM.from_pretrained(base)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    config = LayerDropConfig(drop_layers=DROP, tune_layers=1, tune_lm_head=False, tune_final_norm=False)
    processor = AutoProcessor.from_pretrained(base)
    rows = Dataset.from_list([row, row])
    trainer = SFTTrainer(model=model, args=args, train_dataset=rows, processing_class=processor, peft_config=config)
    trainer.train()
    after = dict(trainer.model.merge_and_unload().named_parameters())
    changed = {
        name for name, value in after.items() if not name.startswith(LAYERS) and not torch.equal(value, before[name])
    }
    assert not changed
    last = f"{LAYERS}.4.mlp.down_proj.weight"
    assert not torch.equal(after[last], before[f"{LAYERS}.7.mlp.down_proj.weight"])
    assert torch.equal(after[f"{LAYERS}.3.mlp.down_proj.weight"], before[f"{LAYERS}.6.mlp.down_proj.weight"])


@torch.no_grad()
def test_the_chat_loads_it_and_answers_text(cut: Path) -> None:
    model = weights.load(str(cut))
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    ids = torch.tensor([[5, 6, 7]])
    assert model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, min_new_tokens=4).shape == (1, 7)
