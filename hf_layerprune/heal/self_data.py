"""Training rows that the dense model generates, and data sets whose answers it rewrites.

Rows are generated in parts, which are kept in a folder named by a hash of everything that decides them. An interrupted
run resumes, processes share the work, and the rows do not depend on the number of processes.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from torch.nn.utils.rnn import pad_sequence

from ..calibration.self_text import generate_text
from ..errors import CheckpointError, CutError, boundary
from ..files.copy import write_text
from ..files.json_file import parse_json
from ..files.text_file import read_text
from ..runtime.memory import in_batches
from ..runtime.windows import max_positions
from ..screen import progress_bar
from .data import TEMPLATE_COLUMNS
from .store import hash_tensors

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

SELF = "self"
# The most rows in a part, which are written at the same time; on a GPU, a thousand take about as long as a hundred.
_ROWS_PER_PART, _ROWS_PER_PART_ON_DEVICE = 64, 1024
_ANSWERS_PER_PART = 32


@dataclass(frozen=True)
class RowWriter:
    """A dense model that writes training rows, in parts that are kept in a folder."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    seed: int

    def generate_rows(self, count: int, length: int) -> Dataset:
        """Generate training rows of `length` tokens, each with a label.

        Every other part starts with an empty chat turn, from the chat template; the others start with the beginning of
        a plain text. The model continues from there, at temperature 1.
        """
        from datasets import Dataset

        most = _ROWS_PER_PART if self.model.device.type == "cpu" else _ROWS_PER_PART_ON_DEVICE
        part_rows = math.ceil(count / (2 * math.ceil(count / (2 * most))))  # as many parts of one kind as of the other

        def make(part: int) -> list[list[int]]:
            size = min(part_rows, count - part * part_rows)
            begins = self.tokenizer if part % 2 == 0 else None
            return generate_text(self.model, begins, size, length, self.seed + part).tolist()

        settings = ("rows", count, length, str(self.tokenizer.chat_template))
        made = self._make_parts(math.ceil(count / part_rows), make, *settings)
        with self._read_errors():
            ids = [list(map(int, row)) for row in made]
            return Dataset.from_dict({"input_ids": ids, "labels": ids})

    def rewrite_answers(self, rows: Dataset, max_tokens: int, temperature: float) -> Dataset:
        """Replace the answers of a data set with the model's own (arXiv:2410.09982).

        Args:
            rows (`Dataset`): With `prompt` and `completion`, text or messages.
            max_tokens (`int`): The most tokens of an answer; rows whose answer would be longer are left out.
            temperature (`float`): Sampling temperature; 0 for greedy decoding.

        Returns:
            `Dataset`: With `prompt` and `completion`, and what the rows have for the chat template.

        Raises:
            CutError: The rows have no prompts, or none that leaves room for an answer in the model's context.
            CheckpointError: No answer ended within `max_tokens`.
        """
        if not {"prompt", "completion"} <= set(rows.column_names):
            raise CutError(
                "rewriting answers needs rows with prompt and completion, but these have "
                f"{', '.join(rows.column_names)}"
            )
        with boundary("can't make prompts of the rows"):
            prompts = [self._prompt_ids(row) for row in rows]
        context = max_positions(self.model.config)
        fitting = [i for i, ids in enumerate(prompts) if context is None or len(ids) + max_tokens <= context]
        if not fitting:
            raise CutError(
                f"no prompt leaves room for rewrite_max_tokens={max_tokens} among the {context} positions of the dense "
                "model; lower it, or use shorter prompts"
            )
        answers = self._write_answers(prompts, fitting, max_tokens, temperature)
        if not answers:
            raise CheckpointError(
                f"no answer of the dense model ends within {max_tokens} tokens; raise --rewrite_max_tokens"
            )
        if len(answers) < len(rows):
            logger.warning(
                "left out: %d of %d rows, whose answers are longer than %d tokens, or whose prompts leave no room for that",
                len(rows) - len(answers), len(rows), max_tokens,
            )  # fmt: skip
        kept = [name for name in (*TEMPLATE_COLUMNS, "prompt") if name in rows.column_names]
        are_text = isinstance(rows[0]["prompt"], str)
        completions = [text if are_text else [{"role": "assistant", "content": text}] for text in answers.values()]
        return rows.select(list(answers)).select_columns(kept).add_column("completion", completions)

    def _write_answers(
        self, prompts: list[list[int]], chosen: list[int], max_tokens: int, temperature: float
    ) -> dict[int, str]:
        """The answers to the prompts of some numbers, by number, ascending; without those that did not end."""
        order = sorted(chosen, key=lambda i: len(prompts[i]))  # prompts of similar length need little padding
        batches = [order[i : i + _ANSWERS_PER_PART] for i in range(0, len(order), _ANSWERS_PER_PART)]

        def make(part: int) -> list[tuple[int, str]]:
            torch.manual_seed(self.seed + part)
            answers = self._generate_answers([prompts[i] for i in batches[part]], max_tokens, temperature)
            return list(zip(batches[part], answers, strict=True))

        made = self._make_parts(len(batches), make, "answers", prompts, max_tokens, temperature)
        with self._read_errors():
            return dict(sorted((int(i), str(answer)) for i, answer in made if answer))

    def _prompt_ids(self, row: dict[str, Any]) -> list[int]:
        if isinstance(row["prompt"], str):
            return self.tokenizer(row["prompt"]).input_ids
        tools = row.get("tools")
        kwargs: dict[str, Any] = {"tools": json.loads(tools) if isinstance(tools, str) else tools}  # as TRL does
        kwargs |= row.get("chat_template_kwargs") or {}
        chat: Any = self.tokenizer.apply_chat_template(
            row["prompt"], add_generation_prompt=True, return_dict=True, **kwargs
        )
        return chat.input_ids

    @torch.no_grad()
    def _generate_answers(self, prompts: list[list[int]], max_tokens: int, temperature: float) -> list[str]:
        """One answer for each prompt; empty if it did not end within `max_tokens`."""
        model, tokenizer = self.model, self.tokenizer
        padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        left: Any = {"batch_first": True, "padding_side": "left"}
        ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], padding_value=padding, **left)
        mask = pad_sequence([torch.ones(len(prompt), dtype=torch.long) for prompt in prompts], **left)
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature else {}
        settings = {"max_new_tokens": max_tokens, "pad_token_id": padding, "do_sample": False} | sampling

        def answer(part: torch.Tensor) -> list[list[int]]:
            part = part.to(model.device)
            generate: Any = model.generate
            return generate(part[:, 0], attention_mask=part[:, 1], **settings)[:, ids.shape[1] :].tolist()

        written = in_batches(torch.stack([ids, mask], 1), len(ids), answer, "leave out the longest rows")
        ends = model.generation_config.eos_token_id
        ends = {ends} if isinstance(ends, int) else set(ends or [tokenizer.eos_token_id])
        answers = []
        for row in chain.from_iterable(written):
            ended = next((i for i, token in enumerate(row) if token in ends), 0)
            answers.append(str(tokenizer.decode(row[:ended], skip_special_tokens=True)).strip())
        return answers

    def _make_parts(self, parts: int, make: Callable[[int], list[Any]], *settings: Any) -> list[Any]:
        """Make the missing parts, and return the rows of all parts, some of which may come from an earlier run."""
        processes = PartialState()
        rank, world = processes.process_index, processes.num_processes
        digest = hash_tensors(self.model.named_parameters(), *settings, self.seed)
        folder = self.folder / digest[:16]
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"part-{part:05d}-of-{parts:05d}.json" for part in range(parts)]
        mine = [part for part in range(rank, parts, world) if not paths[part].is_file()]
        for part in progress_bar(mine, desc="the dense model writes", unit="part", disable=True if rank else None):
            write_text(paths[part], json.dumps(make(part)))
        processes.wait_for_everyone()
        logger.info("the rows that the dense model wrote are in %s", folder)
        with self._read_errors():
            return [row for path in paths for row in parse_json(read_text(path), str(path))]

    def _read_errors(self) -> AbstractContextManager[None]:
        """Parts of an earlier run may be damaged."""
        return boundary(f"can't use the rows in {self.folder}", "remove it, and they are written again")
