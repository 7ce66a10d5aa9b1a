"""Chat with a pruned language model, and see what pruning cost.

    MODEL_ID=me/pruned BASE_ID=me/dense python app.py

Runs on a CPU, on one GPU and on ZeroGPU. `MODEL_ID` is a Hub id or a folder, by default the first of `models` in
README.md. `BASE_ID`, by default the second, is the dense model to compare with. A private model needs `HF_TOKEN`.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
with suppress(ImportError):  # ZeroGPU patches torch, so this comes first
    import spaces  # noqa: F401

import chat
import gradio as gr
from huggingface_hub.repocard import metadata_load
from page import failure, page
from source import CannotLoad, Source
from weights import ZERO_GPU, Models

HERE = Path(__file__).parent


def build(model: str, base: str | None = None) -> gr.Blocks:
    """Build the page of a model, and load its weights in the background.

    Args:
        model (`str`): A Hub id, a folder or a `.gguf` file; a model or an adapter.
        base (`str`, *optional*): The dense model to compare with.

    Raises:
        CannotLoad: The model's small files say that it can't be loaded.
    """
    if not model:
        raise CannotLoad("Set the variable MODEL_ID to the id of a model on the Hub.")
    chat.models = Models(Source(model, base))
    made = page(chat.models.source)
    if ZERO_GPU:  # ZeroGPU hands the weights to the GPU when the page starts
        chat.models.load()
    else:
        threading.Thread(target=chat.models.load, daemon=True).start()
    return made


def prepare(model: str, base: str | None = None) -> gr.Blocks:
    """Build the page of a model, as `build` does, or one with the reason why the model can't be loaded."""
    try:
        return build(model, base)
    except CannotLoad as error:
        return failure(model, str(error))


def launch(made: gr.Blocks, **settings: Any) -> Any:
    """Serve the page, and its tools over MCP."""
    font, mono = ["system-ui", "sans-serif"], ["ui-monospace", "monospace"]
    theme = gr.themes.Base(primary_hue="indigo", neutral_hue="zinc", font=font, font_mono=mono, radius_size="lg")
    theme.set(
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_400",
        input_placeholder_color="*neutral_500",
        input_placeholder_color_dark="*neutral_400",
    )
    look = {"theme": theme, "css_paths": HERE / "style.css", "footer_links": ["api"]}
    return made.launch(**look, mcp_server=True, show_error=True, max_file_size="20mb", **settings)


if __name__ == "__main__":
    # The front matter names the model, then its base.
    names = [*(metadata_load(HERE / "README.md") or {}).get("models", []), "", ""]
    launch(prepare(os.environ.get("MODEL_ID") or names[0], os.environ.get("BASE_ID") or names[1]))
