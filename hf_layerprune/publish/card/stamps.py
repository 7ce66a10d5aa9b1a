"""A picture that knows what it was drawn from: a digest in a text chunk of a PNG file, so that it is drawn once."""

from __future__ import annotations

from pathlib import Path

_KEY = "hf-layerprune"


def stamp(path: Path, digest: str) -> None:
    """Put a digest into a PNG file.

    Args:
        path (`Path`): The file.
        digest (`str`): What it was drawn from.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    text = PngInfo()
    text.add_text(_KEY, digest)
    with Image.open(path) as picture:
        picture.save(path, pnginfo=text, dpi=picture.info.get("dpi"), optimize=True)


def stamped(path: Path) -> str | None:
    """The digest that a PNG file holds.

    Args:
        path (`Path`): The file, which need not exist.

    Returns:
        `str`, *optional*: `None` where it holds none.
    """
    try:
        from PIL import Image

        with Image.open(path, formats=["PNG"]) as picture:
            return picture.info.get(_KEY)
    except Exception:  # not there, not a picture, or not one that Pillow opens; or there is no Pillow
        return None
