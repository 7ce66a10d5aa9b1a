"""GGUF files for llama.cpp: a folder through llama.cpp's own converter, and a converted base cut as a file."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from . import models
from .environments import HOME, ROOT, llama_cpp_tools, python_of

# The converter knows a SentencePiece model, or a vocabulary by its hash; SmolLM2's is none of these families' own.
_SENTENCEPIECE = ("gemma2", "phi3", "qwen2")
_TRAIN = (
    "import sys, sentencepiece as s; s.SentencePieceTrainer.train(input=sys.argv[1], model_prefix=sys.argv[2], "
    "vocab_size=400, model_type='bpe', byte_fallback=True, minloglevel=2)"
)


class CannotConvert(Exception):
    """A folder that the converter does not take, or a file that we refuse to cut; the message is one line."""


def converted(name: str, which: str) -> Path:
    """Convert a model's folder to a float32 GGUF file.

    Args:
        name (`str`): The model.
        which (`str`): `"dense"` or `"cut"`.

    Returns:
        `Path`: The file.

    Raises:
        CannotConvert: With the converter's last line.
    """
    folder = models.make(name)[which]
    target = folder.parent / f"{which}.gguf"
    if target.is_file():
        return target
    (converter,) = (HOME / "llama.cpp" / "sources").glob("*/vendor/llama.cpp/convert_hf_to_gguf.py")
    (packages,) = (HOME / "llama.cpp" / "lib").glob("python*/site-packages")
    partial = target.with_suffix(".part")
    command = [sys.executable, str(converter), str(folder), "--outfile", str(partial), "--outtype", "f32"]
    with _taken_by_the_converter(name, folder):
        env = os.environ | {"PYTHONPATH": str(packages)}
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise CannotConvert((done.stderr.strip().splitlines() or ["no message"])[-1])
    return partial.rename(target)


def quantised(name: str, which: str, kind: str) -> Path:
    """Quantise a converted model with `llama-quantize`.

    Args:
        name (`str`): The model.
        which (`str`): `"dense"` or `"cut"`.
        kind (`str`): As the program names it, or `"f32"` for the converted file itself.

    Returns:
        `Path`: The file.

    Raises:
        CannotConvert: With the last line of the converter or of the program.
    """
    source = converted(name, which)
    target = source.with_name(f"{which}-{kind}.gguf")
    if kind == "f32" or target.is_file():
        return source if kind == "f32" else target
    partial = target.with_suffix(".part")
    command = [str(llama_cpp_tools() / "llama-quantize"), str(source), str(partial), kind, "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CannotConvert((done.stderr.strip().splitlines() or ["no message"])[-1])
    return partial.rename(target)


@contextmanager
def _taken_by_the_converter(name: str, folder: Path) -> Iterator[None]:
    """The folder, for as long as it is converted with a tokenizer that the converter knows."""
    if name in models.BOTH or models.FAMILIES[name].family not in _SENTENCEPIECE:
        yield
        return
    aside = [(folder / file, folder.parent / file) for file in ("tokenizer.json", "tokenizer_config.json")]
    shutil.copyfile(_sentencepiece(), folder / "tokenizer.model")
    for file, place in aside:
        file.replace(place)
    try:
        yield
    finally:
        (folder / "tokenizer.model").unlink()
        for file, place in aside:
            place.replace(file)


def cut_as_file(source: Path, target: Path, drop: str) -> Path:
    """Cut a GGUF file.

    Args:
        source (`Path`): The whole model.
        target (`Path`): The file to write.
        drop (`str`): The layers.

    Returns:
        `Path`: The target.

    Raises:
        CannotConvert: If the cut is refused.
    """
    from hf_layerprune.cut.gguf import cut_gguf
    from hf_layerprune.errors import CheckpointError
    from hf_layerprune.layer_ranges import parse_layers

    if not target.is_file():
        try:
            cut_gguf(source, target, parse_layers(drop))
        except CheckpointError as error:
            raise CannotConvert(str(error).replace(f"{source}: ", "")) from error
    return target


def _sentencepiece() -> Path:
    made = models.MODELS / "tokenizer.model"
    if not made.is_file():
        text = ROOT / "docs" / "experiments.md"
        subprocess.run([str(python_of("llama.cpp")), "-c", _TRAIN, str(text), str(made.with_suffix(""))], check=True)
    return made
