"""What a user can do wrong, and what is done with an exception that a library raises.

Every `LayerPruneError` is a `ValueError` with one line that says what, where, and the way out. Code that calls into a
library at an edge of the package (a config, a tokenizer, weights, the Hub, training) does so inside `boundary`, which
turns whatever the library raises into one of these.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

# Control characters, those that reorder text or hide in it (such as U+202E), and halves of surrogate pairs.
_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff"
    r"\U000e0000-\U000e0fff]"
)
# A token of the Hub, which no message may repeat.
_TOKEN = re.compile(r"\b(hf|api_org)_[A-Za-z0-9]{20,}")
_MOST = 300  # characters of a library's message that are repeated
# Kinds whose message says enough without the kind's name.
_PLAIN = (OSError, ValueError, RuntimeError, ImportError)


class LayerPruneError(ValueError):
    """Base class: anything this package refuses.

    Args:
        message (`str`): One line; characters that a terminal would act on are escaped.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(one_line(str(message)))


class UnsupportedModelError(LayerPruneError):
    """The model's architecture is not one that is proven to survive a cut."""


class CutError(LayerPruneError):
    """This set of layers cannot be dropped from this model."""


class CheckpointError(LayerPruneError):
    """A file or folder is missing, damaged, or not what it says it is."""


@contextmanager
def boundary(what: str, hint: str = "", kind: type[LayerPruneError] = CheckpointError) -> Iterator[None]:
    """Turn whatever a library raises into one line with its cause.

    Args:
        what (`str`): What could not be done, such as `"can't load the tokenizer of org/model"`.
        hint (`str`, *optional*): The way out, after the cause.
        kind (`type[LayerPruneError]`, defaults to `CheckpointError`): What is raised.

    Raises:
        LayerPruneError: The block raised; the library's exception is its `__cause__`. An error of this package passes
            unchanged.
    """
    try:
        yield
    except LayerPruneError:
        raise
    except Exception as error:
        raise kind(f"{what}: {cause_of(error)}{f'; {hint}' if hint else ''}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # how a Rust library, such as tokenizers, gives up
            raise
        raise kind(f"{what}: {cause_of(error)}{f'; {hint}' if hint else ''}") from error


def cause_of(error: BaseException) -> str:
    """What an exception says, on one line of bounded length, with its kind where the message alone may mislead."""
    text = one_line(str(error))
    if not text or not isinstance(error, _PLAIN):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= _MOST else text[: _MOST - 3] + "..."


def one_line(text: str) -> str:
    """A text with runs of white space as single spaces, and with unprintable characters escaped."""
    return shown(" ".join(text.split()))


def shown(text: str) -> str:
    """A text with every character escaped that a terminal would act on rather than show, and without tokens of the
    Hub; line ends stay.
    """
    text = _TOKEN.sub(r"\1_***", text)
    return "\n".join(_UNPRINTABLE.sub(_escape, line) for line in text.split("\n"))


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")
