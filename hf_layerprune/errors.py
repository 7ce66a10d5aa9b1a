"""Errors for a user's mistakes, and the conversion of exceptions that libraries raise.

Every `LayerPruneError` is a `ValueError` whose message says in one line what is wrong, where, and how to fix it. Code
that calls a library on user input (a config, a tokenizer, weights, the Hub, training) does so inside `boundary`, which
turns any exception of the library into a `LayerPruneError`.
"""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Control characters, characters that reorder or hide text (such as U+202E), and unpaired surrogates.
_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    r"\U000e0000-\U000e0fff]"
)
# Hub tokens, which must not appear in any message.
_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{20,}")
# A password in an address, such as that of a mirror of the Hub (HF_ENDPOINT); a path has one of the two slashes.
_PASSWORD = re.compile(r"(?<=:/)(/?)[^/\s@]{1,300}@")
# The secrets in an address that anybody may read or write with, as those to which the Hub redirects uploads and downloads.
# Some libraries quote its path alone.
_SIGNED = re.compile(r"([?&#][\w.;-]{0,50}(?:signature|sig|policy|credential|token|key|secret)=)[^\s&'\")>]+", re.I)
_MAX_MESSAGE = 300  # characters to keep of a library's message
# Exceptions whose message is clear without the class name.
_PLAIN = (OSError, ValueError, RuntimeError, ImportError)
# What torch says of a file that it could not write, as on a full disk: the system's error is lost in its writer.
_TRUNCATED = re.compile(r"inline_container\S* \. unexpected pos|PytorchStreamWriter failed writing|basic_ios::clear")
# The package of a file of installed code; this one may be installed, too.
_PACKAGE = re.compile(r"[\\/]site-packages[\\/](?!hf_layerprune)(\w+)")
DEBUG = "HF_LAYERPRUNE_DEBUG"
_FORCE = "force=True"


class LayerPruneError(ValueError):
    """Base class of all errors of this package.

    Args:
        message (`str`): One line; control characters are escaped.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class UnsupportedModelError(LayerPruneError):
    """The model's architecture is not proven to survive a cut, or can't be ranked, repaired, healed or evaluated."""


class CutError(LayerPruneError):
    """These layers can't be dropped from this model, or an option or a combination of options is not accepted."""


class CheckpointError(LayerPruneError):
    """A file, a folder or a repository is missing, damaged, or not of the expected kind."""


class ExistingOutputError(CheckpointError):
    """The output exists already. The message may advise `force=True`, which a command shows as its own option."""


@contextmanager
def boundary(what: str, hint: str = "", kind: type[LayerPruneError] = CheckpointError) -> Iterator[None]:
    """Turn any exception of a library into a one-line error with its cause.

    Args:
        what (`str`): The action that failed, such as `"can't load the tokenizer of org/model"`.
        hint (`str`, *optional*): How to fix it; appended after the cause, unless a package or memory is missing.
        kind (`type[LayerPruneError]`, defaults to `CheckpointError`): The error class to raise.

    Raises:
        LayerPruneError: The block raised an exception, which becomes the `__cause__`. Errors of this package are passed
            on unchanged.
    """
    try:
        yield
    except LayerPruneError:
        raise
    except BaseException as error:
        # A panic in a Rust library such as tokenizers is not an `Exception`.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if hint and isinstance(error, ImportError):  # no file or setting is wrong
            hint = "" if "pip install" in str(error) else "install the package that is missing"
        elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # nor here
            hint = "run it where more memory is free"
        raise kind(f"{what}: {cause_of(error, what)}{f'; {hint}' if hint else ''}") from error


def cause_of(error: BaseException, what: str = "") -> str:
    """The message of an exception on one line of limited length, with the class name if it adds information.

    A file that `what` names is not named again.
    """
    for one in (error, error.__cause__):
        if isinstance(one, UnicodeEncodeError) and one.object.startswith("Bearer "):  # the header of a request
            return "the Hub token has characters that no token has; copy it again, and set HF_TOKEN or run `hf auth login`"
    text = one_line(_system_message(error, what) or str(error))
    if text.startswith("We couldn't connect to"):  # transformers', which takes a mistyped folder for a Hub id, too
        return "it is not in the cache, and the Hub can't be reached; go online, or specify a folder"
    if _TRUNCATED.search(text):
        return "a checkpoint could not be written whole; free some space on its disk, or write elsewhere"
    if not text and isinstance(error, AssertionError) and (frames := traceback.extract_tb(error.__traceback__)):
        text = one_line(frames[-1].line or "")  # what was asserted
    if not text or not isinstance(error, _PLAIN):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if "above report" in text and os.environ.get("TRANSFORMERS_VERBOSITY") == "error":  # transformers' own, silenced
        text = f"{text.rstrip('!')}, which TRANSFORMERS_VERBOSITY=warning shows"
    return text if len(text) <= _MAX_MESSAGE else text[: _MAX_MESSAGE - 3] + "..."


def _system_message(error: BaseException, what: str = "") -> str | None:
    """What the system says of a file, without the number and the quotes of Python's message; `None` for other errors."""
    if not isinstance(error, OSError):
        return None
    if not isinstance(error.errno, int):  # not the system's own
        # As safetensors raises it, also for a file that may not be read.
        path = str(error).removeprefix("No such file or directory: ")
        return f"{path}: Permission denied" if path != str(error) and os.path.exists(path) else None
    reason, file = error.strerror, error.filename
    named = isinstance(file, str | bytes) and os.fsdecode(file) not in what
    return f"{os.fsdecode(file)}: {reason}" if named else reason


def explain(
    error: BaseException, debug: str = f"{DEBUG}=1", spell: Callable[[str], str] = lambda message: message
) -> tuple[str, int]:
    """The message and the exit code for an exception that ended a command.

    The code is 2 for wrong usage, 130 for an interrupt, and otherwise 1. `debug` is what makes the command show a traceback.
    `spell` names the options in a message as the command does.
    """
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; nothing was left half-written", 130
    if isinstance(error, LayerPruneError | OSError):
        text = _system_message(error) or str(error)
        # Others quote files and libraries, in which the name of an option means something else.
        text = spell(text) if isinstance(error, CutError | UnsupportedModelError) else text
        if isinstance(error, ExistingOutputError):  # whose path may be the name of an option
            text = text.replace(_FORCE, spell(_FORCE))
        return one_line(text), 2 if isinstance(error, CutError) else 1
    if isinstance(error, ImportError) and "pip install" in str(error):  # as transformers asks for what a model needs
        return cause_of(error), 1
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # `Path.expanduser`
        return "a path starts with ~ and the name of a user who does not exist; write it in full", 1
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, without torch
        return (
            "out of memory; use smaller batches or fewer or shorter texts, or run on the CPU or on a machine with more memory",
            1,
        )
    frames = traceback.extract_tb(error.__traceback__)
    package = _PACKAGE.search(frames[-1].filename) if frames else None
    where = f" in {package[1]}" if package else ""
    return f"internal error{where}: {cause_of(error)}; {debug} shows where it came from", 1


def wants_traceback() -> bool:
    """Whether the environment asks for the traceback of an error."""
    return os.environ.get(DEBUG, "0") not in ("", "0")


def one_line(text: str) -> str:
    """Collapse white space and escape control characters."""
    return sanitize(" ".join(text.split()))


def sanitize(text: str) -> str:
    """Escape control characters other than line ends, and mask secrets."""
    return "\n".join(_UNPRINTABLE.sub(_escape, line) for line in mask_secrets(text).split("\n"))


def mask_secrets(text: str) -> str:
    """Mask Hub tokens, passwords in addresses, and the signatures of signed addresses."""
    return _SIGNED.sub(r"\1***", _PASSWORD.sub(r"\1***@", _TOKEN.sub(r"\1_***", text)))


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
