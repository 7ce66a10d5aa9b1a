"""What must not leave the machine: tokens in any text file, and paths that tell of somebody's disk."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 1 << 20
# As long as the longest thing that is looked for: so much of a chunk is looked at again with the next one.
_OVERLAP = 512
# What it is, letters that every one of them has (which are looked for first), and what it looks like.
_TOKENS: list[tuple[str, tuple[bytes, ...], re.Pattern[bytes]]] = [
    ("a Hugging Face token", (b"hf_", b"api_org_"), re.compile(rb"\b(?:hf|api_org)_[A-Za-z0-9]{30,64}\b")),
    ("a GitHub token", (b"gh", b"github_pat_"),
     re.compile(rb"\b(?:gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{60,255})\b")),
    ("an AWS key", (b"AKIA", b"ASIA"), re.compile(rb"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b")),
    ("a Google API key", (b"AIza",), re.compile(rb"\bAIza[0-9A-Za-z_-]{35}\b")),
    ("an OpenAI or Anthropic key", (b"sk-",), re.compile(rb"\bsk-(?:proj-|ant-|svcacct-)?[A-Za-z0-9_-]{32,}")),
    ("a Slack token", (b"xox",), re.compile(rb"\bxox[abeprs]-[A-Za-z0-9-]{20,}")),
    ("a Weights & Biases key", (b"wandb", b"WANDB"),
     re.compile(rb"(?:wandb|WANDB)[\w .\"':=-]{0,24}\b[0-9a-f]{40}\b")),
    ("a private key", (b"PRIVATE KEY",), re.compile(rb"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----")),
    ("a bearer token", (b"earer ",),
     re.compile(rb"(?i)authorization[\"']?\s*[:=]\s*[\"']?bearer\s+[A-Za-z0-9._~+/-]{20,}")),
    ("a password in an address", (b"http",),
     re.compile(rb"\bhttps?://[^\s/:@\"']{1,80}:[^\s/@\"']{3,80}@[\w.-]+")),
]  # fmt: skip
_PATHS = re.compile(rb"(?:/home/|/Users/|/root/|[A-Za-z]:\\{1,2}Users\\{1,2})[\w.@-]+")


@dataclass(frozen=True)
class Leak:
    """Something that was found.

    Args:
        file (`Path`): Where.
        line (`int`): In which line.
        what (`str`): What it looks like; never the thing itself.
    """

    file: Path
    line: int
    what: str


def find_tokens(files: Iterable[Path]) -> Iterator[Leak]:
    """Look for tokens in text files.

    Args:
        files (`Iterable[Path]`): The files; those that are no text are passed over.

    Yields:
        `Leak`: Each token that is found.
    """
    for path in files:
        seen: set[tuple[int, str]] = set()
        for start_line, chunk in _chunks(path):
            for what, letters, pattern in _TOKENS:
                if not any(some in chunk for some in letters):
                    continue
                for match in pattern.finditer(chunk):
                    line = start_line + chunk.count(b"\n", 0, match.start())
                    if (line, what) not in seen:
                        seen.add((line, what))
                        yield Leak(path, line, what)


def find_paths(files: Iterable[Path]) -> Iterator[Leak]:
    """Look for paths into somebody's home folder, one a file.

    Args:
        files (`Iterable[Path]`): The files; those that are no text are passed over.

    Yields:
        `Leak`: The first path of each file.
    """
    for path in files:
        for start_line, chunk in _chunks(path):
            if match := _PATHS.search(chunk):
                found = match[0].decode(errors="replace")
                yield Leak(path, start_line + chunk.count(b"\n", 0, match.start()), f"the path {found}")
                break


def is_text(path: Path) -> bool:
    """Whether the start of a file has no byte that text never has."""
    with path.open("rb") as file:
        return b"\0" not in file.read(8192)


def _chunks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Stretches of a text file with the number of their first line; each begins with the end of the one before."""
    if not is_text(path):
        return
    line, before = 1, b""
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            chunk = before + data
            yield line, chunk
            before = chunk[-_OVERLAP:]
            line += chunk.count(b"\n", 0, len(chunk) - len(before))
