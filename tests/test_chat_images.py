"""The chat with a model that reads images: its parts, and the page in Chromium."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError
from playwright.sync_api import Browser, expect
from transformers import AutoConfig, AutoProcessor

from tests.chat_models import pruned_model, tiny_chat_model
from tests.chat_server import served
from tests.chat_visit import Visit, visiting
from tests.multimodal_makers import lay_postscript, noise, write_llava
from tests.test_chat_browser import browser  # noqa: F401 (a fixture)

import chat  # isort: skip
import images  # isort: skip
import source  # isort: skip
import weights  # isort: skip

PLACE = 16  # tokens of an image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    write_llava(folder / "base")
    pruned_model(folder / "base", folder / "pruned")
    for i in range(2):
        noise(i).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no image at all")
    return folder


def pixels(folder: Path, number: int) -> torch.Tensor:
    processor = AutoProcessor.from_pretrained(folder / "pruned")
    return processor(images=noise(number), text="<image>", return_tensors="pt")["pixel_values"]


# --- its parts ------------------------------------------------------------------------------------------


def test_a_prompt_with_images(folder: Path) -> None:
    found = source.Source(str(folder / "pruned"), str(folder / "base"))
    assert found.processor is not None
    said = [
        {"role": "user", "content": "w5 w6", "images": [str(folder / "0.png")]},
        {"role": "assistant", "content": "w7"},
        {"role": "user", "content": "w8", "images": [str(folder / "1.png")]},
    ]
    prompt, left_out = found.fit(said, 8)
    assert left_out == 0
    place = AutoConfig.from_pretrained(folder / "base").image_token_id
    assert prompt == [place] * PLACE + [5, 6, 7] + [place] * PLACE + [8]
    assert torch.equal(prompt.media["pixel_values"], torch.cat([pixels(folder, 0), pixels(folder, 1)]))
    found.context = 40  # the first question goes, and its image with it
    prompt, left_out = found.fit(said, 8)
    assert left_out == 2
    assert torch.equal(prompt.media["pixel_values"], pixels(folder, 1))
    found.context = 20
    with pytest.raises(source.Refused, match="Images take tokens too: a smaller one takes fewer"):
        found.fit(said, 8)
    with pytest.raises(source.Refused, match="can't be read as an image"):
        found.fit([{"role": "user", "content": "w5", "images": [str(folder / "broken.png")]}], 8)


def test_no_image_is_run(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran = lay_postscript(tmp_path / "a.png", tmp_path, monkeypatch)
    with pytest.raises(source.Refused, match="can't be read as an image"):
        source.Source(str(folder / "base")).encode(
            [{"role": "user", "content": "w5", "images": [str(tmp_path / "a.png")]}]
        )
    assert not ran.exists()


def test_a_text_model_takes_no_image(tmp_path: Path) -> None:
    chat.models = weights.Models(source.Source(str(tiny_chat_model(tmp_path / "text"))))
    assert chat.models.source.processor is None
    with pytest.raises(source.Refused, match=r"This model reads only text: leave the image out\."):
        chat.to_template_messages([{"role": "user", "content": [{"path": "a.png"}, "ba"]}])


def test_the_checkpoint_names_its_class() -> None:
    for model_type, architecture, whole in (
        ("qwen3_5", "Qwen3_5ForConditionalGeneration", True),
        ("qwen3_5", "Qwen3_5ForCausalLM", False),
        ("qwen2_vl", "Qwen2VLForConditionalGeneration", True),
        ("llama4", "Llama4ForConditionalGeneration", False),
        ("llama", "LlamaForCausalLM", False),
    ):
        config = AutoConfig.for_model(model_type)
        config.architectures = [architecture]
        assert (images.auto_class(config) is images.AutoModelForMultimodalLM) == whole, model_type


# --- the page -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with served(folder / "pruned", folder / "base") as address:
        yield address


@pytest.fixture
def visit(browser: Browser, url: str) -> Iterator[Callable[..., Visit]]:  # noqa: F811
    with visiting(browser, url) as opened:
        yield opened


@pytest.fixture
def seen() -> Iterator[dict[str, list[torch.Tensor]]]:
    """The pixels that each model's vision tower was given."""
    found: dict[str, list[torch.Tensor]] = {role: [] for role in chat.models.sides}

    def keep(role: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            found[role].append((args[0] if args else kwargs["pixel_values"]).clone())

        return hook

    handles = [
        side.model.model.vision_tower.register_forward_pre_hook(keep(role), with_kwargs=True)
        for role, side in chat.models.sides.items()
    ]
    yield found
    for handle in handles:
        handle.remove()


def attach(here: Visit, box: str, *files: Path) -> None:
    here.page.locator(f"{box} input[type=file]").set_input_files([str(file) for file in files])
    expect(here.page.locator(f"{box} img")).to_have_count(len(files))


@pytest.mark.browser
def test_ask_about_an_image(visit: Callable[..., Visit], folder: Path, seen: dict[str, list[torch.Tensor]]) -> None:
    here = visit().ready().set(tokens=8, temperature=0)
    attach(here, "#message", folder / "0.png")
    here.send("w5 w6")
    here.until(lambda: here.page.locator(".talk .user img").count() == 1)
    here.until(lambda: here.box.is_enabled() and len(here.said("bot")) == 1)
    expect(here.page.locator("#message img")).to_have_count(0)  # the next question begins without it
    (given,) = seen["pruned"]
    assert torch.equal(given, pixels(folder, 0))
    assert not seen["dense"]

    # The image stays a part of the conversation, and of an edited question.
    here.send("w9")
    here.until(lambda: here.box.is_enabled() and len(here.said("bot")) == 2)
    assert torch.equal(seen["pruned"][1], pixels(folder, 0))
    here.button("Undo").click()
    expect(here.box).to_have_value("w9")
    here.button("Undo").click()
    expect(here.box).to_have_value("w5 w6")
    expect(here.page.locator("#message img")).to_have_count(1)
    here.box.press("Enter")
    here.until(lambda: here.box.is_enabled() and len(here.said("bot")) == 1)
    assert torch.equal(seen["pruned"][2], pixels(folder, 0))
    here.button("Retry").click()
    here.until(lambda: len(seen["pruned"]) == 4)
    here.until(lambda: here.box.is_enabled() and len(here.said("bot")) == 1)


@pytest.mark.browser
def test_text_alone_and_two_images(
    visit: Callable[..., Visit], folder: Path, seen: dict[str, list[torch.Tensor]]
) -> None:
    here = visit().ready().set(tokens=8)
    here.send("w5 w6")
    here.until(lambda: here.box.is_enabled() and len(here.said("bot")) == 1)
    assert not seen["pruned"]
    attach(here, "#message", folder / "0.png", folder / "1.png")
    here.send("w7")
    here.until(lambda: here.box.is_enabled() and len(here.said("bot")) == 2)
    assert torch.equal(seen["pruned"][0], torch.cat([pixels(folder, 0), pixels(folder, 1)]))


@pytest.mark.browser
def test_side_by_side(visit: Callable[..., Visit], folder: Path, seen: dict[str, list[torch.Tensor]]) -> None:
    here = visit().ready().set(tokens=8)
    here.tab("Side by side")
    attach(here, "#prompt", folder / "1.png")
    here.prompt.fill("w5 w6")
    here.prompt.press("Enter")
    answers = here.page.locator(".sides [data-testid=bot]")
    here.until(lambda: answers.count() == 2)
    expect(here.prompt).to_be_enabled()
    for role in ("pruned", "dense"):
        (given,) = seen[role]
        assert torch.equal(given, pixels(folder, 1))
    expect(here.page.get_by_text("of weights for both, of which they share")).to_be_visible()


@pytest.mark.browser
def test_a_file_that_is_no_image(visit: Callable[..., Visit], folder: Path) -> None:
    here = visit().ready().set(tokens=8)
    here.page.locator("#message input[type=file]").set_input_files(str(folder / "broken.png"))
    expect(here.page.get_by_label("Remove file")).to_have_count(1)
    here.send("w5")
    expect(here.page.get_by_text("One of the files can't be read as an image")).to_be_visible()
    assert not here.said("user")
    expect(here.box).to_have_value("w5")
    here.page.get_by_label("Remove file").click()
    here.send("w5")
    here.until(lambda: here.box.is_enabled() and len(here.said("bot")) == 1)


def test_the_api_takes_text_alone(url: str, folder: Path) -> None:
    client = Client(url, verbose=False)
    assert isinstance(client.predict("w5", max_tokens=4, api_name="/chat"), str)
    history = [{"role": "user", "content": [{"type": "file", "file": {"path": str(folder / "0.png")}}]}]
    with pytest.raises(AppError, match="The API takes text alone: leave the image out, or use the page"):
        client.predict("w5", history, max_tokens=4, api_name="/chat")
    file = str(folder / "0.png")
    for name, asked in (
        ("/chat", {"path": file}),
        ("/chat", [{"path": file}, "w5"]),
        ("/compare", {"text": "w5", "files": [file]}),
    ):
        with pytest.raises(AppError, match="The API takes text alone"):
            client.predict(asked, max_tokens=4, api_name=name)
