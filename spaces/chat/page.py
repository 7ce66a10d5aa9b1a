"""The page: its layout and its events."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from html import escape
from typing import Any

import about
import api
import chat
import gradio as gr
from about import format_bytes
from source import Refused, Source
from weights import DEVICE

MAX_WAITING = 32  # questions in the queue; more are refused
AT_ONCE = 4  # concurrent answers; they take turns, so that a short one need not wait for a long one

EXAMPLES = ("What is the capital of France?", "Write two sentences about a river.", "Why is the sky blue?")

ANSWER: dict[str, Any] = {
    "concurrency_id": "answer",
    "concurrency_limit": AT_ONCE,
    "api_visibility": "private",
    "show_progress": "minimal",
}
QUICK: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
# Events that may be refused go through the queue, because only then does an error reach the page with its message.
CHECKED: dict[str, Any] = QUICK | {"queue": True, "concurrency_limit": None}
TALK: dict[str, Any] = {
    "show_label": False,
    "container": False,
    "elem_classes": "talk",
    "buttons": ["copy"],
    "placeholder": " ",
}
BOX: dict[str, Any] = {
    "show_label": False,
    "container": False,
    "max_lines": 8,
    "submit_btn": True,
    "interactive": False,
    "elem_classes": "box",
}
SMALL: dict[str, Any] = {"size": "sm", "scale": 0, "min_width": 96}
# A box loses the focus while it is disabled. Not on a phone, where the keyboard would pop up.
FOCUS = "() => matchMedia('(hover: hover)').matches && document.querySelector('#%s textarea')?.focus()"


# Markdown code: a fenced block, which may be unfinished while it is streamed, or a code span.
CODE = re.compile(
    r"^ {0,3}(?P<fence>`{3,})[^`\n]*\n.*?(?:\n {0,3}(?P=fence)`*[ \t]*$|\Z)"
    r"|(?<!`)(?P<ticks>`+)(?!`)(?:(?!\n\n).){1,500}?(?<!`)(?P=ticks)(?!`)",
    re.DOTALL | re.MULTILINE,
)
MARKUP = re.compile(r"<(?=[A-Za-z/!?])|&(?=#?\w+;)")
ESCAPED = re.compile(r"&lt;(?=[A-Za-z/!?])|&amp;(?=#?\w+;)")


def escape_html(text: str) -> str:
    """Escape HTML outside code, so that it is shown as text."""
    return outside_code(text, lambda part: MARKUP.sub(lambda match: {"<": "&lt;", "&": "&amp;"}[match[0]], part))


def unescape_html(text: str) -> str:
    """Undo `escape_html`."""
    return outside_code(text, lambda part: ESCAPED.sub(lambda match: {"&lt;": "<", "&amp;": "&"}[match[0]], part))


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """Change the parts of a Markdown text that are not code."""
    parts, end = [], 0
    for code in CODE.finditer(text):
        parts += [change(text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, change(text[end:])])


def chatbot(**settings: Any) -> gr.Chatbot:
    """A chatbot that shows HTML as text instead of rendering or removing it.

    The model reads and writes plain text, but the page renders Markdown. The text is escaped and unescaped between the
    two, so that no other code is affected. (Not in a subclass: Gradio writes a file next to the source of one.)
    """

    def change(data: Any, how: Callable[[str], str]) -> Any:
        for message in data.root if data is not None else ():
            for part in message.content if isinstance(message.content, list) else ():
                if getattr(part, "type", "") == "text":
                    part.text = how(part.text)
        return data

    widget = gr.Chatbot(**settings)
    to_page, from_page = widget.postprocess, widget.preprocess
    widget.postprocess = lambda value: change(to_page(value), escape_html)
    widget.preprocess = lambda payload: from_page(change(payload, unescape_html))
    return widget


def page(source: Source) -> gr.Blocks:
    """Build the page of a model whose small files are available; its weights may still be loading."""
    name = source.records.name
    settings = settings_of_an_answer(source)
    with gr.Blocks(title=name) as demo:
        # First, so that no event of the page gets one of these names.
        gr.api(api.chat, api_name="chat", concurrency_id="answer", concurrency_limit=AT_ONCE)
        gr.api(api.compare, api_name="compare", concurrency_id="answer", concurrency_limit=AT_ONCE)
        gr.api(api.about, api_name="about", concurrency_limit=None)
        state = gr.HTML(heading(name, status()), padding=False)
        with gr.Tabs():
            with gr.Tab("Chat" if source.chats else "Complete") as first:
                box = (
                    chat_tab(source, settings, about.layer_map_html(source.records))
                    if source.chats
                    else complete_tab(settings[1:])
                )
            with gr.Tab("Side by side") as second:
                prompt, why = compare_tab(source, settings)
            with gr.Tab("About this model") as third:
                gr.Markdown(source.records.text, latex_delimiters=[], elem_classes="card")
        with gr.Accordion("Settings", open=False, elem_id="settings") as panel, gr.Row():
            for setting in settings:
                setting.render()
        for tab, visible in ((first, True), (second, True), (third, False)):
            tab.select(lambda visible=visible: gr.update(visible=visible), None, panel, **QUICK)

        async def watch() -> AsyncIterator[list[Any]]:
            """Update an open page until loading is done."""
            last, done = None, False
            while not done:
                done, ready, dense = (
                    chat.models.done.is_set(),
                    *(side in chat.models.sides for side in ("pruned", "dense")),
                )
                if last != (last := (done, ready, dense)):
                    reason = "" if dense else chat.models.no_dense or "The dense model is still loading."
                    yield [
                        heading(name, status()),
                        gr.update(interactive=ready),
                        gr.update(interactive=dense),
                        gr.update(value=chat.small_print(reason), visible=not dense),
                    ]
                await asyncio.sleep(0.2)

        demo.load(
            watch,
            None,
            [state, box, prompt, why],
            concurrency_limit=None,
            api_visibility="private",
            show_progress="hidden",
        )
    return demo.queue(max_size=MAX_WAITING)


def failure(model: str, message: str) -> gr.Blocks:
    """Build the page of a model that can't be loaded."""
    with gr.Blocks(title="No model") as demo:
        gr.HTML(heading(model or "No model", f"<p class='failed' role='alert'>{escape(message)}</p>"), padding=False)
    return demo


def heading(name: str, below: str) -> str:
    """The heading of the page."""
    return f"<h1>{escape(name)}</h1>{below}"


def status() -> str:
    """A line about the weights: loading, failed, or their size."""
    models = chat.models
    if models.error:
        return f"<p class='failed' role='alert'>{escape(models.error)}</p>"
    if (side := models.sides.get("pruned")) is None:
        return f"<p class='small' role='status'>Loading {format_bytes(models.source.size)} of weights …</p>"
    layers = models.source.records.layers()
    count = (
        f"{side.layers} of {layers[0]} layers" if layers and len(layers[1]) == side.layers else f"{side.layers} layers"
    )
    millions = side.parameters / 1e6
    parameters = f"{millions:,.0f} M" if millions >= 1 else f"{side.parameters:,}"
    dtype = str(side.model.dtype).removeprefix("torch.")
    where = "on " + {"cpu": "CPU", "cuda": "GPU"}[DEVICE]
    return chat.small_print(count, f"{parameters} parameters", dtype, where)


def settings_of_an_answer(source: Source) -> list[Any]:
    """The inputs for the settings of an answer, not yet rendered; their defaults are those of the model."""
    defaults, most = source.generation, chat.max_answer_tokens()
    each: dict[str, Any] = {"min_width": 220, "render": False}
    return [
        gr.Textbox("", label="System prompt", max_lines=8, visible=source.chats, min_width=600, render=False),
        gr.Slider(0, 2, defaults["temperature"], step=0.05, label="Temperature", **each),
        gr.Slider(0.05, 1, defaults["top_p"], step=0.05, label="Top-p", **each),
        gr.Slider(1, most, min(256, most), step=1, label="Maximum of new tokens", **each),
        gr.Number(-1, label="Seed (-1: random)", precision=0, minimum=-1, **each),
    ]


def question_box(source: Source, **settings: Any) -> Any:
    """The box for a question, which takes images where the model does."""
    if source.processor is None or not source.chats:
        return gr.Textbox(**settings, **BOX)
    return gr.MultimodalTextbox(file_types=["image"], file_count="multiple", sources=["upload"], **settings, **BOX)


def chat_tab(source: Source, settings: list[Any], glance: str) -> Any:
    """Build the chat with the pruned model, which starts with a small layer map; returns its text box."""
    talk = chatbot(
        editable="user",
        height="max(14rem, 100dvh - 19.5rem)",
        examples=[{"text": text} for text in EXAMPLES],
        **TALK | {"placeholder": glance or " "},
    )
    box = question_box(source, label="Message", placeholder="Message", autofocus=True, elem_id="message")
    note = gr.HTML(padding=False, elem_classes="note")

    system, _, _, most, _ = settings

    def ask(message: Any, history: list[dict], system: str, max_tokens: float) -> tuple[Any, list[dict]]:
        check(message)
        history = [*history, chat.to_message(message)]
        # Raises if it is too long, and then the message stays in the box.
        chat.fit_conversation(history, system, max_tokens)
        return disabled_box(value=""), history

    def retry(history: list[dict], at: gr.RetryData) -> tuple[Any, list[dict]]:
        chat.check()
        return disabled_box(), history[: message_index(at) + 1]

    def edit(history: list[dict], at: gr.EditData) -> tuple[Any, list[dict]]:
        check(at.value)
        files = chat.paths_of(history[message_index(at)])
        changed = {"text": unescape_html(at.value), "files": files} if files else unescape_html(at.value)
        return disabled_box(), [*history[: message_index(at)], chat.to_message(changed)]

    def undo(history: list[dict], at: gr.UndoData) -> tuple[list[dict], Any]:
        last = history[message_index(at)]
        files = chat.paths_of(last)
        text = chat.text_of(last)
        return history[: message_index(at)], {"text": text, "files": files} if files else text

    def example(chosen: gr.SelectData) -> tuple[Any, list[dict]]:
        chat.check()
        return disabled_box(), [{"role": "user", "content": chosen.value["text"]}]

    starts = [
        box.submit(ask, [box, talk, system, most], [box, talk], **CHECKED),
        talk.retry(retry, talk, [box, talk], **CHECKED),
        talk.edit(edit, talk, [box, talk], **CHECKED),
        talk.example_select(example, None, [box, talk], **CHECKED),
    ]
    stream_on(starts, chat.reply, [talk, *settings], [talk, note], box)
    talk.undo(undo, talk, [talk, box], **QUICK)
    talk.clear(lambda: "", None, note, **QUICK)
    return box


def check(message: Any) -> None:
    """Refuse an empty message, and whatever `chat.check` refuses."""
    asked = chat.to_message(message or "")
    text = chat.text_of(asked)
    if not (text.strip() or chat.paths_of(asked)):
        raise Refused("Write a message first.")
    chat.check(text)


def disabled_box(**more: Any) -> Any:
    """The box while the model writes: its button stops the answer."""
    return gr.update(interactive=False, submit_btn=False, stop_btn=True, **more)


def message_index(at: gr.EventData) -> int:
    """The index of the message that an event belongs to."""
    return at.index[0] if isinstance(at.index, list | tuple) else at.index


def complete_tab(settings: list[Any]) -> gr.Textbox:
    """Build the tab for continuing a text; returns its text box."""
    box = gr.Textbox(
        label="Text",
        lines=10,
        max_lines=24,
        placeholder="Start a text for the model to continue.",
        interactive=False,
        submit_btn="Continue",
        elem_id="message",
    )
    note = gr.HTML(padding=False, elem_classes="note")
    before = gr.State("")
    with gr.Row():
        undo = gr.Button("Undo", **SMALL)
        gr.ClearButton([box, note], value="Clear", **SMALL)

    def go_on(text: str) -> tuple[Any, str]:
        check(text)
        return disabled_box(), text

    stream_on([box.submit(go_on, box, [box, before], **CHECKED)], chat.complete, [box, *settings], [box, note], box)
    undo.click(lambda text: text, before, box, **QUICK)
    return box


def compare_tab(source: Source, settings: list[Any]) -> tuple[Any, gr.HTML]:
    """Build the tab with both models; returns its text box, and the element that shows why it is disabled."""
    sides: list[Any] = []
    why = gr.HTML(padding=False)
    box = question_box(source, label="Prompt for both", placeholder="Ask both models", elem_id="prompt")
    note = gr.HTML(padding=False, elem_classes="note")
    with gr.Row(elem_classes="sides"):
        for label in ("Pruned", "Dense"):
            with gr.Column(min_width=280):
                gr.HTML(f"<h2>{label}</h2>", padding=False)
                figures = gr.HTML(padding=False, elem_classes="note")
                sides += [chatbot(height=None, **TALK), figures]

    def ask(prompt: Any) -> Any:
        check(prompt)
        return disabled_box()

    stream_on([box.submit(ask, box, box, **CHECKED)], chat.compare, [box, *settings], [*sides, note], box)
    return box, why


def stream_on(starts: list[Any], answer: Callable, inputs: list[Any], outputs: list[Any], box: Any) -> None:
    """Stream an answer after each of the events, which disable a box; then enable it again."""
    button = box.submit_btn
    runs = [start.success(answer, inputs, outputs, **ANSWER) for start in starts]
    for ended in [how for run in runs for how in (run.then, run.failure)]:
        opened = ended(lambda: gr.update(interactive=True, submit_btn=button, stop_btn=False), None, box, **QUICK)
        opened.then(None, None, None, js=FOCUS % box.elem_id, api_visibility="private")
    box.stop(None, None, None, cancels=runs, api_visibility="private")
