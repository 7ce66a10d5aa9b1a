"""A tiny model that reads images, with its processor, and rows with images."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import EpsImagePlugin

from . import multimodal_inputs
from .heal_makers import word_tokenizer
from .tiny_models import tiny_model

TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for c in m.content %}"
    "{{ '<image> ' if c.type == 'image' else c.text }}{% endfor %}{% endif %}{{ ' ' }}{% endfor %}"
)

_GHOSTSCRIPT = EpsImagePlugin.Ghostscript


def write_llava(folder: Path) -> Path:
    """A tiny LLaVA, whose images take 16 tokens."""
    from transformers import LlavaProcessor

    # An image processor that does not need torchvision; transformers 5.4 has none.
    clip = pytest.importorskip("transformers.models.clip.image_processing_pil_clip")
    tiny_model("llava").save_pretrained(folder)
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tokenizer.chat_template = None
    images = clip.CLIPImageProcessorPil(size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16})
    how = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    LlavaProcessor(images, tokenizer, image_token="<image>", chat_template=TEMPLATE, **how).save_pretrained(folder)
    return folder


def write_qwen2_vl(folder: Path) -> Path:
    """A tiny Qwen2-VL, whose processor needs torchvision."""
    pytest.importorskip("torchvision")
    from transformers import Qwen2VLImageProcessor, Qwen2VLProcessor, Qwen2VLVideoProcessor

    model = tiny_model("qwen2_vl")
    model.save_pretrained(folder)
    tokenizer = word_tokenizer()
    special = ["<|image_pad|>", "<|video_pad|>", "<|vision_end|>", "<|vision_start|>"]  # by their ids in the config
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    how = {"patch_size": model.config.vision_config.patch_size, "min_pixels": 64, "max_pixels": 256}
    template = TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>")
    both = Qwen2VLImageProcessor(**how), tokenizer, Qwen2VLVideoProcessor(**how)
    Qwen2VLProcessor(*both, chat_template=template).save_pretrained(folder)
    return folder


def noise(seed: int) -> Any:
    """An image of random pixels."""
    from PIL import Image

    pixels = torch.randint(0, 256, (20, 24, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def half_a_jpeg(path: Path) -> None:
    """Write an image that opens, and is cut off."""
    noise(0).resize((200, 200)).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:5000])


def lay_postscript(path: Path, place: Path, patch: pytest.MonkeyPatch) -> Path:
    """Write an image in PostScript, and a Ghostscript that leaves a file; return the file's path."""
    noise(0).save(path, "EPS")
    (place / "gs").write_text(f"#!/bin/sh\ntouch {place / 'ran'}\n")
    (place / "gs").chmod(0o755)
    patch.setenv("PATH", f"{place}{os.pathsep}{os.environ['PATH']}")
    patch.setattr(EpsImagePlugin, "gs_binary", None)
    patch.setattr(EpsImagePlugin, "Ghostscript", _GHOSTSCRIPT)
    return place / "ran"


def words(seed: int, count: int) -> str:
    """A text of known words."""
    ids = torch.randint(3, 120, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"w{i}" for i in ids.tolist())


def write_rows(folder: Path, count: int = 8) -> Path:
    """A file of rows with a text and the path of an image."""
    folder.joinpath("pictures").mkdir(parents=True)
    rows = []
    for i in range(count):
        noise(i).save(folder / "pictures" / f"{i}.png")
        rows.append({"text": words(i, 5 + i), "image": f"pictures/{i}.png"})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def media_rows(model_type: str, model: Any, count: int) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Single rows `[1, seq]` for a type, with images or audio."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multimodal_inputs, "BATCH", 1)
        own = multimodal_inputs._noise
        for i in range(count):
            patch.setattr(multimodal_inputs, "_noise", lambda *shape, i=i: own(*shape, seed=100 + i))
            patch.setattr(multimodal_inputs, "AFTER", 6 + i)
            (inputs,) = multimodal_inputs.media_inputs(model_type, model).values()
            made.append((inputs.pop("input_ids"), inputs))
    return made
