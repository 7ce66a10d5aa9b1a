"""Texts of three domains: windows to measure on, and other documents to train on.

| domain | file | measured | to train on |
|---|---|---|---|
| encyclopedia | `wikitext2-valid.txt` | the first 120,000 characters | behind character 160,000 |
| web | `c4_sample.jsonl` | documents 220 and up, the first window of each | documents 0 to 219 |
| instructions | `alpaca_en_demo.json` | rows 899 and up, as chats | rows 0 to 898 |

No arm trains on text that is measured. `broad` rows, the default, are web text and instructions in equal parts, so the
encyclopedia is a domain that they have not seen; arms that train on its other articles are labelled.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

from heal_speed import prepared  # in the folder of `heal_quality.py`

if TYPE_CHECKING:
    import torch

DOMAINS = ("encyclopedia", "web", "instructions")
WIKITEXT, C4, ALPACA = "wikitext2-valid.txt", "c4_sample.jsonl", "alpaca_en_demo.json"
_MEASURED_CHARACTERS, _FIRST_OTHER_CHARACTER = 120_000, 160_000
_FIRST_MEASURED_DOCUMENT, _FIRST_MEASURED_ROW = 220, 899
_LONGEST = 1 << 20


def held_out(data: Path, tokenizer: Any, count: int, length: int) -> dict[str, torch.Tensor]:
    """The windows that are measured, `[count, length]` for each domain, spread evenly over its text."""
    import torch

    ids = tokenizer((data / WIKITEXT).read_text()[:_MEASURED_CHARACTERS], verbose=False).input_ids
    chats = [token for row in _chats(data, tokenizer)[_FIRST_MEASURED_ROW:] for token in row["input_ids"]]
    pages = [page[:length] for page in _pages(data, tokenizer)[_FIRST_MEASURED_DOCUMENT:] if len(page) >= length]
    windows = {
        "encyclopedia": _split(ids, length, tokenizer),
        "web": pages,
        "instructions": _split(chats, length, tokenizer),
    }
    return {name: torch.tensor(_spread(rows, count, name)) for name, rows in windows.items()}


def training_rows(data: Path, tokenizer: Any, rows: str, count: int, length: int, seed: int) -> list[list[int]]:
    """Rows of equal length from shuffled documents.

    Args:
        data: The folder of the files.
        tokenizer: The model's.
        rows: `broad` (web and instructions in turn), `web`, `instructions` or `encyclopedia`.
        count: The most rows; there may be fewer.
        length: Tokens per row.
        seed: Determines the order of the documents.
    """
    if rows == "broad":
        both = [training_rows(data, tokenizer, part, count, length, seed) for part in ("web", "instructions")]
        return [row for pair in zip(*both, strict=False) for row in pair][:count]
    end = tokenizer.eos_token_id
    if rows == "web":
        documents = [[*page, end] for page in _pages(data, tokenizer)[:_FIRST_MEASURED_DOCUMENT]]
    elif rows == "instructions":
        documents = [row["input_ids"] for row in _chats(data, tokenizer)[:_FIRST_MEASURED_ROW]]
    elif rows == "encyclopedia":
        text = (data / WIKITEXT).read_text()[_FIRST_OTHER_CHARACTER:]
        documents = _split(tokenizer(text, verbose=False).input_ids, 4 * length, tokenizer)
    else:
        raise ValueError(f"rows={rows!r} are unknown")
    random.Random(seed).shuffle(documents)
    return _split([token for document in documents for token in document], length, tokenizer)[:count]


def instructions(data: Path, seed: int) -> list[dict[str, str]]:
    """The instructions to train on as they are in the file, shuffled."""
    rows = json.loads((data / ALPACA).read_text())[:_FIRST_MEASURED_ROW]
    random.Random(seed).shuffle(rows)
    return rows


def _chats(data: Path, tokenizer: Any) -> list[dict[str, list[int]]]:
    return prepared(tokenizer, json.loads((data / ALPACA).read_text()), _LONGEST)


def _pages(data: Path, tokenizer: Any) -> list[list[int]]:
    lines = (data / C4).read_text().splitlines()
    return [tokenizer(json.loads(line)["text"], verbose=False).input_ids for line in lines]


def _split(ids: list[int], length: int, tokenizer: Any) -> list[list[int]]:
    from hf_layerprune.runtime.windows import special_prefix, split_into_windows

    begin = special_prefix(tokenizer)
    return split_into_windows(ids[len(begin) :] if tuple(ids[: len(begin)]) == begin else ids, length, begin).tolist()


def _spread(rows: list[list[int]], count: int, name: str) -> list[list[int]]:
    if len(rows) < count:
        raise SystemExit(f"{name} has only {len(rows)} windows; give --windows {len(rows)} or --length less")
    return [rows[i * len(rows) // count] for i in range(count)]
