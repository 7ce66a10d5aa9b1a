"""A page of the chat in a browser, and what users do on it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Locator, Page, expect

WAIT = 60_000  # milliseconds; long enough for a busy machine
expect.set_options(timeout=WAIT)
# Messages of the browser that do not come from errors of this page.
HARMLESS = re.compile(r"Autofocus processing was blocked")


class Visit:
    """An open page, and the errors that it reported."""

    def __init__(self, page: Page, url: str) -> None:
        self.page, self.wrong = page, []
        page.set_default_timeout(WAIT)
        page.on("console", lambda message: self._note(message.type, message.text))
        page.on("pageerror", lambda error: self._note("error", str(error)))
        page.on("dialog", lambda dialog: (self._note("error", f"a dialog: {dialog.message}"), dialog.dismiss()))
        # A request to any other host is an error.
        page.on(
            "request",
            lambda request: request.url.startswith((url, "data:", "blob:")) or self._note("error", request.url),
        )
        page.goto(url)
        self.box = page.locator("#message textarea")
        self.prompt = page.locator("#prompt textarea")

    def _note(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and not HARMLESS.search(text):
            self.wrong.append(text)

    def ready(self) -> Visit:
        expect(self.page.get_by_text("layers ·")).to_be_visible()
        expect(self.box).to_be_enabled()
        return self

    def button(self, name: str) -> Locator:
        return self.page.get_by_role("button", name=name, exact=True)

    def tab(self, name: str) -> None:
        self.page.get_by_role("tab", name=name).click()

    def set(self, tokens: int, **values: object) -> Visit:
        """Fill in settings, the maximum of new tokens first."""
        self.button("Settings ▼").click()
        number, slider = (
            self.page.get_by_label(f"{part} for Maximum of new tokens") for part in ("number input", "range slider")
        )

        def heeded() -> bool:
            number.fill(str(tokens))
            number.press("Tab")
            return slider.input_value() == str(tokens)

        self.until(heeded)  # a panel that has just opened may ignore input
        for label, value in values.items():
            name = {"temperature": "number input for Temperature", "system": "System prompt"}.get(label, label)
            field = self.page.get_by_label(re.compile(name, re.IGNORECASE)).first
            field.fill(str(value))
            field.press("Tab")
        self.button("Settings ▼").click()
        return self

    def said(self, who: str) -> list[str]:
        return [one.inner_text() for one in self.page.get_by_test_id(who).all()]

    def send(self, text: str) -> None:
        self.box.fill(text)
        self.box.press("Enter")

    def stop(self) -> None:
        self.page.get_by_test_id("stop-button").first.click()
        expect(self.box).to_be_enabled()

    def answered(self) -> None:
        """Wait until the last question has its whole answer."""
        self.until(lambda: self.box.is_enabled() and 0 < len(self.said("user")) == len(self.said("bot")))

    def until(self, condition: Callable[[], bool], seconds: float = WAIT / 1000) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end
            self.page.wait_for_timeout(20)


@contextmanager
def visiting(browser: Browser, url: str) -> Iterator[Callable[..., Visit]]:
    """Yields a function that opens a page; at the end, each page is closed, and must have reported no error."""
    visits: list[Visit] = []

    def opened(address: str = url, **settings: Any) -> Visit:
        context = browser.new_context(**({"viewport": {"width": 1280, "height": 800}} | settings))
        visits.append(Visit(context.new_page(), address))
        return visits[-1]

    yield opened
    for one in visits:
        if shots := os.environ.get("HF_LAYERPRUNE_SCREENSHOTS"):
            name = os.environ["PYTEST_CURRENT_TEST"].split("::")[1].split()[0]
            one.page.screenshot(path=Path(shots, f"{name}.png"))
        one.page.context.close()
        assert not one.wrong
