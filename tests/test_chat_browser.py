"""The chat as people use it: in Chromium, with mouse, touch and keyboard."""

from __future__ import annotations

import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from playwright.sync_api import Browser, expect, sync_playwright

from hf_layerprune.cli import main
from tests.chat_models import NASTY, pruned_model, tiny_chat_model, words
from tests.chat_server import answers_under_way, served
from tests.chat_visit import Visit, visiting

import chat  # isort: skip

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-domain-reliability",
    "--disable-sync",
]
pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        missing = "there is no Chromium to test the chat in: apt-get install chromium"
        pytest.fail(missing) if os.environ.get("CI") else pytest.skip(missing)
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield found
        found.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    tiny_chat_model(folder / "base", context=2048)
    pruned_model(folder / "base", folder / "pruned")
    assert main(["card", str(folder / "pruned"), "--base-model", "org/base"]) == 0
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with served(folder / "pruned", folder / "base") as address:
        unhurried()
        yield address


def unhurried() -> None:
    """Let the models take their time, so that there is some for people to do something."""
    for side in chat.models.sides.values():
        side.model.register_forward_pre_hook(lambda *_: time.sleep(0.02))


@pytest.fixture
def visit(browser: Browser, url: str) -> Iterator[Callable[..., Visit]]:
    with visiting(browser, url) as opened:
        yield opened


def test_send_stream_stop_retry_edit_undo_clear(visit: Callable[..., Visit]) -> None:
    here = visit().ready().set(tokens=1024)
    page = here.page
    here.send("ba be")
    expect(here.box).to_have_value("")
    expect(here.box).to_be_disabled()
    here.until(lambda: len("".join(here.said("bot"))) > 20)
    early = here.said("bot")[0]
    here.until(lambda: len(here.said("bot")[0]) > len(early))
    assert here.said("bot")[0].startswith(early.rstrip())
    expect(page.get_by_text("tokens/s")).to_be_visible()
    here.stop()
    here.until(lambda: answers_under_way() == 0, 1)
    first = here.said("bot")
    page.wait_for_timeout(300)
    assert here.said("bot") == first
    assert here.said("user") == ["ba be"]
    expect(here.box).to_be_focused()

    here.button("Retry").click()
    here.until(lambda: here.said("bot") not in ([], first))
    assert here.said("user") == ["ba be"]
    here.stop()

    # The partial answer is part of what the model sees next.
    second = here.said("bot")
    seen = []
    fit = chat.models.source.fit
    chat.models.source.fit = lambda talk, most: seen.append(talk) or fit(talk, most)
    try:
        here.send("bi bo")
        here.until(lambda: len(here.said("bot")) == 2)
        here.stop()
    finally:
        chat.models.source.fit = fit
    assert [turn["content"].split()[:2] for turn in seen[0][::2]] == [["ba", "be"], ["bi", "bo"]]
    assert page.evaluate("text => text.replace(/[`\\s]+/g, ' ').trim()", seen[0][1]["content"]) == " ".join(
        second[0].split()
    )

    here.button("Undo").click()
    expect(here.box).to_have_value("bi bo")
    here.until(lambda: here.said("user") == ["ba be"])
    assert len(here.said("bot")) == 1

    here.button("Edit").click()
    page.locator(".talk textarea").fill("du da")
    here.button("Submit").click()
    here.until(lambda: here.said("user") == ["du da"] and here.said("bot") not in ([], second))
    here.stop()

    here.button("Clear").click()
    here.until(lambda: not here.said("user") and not here.said("bot"))
    page.get_by_text("Why is the sky blue?").click()
    here.until(lambda: here.said("user") == ["Why is the sky blue?"] and bool(here.said("bot")))
    here.stop()


def test_an_answer_that_ends_by_itself(visit: Callable[..., Visit]) -> None:
    here = visit().ready().set(tokens=60, seed=4, system="do")
    for count in (1, 2):
        here.send("ba")
        here.until(lambda count=count: len(here.said("user")) == count)
        here.answered()
    figures = re.compile("^60 tokens · .* tokens/s · first token after .* s · seed 4$")
    expect(here.page.get_by_text(figures)).to_be_visible()
    answers = here.said("bot")
    here.button("Retry").click()
    expect(here.box).to_be_disabled()
    here.answered()
    assert here.said("bot") == answers  # with a seed, the same again


def test_html_in_prompts_and_answers_is_shown_and_not_run(
    visit: Callable[..., Visit], monkeypatch: pytest.MonkeyPatch
) -> None:
    here = visit().ready().set(tokens=60, temperature=2)
    for side in chat.models.sides.values():  # a model that would write nothing but HTML
        nasty = [[[index], 20.0] for index, word in enumerate(words()) if word in NASTY]
        monkeypatch.setattr(side.model.generation_config, "sequence_bias", nasty)
    nasty = "<script>window.ran=1</script> <img src=x onerror=window.ran=1> <b>x</b> &lt; & `<i>` [x](javascript:window.ran=1)"
    here.send(nasty)
    here.answered()
    assert here.said("user")[0].startswith(
        "<script>window.ran=1</script> <img src=x onerror=window.ran=1> <b>x</b> &lt; & <i>"
    )
    answer = here.said("bot")[0]
    written = ("<img/src=x/onerror=window.ran=1>", "<script>window.ran=1</script>", "<b>bold</b>", "&lt;", "<i>")
    assert sum(word in answer for word in written) >= 3  # which ones is chance
    assert here.page.evaluate("window.ran") is None
    assert here.page.locator(".talk :is(script, img, b, i)").count() == 0
    here.tab("Side by side")
    here.prompt.fill(nasty)
    here.prompt.press("Enter")
    here.until(lambda: len(here.page.locator(".sides [data-testid=bot]").all()) == 2)
    expect(here.prompt).to_be_enabled()
    assert any(word in here.page.locator(".sides").inner_text() for word in written)
    assert here.page.evaluate("window.ran") is None
    assert here.page.locator(".sides :is(script, img, b, i)").count() == 0


def test_side_by_side(visit: Callable[..., Visit]) -> None:
    here = visit().ready().set(tokens=1024)
    here.tab("Side by side")
    here.prompt.fill("ba be")
    here.prompt.press("Enter")
    answers = here.page.locator(".sides [data-testid=bot]")
    here.until(lambda: answers.count() == 2 and all(len(one.inner_text()) > 20 for one in answers.all()))
    assert answers_under_way() == 2
    here.page.get_by_test_id("stop-button").click()
    expect(here.prompt).to_be_enabled()
    here.until(lambda: answers_under_way() == 0, 1)
    expect(here.prompt).to_have_value("ba be")
    figures = here.page.locator(".sides .small").all_inner_texts()
    assert len([line for line in figures if "tokens/s · first token after" in line]) == 2
    assert len([line for line in figures if "of weights" in line]) == 2
    expect(here.page.get_by_text("of weights for both, of which they share")).to_be_visible()


def test_a_prompt_of_100000_characters_gets_a_clear_limit(visit: Callable[..., Visit]) -> None:
    here = visit().ready()
    here.send("x" * 100_000)
    expect(here.page.get_by_text("This prompt has 100,000 characters, but the limit is 40,000")).to_be_visible()
    assert len(here.box.input_value()) == 100_000  # nobody has to write it again
    assert not here.said("user")
    here.send("   ")
    expect(here.page.get_by_text("Write a message first")).to_be_visible()
    here.send("ba " * 2_000)
    expect(here.page.get_by_text("This prompt has 2,004 tokens")).to_be_visible()
    assert not here.said("user")


def test_an_answer_that_fails_leaves_the_page_usable(visit: Callable[..., Visit]) -> None:
    here = visit().ready().set(tokens=8)
    layer = chat.models.sides["pruned"].model.model.layers[0]
    hook = layer.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    try:
        here.send("ba")
        expect(here.page.get_by_text("no room")).to_be_visible()
        expect(here.box).to_be_enabled()
    finally:
        hook.remove()
    here.send("be")
    here.until(lambda: len(here.said("bot")) == 1)
    expect(here.box).to_be_enabled()


def test_what_no_longer_fits_is_said(visit: Callable[..., Visit]) -> None:
    here = visit().ready().set(tokens=16)
    for count in (1, 2, 3):
        here.send("ba " * 900)
        here.until(lambda count=count: len(here.said("user")) == count)
        here.answered()
    expect(here.page.get_by_text("the first 2 messages no longer fit and are left out")).to_be_visible()
    assert len(here.said("user")) == 3  # they can still be read
    # What scrolls by does so below the button that clears all.
    clear, talk = (here.page.locator(f".talk {part}").first.bounding_box() for part in (".top-panel", ".bubble-wrap"))
    assert clear["y"] + clear["height"] <= talk["y"] + 1


def test_an_empty_page_begins_with_a_glance_at_the_model(visit: Callable[..., Visit]) -> None:
    here = visit().ready().set(tokens=4)
    expect(here.page.get_by_text("base without layers 3-4")).to_be_visible()
    assert here.page.locator(".glance .kept").count() == 6
    assert here.page.locator(".glance .gone").count() == 2
    here.send("ba")
    here.answered()
    assert here.page.locator(".glance").count() == 0


def test_keyboard_only(visit: Callable[..., Visit]) -> None:
    here = visit().ready().set(tokens=1024)
    page = here.page

    def tab_to(wanted: str, most: int = 30) -> None:
        for _ in range(most):
            page.keyboard.press("Tab")
            name = page.evaluate(
                "(e => e === document.body ? '' : e.ariaLabel || e.title || e.dataset.testid || e.innerText || e.placeholder)(document.activeElement)"
            )
            if wanted in (name or ""):
                return
        raise AssertionError(f"no way to {wanted} by keyboard")

    here.box.focus()
    page.keyboard.type("ba be")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("bi")
    page.keyboard.press("Enter")
    here.until(lambda: bool(here.said("bot")))
    assert here.said("user") == ["ba be\nbi"]
    tab_to("stop-button", 3)
    page.keyboard.press("Enter")
    expect(here.box).to_be_focused()
    before = here.said("bot")
    page.keyboard.press("Shift+Tab")  # back into the conversation: its last buttons
    for _ in range(12):
        if page.evaluate("document.activeElement.ariaLabel") == "Retry":
            break
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    here.until(lambda: here.said("bot") not in ([], before))
    tab_to("stop-button", 8)
    page.keyboard.press("Enter")
    expect(here.box).to_be_focused()
    tab_to("Settings")
    page.keyboard.press("Enter")
    expect(page.get_by_label("System prompt")).to_be_visible()
    page.evaluate("document.activeElement.blur()")
    tab_to("Side by side")
    page.keyboard.press("Enter")
    expect(here.prompt).to_be_visible()
    outline = page.evaluate(
        "(e => getComputedStyle(e).outlineStyle + getComputedStyle(e).boxShadow)(document.activeElement)"
    )
    assert outline not in ("nonenone", "none")


@pytest.mark.parametrize("width", [360, 390, 768])
def test_a_phone(visit: Callable[..., Visit], width: int) -> None:
    here = visit(viewport={"width": width, "height": 780}, is_mobile=True, has_touch=True).ready().set(tokens=60)
    page = here.page

    def fits() -> None:
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.evaluate("document.querySelector('.talk').getBoundingClientRect().width") <= width

    fits()
    here.send("ba be")
    expect(page.get_by_text(re.compile("^60 tokens"))).to_be_visible()
    expect(here.box).to_be_enabled()
    expect(here.box).not_to_be_focused()  # the keyboard of a phone would hide the answer
    assert here.box.bounding_box()["y"] < 780
    fits()
    page.get_by_role("tab", name="Side by side").tap()
    here.prompt.fill("ba be")
    here.prompt.press("Enter")
    here.until(lambda: page.locator(".sides [data-testid=bot]").count() == 2)
    expect(here.prompt).to_be_enabled()
    pruned, dense = (one.bounding_box() for one in page.locator(".sides > .column").all())
    assert (dense["y"] > pruned["y"] + 20) == (width < 600)  # one below the other where it is narrow
    fits()
    page.get_by_role("tab", name="About this model").tap()
    expect(page.get_by_role("img", name="The 8 decoder layers of the base")).to_be_visible()
    fits()


def luminance(color: str) -> float:
    parts = [float(part) / 255 for part in re.findall(r"[\d.]+", color)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark_can_be_read(visit: Callable[..., Visit], scheme: str) -> None:
    here = visit(color_scheme=scheme).ready().set(tokens=20)
    here.send("ba be")
    expect(here.page.get_by_text(re.compile("^20 tokens"))).to_be_visible()
    background = luminance(here.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert (background < 0.1) == (scheme == "dark")
    for selector in (".small", "[data-testid=bot]", "[data-testid=user]", "#message textarea", "h1", "[role=tab]"):
        color = luminance(here.page.evaluate(f"getComputedStyle(document.querySelector('{selector}')).color"))
        high, low = max(color, background), min(color, background)
        assert (high + 0.05) / (low + 0.05) >= 4.5, selector  # WCAG 2.2, level AA


def test_about_this_model(visit: Callable[..., Visit], browser: Browser, folder: Path) -> None:
    here = visit().ready()
    here.tab("About this model")
    page = here.page
    expect(page.get_by_text("6 of 8 decoder layers remain")).to_be_visible()
    expect(page.get_by_role("img", name="The 8 decoder layers of the base")).to_be_visible()
    expect(page.get_by_text("This model has not been measured")).to_be_visible()
    assert not page.locator("#settings").is_visible()
    here.tab("Chat")
    expect(page.locator("#settings")).to_be_visible()


def test_a_card_runs_loads_and_covers_nothing(visit: Callable[..., Visit], folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "pruned", tmp_path, dirs_exist_ok=True)
    lines = [
        "<img alt='>' src='https://evil.example/1' onerror='window.ran=1'>",
        "<div id=cover style='position: fixed; inset: 0; background: url(https://evil.example/2)'>cover</div>",
        "<form action='https://evil.example'><input></form>",
        "![far](https://evil.example/3) [run](javascript:window.ran=1)",
        "$$\\rule{9999em}{9999em}$$",
        "```mermaid\ngraph TD; A[\"<img src='https://evil.example/4'>\"]\n```",
    ]
    (tmp_path / "README.md").write_text("\n\n".join(lines))
    with served(tmp_path) as address:
        here = visit(address).ready()  # which fails if another host is asked
        here.tab("About this model")
        expect(here.page.get_by_role("link", name="far")).to_be_visible()
        here.page.get_by_text("run", exact=True).evaluate("link => link.click()")
        here.page.wait_for_timeout(500)
        assert here.page.locator(".card :is(img, form, #cover, .katex, .mermaid)").count() == 0
        assert here.page.evaluate("window.ran") is None


def test_a_model_without_a_template_gets_a_box_to_complete(visit: Callable[..., Visit], folder: Path) -> None:
    plain = tiny_chat_model(folder / "plain", template=False)
    with served(plain) as address:
        here = visit(address).ready().set(tokens=1024)
        page = here.page
        expect(page.get_by_role("tab", name="Chat")).to_have_count(0)
        here.box.fill("ba be")
        here.button("Continue").click()
        here.until(lambda: len(here.box.input_value()) > 40)
        here.stop()
        text = here.box.input_value()
        assert text.startswith("ba be")
        here.button("Undo").click()
        expect(here.box).to_have_value("ba be")
        here.button("Clear").click()
        expect(here.box).to_have_value("")
        here.tab("Side by side")
        expect(page.get_by_text("pass it with --base; in a Space, set the variable BASE_ID")).to_be_visible()
        expect(here.prompt).to_be_disabled()


def test_the_page_is_there_while_the_weights_load(visit: Callable[..., Visit], folder: Path) -> None:
    load = chat.Models.load
    go = threading.Event()

    def later(self: Any) -> None:
        go.wait(30)
        load(self)

    chat.Models.load = later
    try:
        with served(folder / "pruned", folder / "base", loaded=False) as address:
            here = visit(address)
            expect(here.page.get_by_text(re.compile("Loading .* of weights"))).to_be_visible()
            expect(here.box).to_be_disabled()
            go.set()
            here.ready()
            here.send("ba")
            here.until(lambda: bool(here.said("bot")))
            expect(here.box).to_be_enabled()
    finally:
        chat.Models.load = load


@pytest.mark.parametrize("damage", ["weights", "config", "unnamed"])
def test_a_clear_page_where_there_is_no_model(
    visit: Callable[..., Visit], folder: Path, tmp_path: Path, damage: str
) -> None:
    shutil.copytree(folder / "pruned", tmp_path, dirs_exist_ok=True)
    (tmp_path / {"weights": "model.safetensors"}.get(damage, "config.json")).write_text("{")
    with served("" if damage == "unnamed" else tmp_path) as address:
        here = visit(address)
        alert = here.page.get_by_role("alert")
        expect(alert).to_be_visible()
        expected = "Set the variable MODEL_ID" if damage == "unnamed" else f"{tmp_path} can't be loaded"
        assert expected in alert.inner_text()
        if damage == "weights":
            expect(here.box).to_be_disabled()
