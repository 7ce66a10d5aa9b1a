"""Training rows that the dense model generates, and data sets whose answers it rewrites.

Rows are generated in parts, which are kept in a folder named by a hash of everything that decides them. An interrupted
run resumes, processes share the work, and the rows do not depend on the number of processes.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..calibration.self_text import fast_decoding, write_text_with
from ..errors import CheckpointError, boundary
from ..files.copy import write_text
from ..files.json_file import parse_json
from ..files.text_file import read_text
from .store import hash_tensors

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SELF = "self"
_ROWS_A_PART = 64
_ANSWERS_A_PART = 32


def write_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    count: int,
    length: int,
    seed: int,
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
) -> Dataset:
    """Generate training rows with a model.

    Every other part starts with an empty chat turn, from the chat template; the others start with the beginning of a
    plain text. The model continues from there, at temperature 1.

    Args:
        model (`PreTrainedModel`): The dense model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        folder (`Path`): Where parts are kept.
        count (`int`): Number of rows.
        length (`int`): Tokens per row.
        seed (`int`): Seed of the sampling.
        share (`tuple[int, int]`, *optional*): Rank of this process, and number of processes.
        wait (`Callable`, *optional*): Waits for the other processes.

    Returns:
        `Dataset`: `input_ids` and `labels`; every token has a label.
    """
    from datasets import Dataset

    parts = -(-count // _ROWS_A_PART)
    source = hash_tensors(model.named_parameters(), "rows", count, length, seed, str(tokenizer.chat_template))
    folder = folder / source[:16]

    def make(part: int) -> list[dict[str, Any]]:
        size = min(_ROWS_A_PART, count - part * _ROWS_A_PART)
        begins = tokenizer if part % 2 == 0 else None
        ids = write_text_with(model, begins, size, length, seed + part)
        return [{"input_ids": row} for row in ids.tolist()]

    rows = _in_parts(folder, parts, make, share, wait)
    logger.info("the dense model wrote %d rows of %d tokens to %s", count, length, folder)
    with _made_before(folder):
        return Dataset.from_list([{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows])


def rewrite_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    folder: Path,
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    share: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
) -> Dataset:
    """Replace the answers of a data set with a model's own (arXiv:2410.09982).

    Args:
        model (`PreTrainedModel`): The dense model.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        rows (`Dataset`): With `prompt` and `completion`, text or messages.
        folder (`Path`): Where parts are kept.
        max_tokens (`int`): The most tokens of an answer; rows whose answer would be longer are left out.
        temperature (`float`): Sampling temperature; 0 for greedy decoding.
        seed (`int`): Seed of the sampling.
        share (`tuple[int, int]`, *optional*): Rank of this process, and number of processes.
        wait (`Callable`, *optional*): Waits for the other processes.

    Returns:
        `Dataset`: With `prompt` and `completion`.

    Raises:
        CheckpointError: The rows have no prompts, or no answer ended within `max_tokens`.
    """
    from datasets import Dataset

    if not {"prompt", "completion"} <= set(rows.column_names):
        raise CheckpointError(
            f"rewriting answers needs rows with prompt and completion, but these have {', '.join(rows.column_names)}"
        )
    with boundary("can't make prompts of the rows"):
        prompts = [_prompt_ids(tokenizer, row["prompt"]) for row in rows]
    # Batch prompts of similar length, to keep padding low.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    settings = ("answers", prompts, max_tokens, temperature, seed)
    folder = folder / hash_tensors(model.named_parameters(), *settings)[:16]

    def make(part: int) -> list[dict[str, Any]]:
        chosen = order[part * _ANSWERS_A_PART : (part + 1) * _ANSWERS_A_PART]
        torch.manual_seed(seed + part)
        answers = _answers(model, tokenizer, [prompts[i] for i in chosen], max_tokens, temperature)
        return [{"row": i, "answer": answer} for i, answer in zip(chosen, answers, strict=True)]

    entries = _in_parts(folder, -(-len(order) // _ANSWERS_A_PART), make, share, wait)
    with _made_before(folder):
        answers = {int(entry["row"]): str(entry["answer"]) for entry in entries if entry["answer"]}
    if not answers:
        raise CheckpointError(f"no answer of the dense model ends within {max_tokens} tokens; allow longer answers")
    if len(answers) < len(rows):
        logger.warning(
            "%d of %d rows are left out, because their answer would be longer than %d tokens",
            len(rows) - len(answers),
            len(rows),
            max_tokens,
        )
    shaped = []
    with _made_before(folder):
        for i, answer in sorted(answers.items()):
            row = rows[i]
            plain = isinstance(row["prompt"], str)
            completion = answer if plain else [{"role": "assistant", "content": answer}]
            shaped.append({"prompt": row["prompt"], "completion": completion})
    return Dataset.from_list(shaped)


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict[str, Any]]) -> list[int]:
    if isinstance(prompt, str):
        return tokenizer(prompt).input_ids
    chat: Any = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)
    return chat.input_ids


@torch.no_grad()
def _answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_tokens: int,
    temperature: float,
) -> list[str]:
    """One answer for each prompt; empty if it did not end within `max_tokens`."""
    longest = max(map(len, prompts))
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    ids = torch.tensor([[padding] * (longest - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
    settings = {"max_new_tokens": max_tokens, "pad_token_id": padding, "do_sample": False} | sampling
    with fast_decoding(model):
        generate: Any = model.generate
        made = generate(ids, attention_mask=mask, **settings)
    ends = model.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends or [tokenizer.eos_token_id])
    answers = []
    for row in made[:, longest:].tolist():
        ended = next((i for i, token in enumerate(row) if token in ends), None)
        answers.append("" if ended is None else str(tokenizer.decode(row[:ended], skip_special_tokens=True)).strip())
    return answers


def _in_parts(
    folder: Path,
    parts: int,
    make: Callable[[int], list[dict[str, Any]]],
    share: tuple[int, int],
    wait: Callable[[], None],
) -> list[dict[str, Any]]:
    """Make the missing parts, and read all parts."""
    from tqdm.auto import tqdm

    rank, world = share
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"part-{part:05d}-of-{parts:05d}.jsonl" for part in range(parts)]
    mine = [part for part in range(rank, parts, world) if not paths[part].is_file()]
    for part in tqdm(mine, desc="The dense model writes", unit="part", disable=None if rank == 0 else True):
        write_text(paths[part], "".join(json.dumps(row) + "\n" for row in make(part)))
    wait()
    return [row for path in paths for row in _read(path)]


def _read(path: Path) -> list[Any]:
    """The rows of a part, which may come from an earlier run."""
    return [parse_json(line, str(path)) for line in read_text(path).splitlines()]


def _made_before(folder: Path) -> AbstractContextManager[None]:
    return boundary(f"can't use the rows in {folder}", "remove it, and they are written again")
