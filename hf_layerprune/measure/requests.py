"""The options of `eval` and `bench`. This module does not import torch."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from ..errors import CutError
from ..options import ANY_MODEL_HELP, DTYPES, MODEL, PATH, Kind, Options, documented, integer, option, tuple_of
from ..records.requirements import RequireOptions

DEFAULT_LENGTH = 1024  # tokens in a window of text


def _check_names(value: Any) -> tuple[str, ...]:
    if isinstance(value, str) or not all(isinstance(name, str) and name for name in value):
        raise ValueError("must be a list of names")
    names = tuple(value)
    return () if names == ("none",) else names


def _parse_names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _number_or(word: str, meaning: Any) -> Kind:
    """A number of at least 1, or a word with a special meaning."""
    number = integer(1)

    def check(value: Any) -> Any:
        if value in (word, meaning):
            return meaning
        try:
            return number.check(value)
        except ValueError as error:
            raise ValueError(f"{error}, or {word}") from None

    return Kind(lambda text: text if text == word else int(text), check, "N")


@dataclass(kw_only=True)
class MeasureOptions(Options):
    """How a model is loaded, and where its numbers go."""

    dtype: str = option("auto", "Data type of the weights; auto keeps the checkpoint's", choices=DTYPES)
    device: str = option(
        "auto", "Device: cpu, cuda, cuda:1, mps, all (GPUs), or auto, which uses a GPU if there is one"
    )
    revision: str | None = option(None, "Branch, tag or commit of MODEL on the Hub", revision_of="model")
    base_revision: str | None = option(None, "Branch, tag or commit of BASE on the Hub", revision_of="base")
    output: Path | None = option(None, "File for the numbers; by default metrics.json in the model's folder", PATH)
    history: tuple[Path, ...] = option(
        (),
        "Folder of an earlier stage of MODEL, whose numbers are copied for the card; can be repeated",
        tuple_of(PATH),
    )
    force: bool = option(False, "Replace numbers that belong to other weights")

    def check_combination(self) -> None:
        """Refuse the revision of a base that is not specified."""
        if self.base_revision is not None and getattr(self, "base", None) is None:
            raise CutError("base_revision needs base=...; add it, or leave the revision out")


@documented
@dataclass
class EvalRequest(MeasureOptions, RequireOptions):
    """What to measure, and how."""

    model: str = option(MISSING, ANY_MODEL_HELP, MODEL)
    base: str | None = option(None, "Dense model to compare with", MODEL)
    tasks: tuple[str, ...] | None = option(
        None,
        "Tasks of lm-evaluation-harness or of --tasks-from, separated by commas; paper means the eight of arXiv:2411.15558, "
        "and none means no tasks. By default all of --tasks-from, or paper if neither that nor --text is given",
        Kind(_parse_names, _check_names, "T,T"),
    )
    tasks_from: Path | None = option(
        None,
        "Folder with tasks (NAME.jsonl, one {query, choices, gold} or {query, answer, image} per line) and texts "
        "(NAME.txt)",
        PATH,
    )
    texts: tuple[str, ...] | None = option(
        None,
        "Text to measure perplexity on: a file, wikitext2, or none; can be repeated. By default those of --tasks-from, or "
        "wikitext2 if neither that nor --tasks is given",
        tuple_of(Kind(str, lambda value: value, "FILE"), _check_names),
        flag="text",
    )
    limit: int | None = option(
        None, "Number of questions per task, starting with the first; by default all", integer(1)
    )
    num_fewshot: int | None = option(
        None, "Number of few-shot examples before each question; by default the task's own", integer(0, 1000)
    )
    batch_size: int | str = option(
        "auto",
        "Number of answers to score together; auto depends on the device, and is halved when memory runs out",
        _number_or("auto", "auto"),
    )
    length: int | None = option(
        None,
        f"Number of tokens in each window of a text; by default {DEFAULT_LENGTH}, or fewer if the model's context is shorter",
        integer(2),
    )
    windows: int | None = option(
        64, "Number of windows to measure, from the start of each text, or all", _number_or("all", None)
    )
    answers: Path | None = option(None, "Folder to store answers in, from which an interrupted run resumes", PATH)


# What a model can be timed in.
ENGINES = ("transformers", "vllm", "llama.cpp")


@dataclass(frozen=True)
class Workload:
    """One batch of prompts to time a model with: how many, their tokens, and the tokens to generate after each."""

    batch: int
    prompt_tokens: int
    new_tokens: int


@documented
@dataclass
class BenchRequest(MeasureOptions):
    """What to measure, and how."""

    model: str = option(MISSING, ANY_MODEL_HELP, MODEL)
    base: str | None = option(None, "Dense model to compare with; the two are timed in alternation", MODEL)
    batch_sizes: tuple[int, ...] = option(
        (1, 4), "Batch sizes, separated by commas", tuple_of(integer(1), separator=",")
    )
    prompt_lengths: tuple[int, ...] = option(
        (64, 512), "Prompt lengths in tokens, separated by commas", tuple_of(integer(1), separator=",")
    )
    new_tokens: int = option(32, "Number of tokens to generate after each prompt", integer(1))
    repeats: int = option(5, "Number of timed runs of each workload", integer(1, 1000))
    load_repeats: int = option(
        3,
        "Number of times to load the model, each in a new process; 0 skips load time and peak memory",
        integer(0, 100),
    )
    engine: str = option(
        "transformers",
        "Engine that runs the model: transformers; vllm, which must be installed in this environment; or llama.cpp, whose "
        "llama-bench must be on the PATH and takes one prompt at a time. Size, memory and load time are measured in "
        "transformers only",
        choices=ENGINES,
    )
    gguf: tuple[Path, ...] = option(
        (),
        "For --engine llama.cpp: GGUF file made from MODEL; with --base, repeat the option for the one made from BASE",
        tuple_of(PATH),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gguf:
            return
        if self.engine != "llama.cpp":
            raise CutError('gguf=... names what llama.cpp runs; add engine="llama.cpp"')
        if len(self.gguf) != 1 + (self.base is not None):
            wanted = "two files, of MODEL and of BASE" if self.base is not None else "one file, of MODEL"
            raise CutError(f"gguf=... needs {wanted}, and got {len(self.gguf)}")

    @property
    def workloads(self) -> list[Workload]:
        """What is timed."""
        return [
            Workload(batch, length, self.new_tokens) for batch in self.batch_sizes for length in self.prompt_lengths
        ]
