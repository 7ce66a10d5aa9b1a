"""What a folder holds, to compare with another folder or with the same one later."""

from pathlib import Path


def snapshot(folder: Path) -> dict[str, bytes]:
    """The content of every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
