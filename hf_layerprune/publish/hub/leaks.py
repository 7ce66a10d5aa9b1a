"""Finds what must not be published: secrets in any file, and paths that reveal the user's folders.

The patterns of `detect-secrets` for known formats, and a few that it lacks, are run over every file. Files that are
published only because the user named them are also scanned by its other detectors: keywords next to a value, and
strings that look random. In files of a known structure, these would report every hash in the records and much of a
vocabulary.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ...records.fingerprints import WEIGHTS

_MAX_HEADER = 100_000_000  # bytes; the format's limit for a safetensors header
# Larger files are unlikely to be written by hand, and scanning them line by line takes long.
_MAX_LINES = 16 << 20
# Formats that detect-secrets 1.5 does not know.
_EXTRA_PATTERNS = {
    "Hugging Face Token": r"(?<![A-Za-z0-9])(?:hf|api_org)_[A-Za-z0-9]{30,64}(?![A-Za-z0-9])",
    "GitHub Token": r"(?<![A-Za-z0-9])github_pat_[A-Za-z0-9_]{60,255}",
    "Google API Key": r"(?<![A-Za-z0-9])AIza[0-9A-Za-z_-]{35}",
    "OpenAI or Anthropic Key": r"(?<![A-Za-z0-9])sk-(?:proj-|ant-|svcacct-)?[A-Za-z0-9_-]{32,}",
    "Slack Token": r"(?<![A-Za-z0-9])xox[abeprs]-[A-Za-z0-9-]{20,}",
    "Weights & Biases Key": r"(?i)wandb[\w .\"':=-]{0,24}(?<![0-9a-z])[0-9a-f]{40}(?![0-9a-z])",
    "Kaggle Key": r"[\"']key[\"']\s*:\s*[\"'][0-9a-f]{32}[\"']",
    "Bearer Token": r"(?i)authorization[\"']?\s*[:=]\s*[\"']?bearer\s+[A-Za-z0-9._~+/-]{20,}",
}
# Patterns that match too much ordinary text, and IP addresses, which are not secrets.
_IGNORED_PATTERNS = {"Artifactory Credentials", "Public IP (ipv4)"}
# Escape sequences of JSON and most programming languages; a secret may begin right after one.
_ESCAPE = re.compile(r"\\+(?:u([0-9a-fA-F]{4})|[nrtbf])")
_PATHS = re.compile(r"(?:/home/|/Users/|/root/|[A-Za-z]:\\{1,2}Users\\{1,2})[\w.@-]+")


@dataclass(frozen=True)
class Leak:
    """Something that should not be published, and where: a kind of secret, never the secret itself; or a path."""

    file: str
    line: int
    what: str


def find_secrets(folder: Path, files: Iterable[str], named: Collection[str] = ()) -> Iterator[Leak]:
    """Find the lines with secrets in files of a folder; of safetensors files, only the header is searched.

    `named` are the files that are published only because the user named them.
    """
    for name in files:
        leaks = [*_find_known_formats(folder / name), *(_run_all_detectors(folder / name) if name in named else ())]
        yield from (Leak(name, line, what) for line, what in dict.fromkeys(leaks))


def find_paths(folder: Path, files: Iterable[str]) -> Iterator[Leak]:
    """Find paths into a home folder; yields the first one of each file."""
    for name in files:
        text = _searchable_text(folder / name)
        if match := _PATHS.search(text):
            yield Leak(name, _line_number(text, match), f"the path {match[0]}")


def _find_known_formats(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that match a known format."""
    text = _searchable_text(path)
    for what, pattern in _patterns():
        for match in pattern.finditer(text):
            yield _line_number(text, match), what


def _line_number(text: str, match: re.Match[str]) -> int:
    return text.count("\n", 0, match.start()) + 1


@cache
def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    """The patterns of all known formats, with their names."""
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.plugins.base import RegexBasedDetector

    known: dict[str, Any] = get_mapping_from_secret_type_to_class()
    plugins = {name: plugin for name, plugin in known.items() if name not in _IGNORED_PATTERNS}
    theirs = [
        (name, pattern)
        for name, plugin in plugins.items() if issubclass(plugin, RegexBasedDetector)
        for pattern in plugin().denylist
    ]  # fmt: skip
    return theirs + [(name, re.compile(pattern)) for name, pattern in _EXTRA_PATTERNS.items()]


def _run_all_detectors(path: Path) -> Iterator[tuple[int, str]]:
    """Lines in which any detector of detect-secrets finds something."""
    if path.stat().st_size > _MAX_LINES:
        return
    from detect_secrets.core.scan import scan_file
    from detect_secrets.settings import default_settings

    with tempfile.TemporaryDirectory() as place, default_settings():
        copy = Path(place, f"file{path.suffix}")
        copy.write_text(_searchable_text(path), encoding="utf-8")
        for secret in scan_file(str(copy)):
            if secret.type not in _IGNORED_PATTERNS:
                yield secret.line_number, secret.type


def _searchable_text(path: Path) -> str:
    """A file as text, with escape sequences replaced: of a safetensors file its header, of other weights and pictures
    nothing. Zero bytes are removed, so that ASCII in UTF-16 and UTF-32 can be read too.
    """
    with path.open("rb") as file:
        size, suffix = -1, path.suffix.lower()
        if suffix == ".safetensors":
            size = min(_MAX_HEADER, int.from_bytes(file.read(8), "little"))
        elif suffix in (*WEIGHTS, ".png"):
            size = 0
        text = file.read(size).replace(b"\0", b"").decode(errors="replace")
    return _ESCAPE.sub(_unescape, text)


def _unescape(match: re.Match[str]) -> str:
    character = chr(int(match[1], 16)) if match[1] else " "
    return " " if character == "\n" else character  # keeps the line numbers
