"""Digests in PNG files: a text chunk names the data of a plot, so that it is redrawn only when they change."""

from __future__ import annotations

from pathlib import Path

_KEY = "hf-layerprune"


def stamp(path: Path, digest: str) -> None:
    """Put a digest into a PNG file.

    Args:
        path (`Path`): The file.
        digest (`str`): The digest of the data it was drawn from.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text(_KEY, digest)
    with Image.open(path) as picture:
        picture.save(path, pnginfo=text, dpi=picture.info.get("dpi"), optimize=True)


def stamped(path: Path) -> str | None:
    """Read the digest from a PNG file.

    Args:
        path (`Path`): The file, which need not exist.

    Returns:
        `str`, *optional*: The digest; `None` if there is none.
    """
    try:
        from PIL import Image

        with Image.open(path, formats=["PNG"]) as picture:
            return picture.info.get(_KEY)
    except Exception:  # missing, not a readable picture, or Pillow is not installed
        return None
