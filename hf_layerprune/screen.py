"""Output on the terminal: one kind of progress bar, this package's messages, and none of the libraries' own.

The bars are those of the Hub client, as the `hf` command shows them: on a terminal only, gone when the work is done, and
off where the Hub's are off (`HF_HUB_DISABLE_PROGRESS_BARS`, `huggingface_hub.utils.disable_progress_bars`).
"""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from typing import TYPE_CHECKING, Any

from .errors import mask_secrets, sanitize

if TYPE_CHECKING:
    from huggingface_hub.utils import tqdm

# Off unless the user has set them: bars of libraries that don't look where they are shown (loading weights, unpacking
# GGUF files, tokenizing), and what libraries tell their developers.
_QUIET_DEFAULTS = {"TQDM_DISABLE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}


def configure_output(*, quiet: bool = False) -> None:
    """Configure what this process and its children show; for commands, before libraries are imported.

    With `quiet`, only errors are shown: no progress bars, no remarks.
    """
    for name, value in _QUIET_DEFAULTS.items():
        os.environ.setdefault(name, value)
    if quiet:
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as some schedulers do
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that can't show a character must not lose the result
        sys.stdout.reconfigure(errors="backslashreplace")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    logging.setLogRecordFactory(_MaskedRecord)
    logging.basicConfig(level=logging.ERROR, format="%(message)s", handlers=[_ScreenHandler()])
    logging.getLogger("hf_layerprune").setLevel(logging.ERROR if quiet else logging.INFO)
    # Torch, which has a handler of its own, tells torchao's users here that one of torchao's calls is deprecated.
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


def progress_bar(*args: Any, **words: Any) -> tqdm:
    """A progress bar, with the arguments of `tqdm`. `disable=True` turns it off, as in all processes but one."""
    from huggingface_hub.utils import tqdm

    return tqdm(*args, **{"disable": None, "leave": False} | words)


class _MaskedRecord(logging.LogRecord):
    """A line of any library's log, in which secrets are masked, such as the address of a mirror with a password."""

    def getMessage(self) -> str:
        return mask_secrets(super().getMessage())


class _ScreenHandler(logging.Handler):
    """Writes each message above the progress bars, and escapes what a terminal would act on."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(sanitize(self.format(record)), file=sys.stderr)
