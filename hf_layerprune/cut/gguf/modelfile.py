"""A `Modelfile` beside a GGUF file, for `ollama create`.

The grammar: https://github.com/ollama/ollama/blob/main/docs/modelfile.md
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ...files.gguf_header import Entry, GGUFHeader, read_header

# Whatever ends an answer: the end of the text, of a turn, of a message.
_END_TOKENS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def make_modelfile(path: Path) -> str | None:
    """The text of a `Modelfile` for a GGUF file, or `None` if the file has no chat template."""
    header = read_header(path)
    if "tokenizer.chat_template" not in header.keys or not path.name.isprintable():
        return None
    lines = [
        f"# ollama create {path.stem} --file {path.stem}.Modelfile",
        "# Ollama takes the template closest to the file's own among those that it knows, without its system prompt;",
        "# add TEMPLATE and SYSTEM if that is not what you want.",
        f'FROM "./{path.name}"' if " " in path.name else f"FROM ./{path.name}",
        *(f'PARAMETER stop "{token}"' for token in dict.fromkeys(_stop_tokens(header))),
    ]
    return "\n".join(lines) + "\n"


def _stop_tokens(header: GGUFHeader) -> Iterator[str]:
    tokens = header.keys.get("tokenizer.ggml.tokens")
    for key in _END_TOKENS:
        entry = header.keys.get(key)
        if tokens is None or entry is None or not entry.is_integer or not entry.values:
            continue
        token = _array_item(tokens, entry.values[0])
        if token and token.isprintable() and '"' not in token:
            yield token


def _array_item(texts: Entry, index: int) -> str | None:
    """An item of an array of texts."""
    if not texts.is_array or texts.is_numeric or not 0 <= index < texts.count:
        return None
    start = 0
    for _ in range(index):
        start += 8 + int.from_bytes(texts.raw[start : start + 8], "little")
    length = int.from_bytes(texts.raw[start : start + 8], "little")
    return texts.raw[start + 8 : start + 8 + length].decode("utf-8", errors="replace")
