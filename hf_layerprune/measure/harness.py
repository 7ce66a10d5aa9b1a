"""Runs lm-evaluation-harness in this process, on a model that is already loaded.

Each task is run on its own, so that a number depends only on the model, the task and the batch size: the harness pads
the questions of a batch to the same length, and in half precision, results depend on that length. A number equals the
one that the harness's command line prints for that task and batch size.
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lm_eval import evaluate
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.models.huggingface import HFLM
from transformers import set_seed

from ..errors import LayerPruneError, boundary
from ..runtime.memory import free_memory, halve_batch
from .image_tasks import replace_images
from .tasks import SEED, require_harness

if TYPE_CHECKING:
    from lm_eval.tasks.manager import TaskDict
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

logger = logging.getLogger(__name__)
require_harness()

# The first batch size of `auto`. A CPU gains nothing from more; on a GPU, memory is the limit.
_AUTO_CPU_BATCH, _AUTO_DEVICE_BATCH = 8, 64


@dataclass(frozen=True)
class Score:
    """One number of a task.

    Args:
        value (`float`): The number.
        stderr (`float`, *optional*): Its standard error, as the harness computes it.
        higher_is_better (`bool`, *optional*): Whether higher values are better.
        chance (`float`, *optional*): What random guessing gets, if that is known from the number of choices.
        outcomes (`dict[str, float]`): The values that it is the mean of, by question; empty if it is not a mean.
    """

    value: float
    stderr: float | None
    higher_is_better: bool | None
    chance: float | None
    outcomes: dict[str, float]


@dataclass(frozen=True)
class TaskRun:
    """The results of a model on a task: the scores by metric, how they were measured, and how many seconds it took."""

    scores: dict[str, Score]
    samples: int
    shots: int
    version: str | float | None
    seconds: float


class TaskRunner:
    """What runs a task; mixed into the harness's own classes of models."""

    def run(self, name: str, task: TaskDict, *, limit: int | None = None, shots: int | None = None) -> TaskRun:
        """Run a task or a group of tasks, as the harness loaded it under this name.

        `limit` is a number of questions of each (sub)task, by default all, and `shots` of few-shot examples, by
        default the task's own.

        Raises:
            LayerPruneError: A single question does not fit into memory, or the task gave no result.
        """
        start = time.perf_counter()
        with torch.no_grad(), _prepare_task(name, task, shots):
            model: Any = self
            evaluated: Any = evaluate(model, task, limit=limit)
        samples = _samples_by_question(evaluated["samples"])
        if name not in evaluated["results"] or not samples:
            raise LayerPruneError(f"task {name} gave no result; omit it")
        version = evaluated["versions"].get(name)
        given = max((int(n) for n in evaluated["n-shot"].values() if isinstance(n, int)), default=0)
        if shots not in (None, given):
            logger.warning("%s always has %d few-shot examples, not %d", name, given, shots)
        return TaskRun(
            scores=_scores(evaluated, name, samples),
            samples=len(samples),
            shots=given,
            version=version if isinstance(version, str | int | float) else None,
            seconds=time.perf_counter() - start,
        )


class Harness(TaskRunner, HFLM):
    """The harness, set up for one causal language model.

    Halves the batch when memory runs out. The longest questions come first, so little work is repeated. `batch_size`
    is how many answers are scored together.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | str = "auto"
    ) -> None:
        batch = _initial_batch_size(model, batch_size)
        # By itself, the harness takes types that also exist as encoder-decoders, and some that hear, for such.
        super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch)

    def _loglikelihood_tokens(self, *args: Any, **kwargs: Any) -> Any:
        while True:
            try:
                return super()._loglikelihood_tokens(*args, **kwargs)
            except (RuntimeError, MemoryError) as error:
                self.batch_size_per_gpu = halve_batch(error, self.batch_size, "question; use a GPU with more memory")
            free_memory()


class ImageHarness(TaskRunner, HFMultimodalLM):
    """The harness for tasks about images, set up for one model; `batch_size` answers are written together."""

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, batch_size: int | str = "auto") -> None:
        text = model.config.get_text_config()
        super().__init__(
            pretrained=model,
            tokenizer=processor,
            batch_size=_initial_batch_size(model, batch_size),
            max_length=getattr(text, "max_position_embeddings", None),  # the harness expects it at the top level
            convert_img_format=True,
            image_string=getattr(processor, "image_token", None),  # Gemma 3's config has another token
        )

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        """Keep the processor that is given; the harness only keeps one that it loads by a name."""
        self.processor, self.tokenizer = tokenizer, tokenizer.tokenizer


def _initial_batch_size(model: PreTrainedModel, batch_size: int | str) -> int:
    """The batch size to begin with, where it may be `"auto"`."""
    if batch_size == "auto":
        return _AUTO_CPU_BATCH if model.device.type == "cpu" else _AUTO_DEVICE_BATCH
    return int(batch_size)


@contextmanager
def _prepare_task(name: str, task: TaskDict, shots: int | None) -> Iterator[None]:
    """Set up a task as the harness's own command does, and turn what the harness raises into an error of ours."""
    way_out = "omit it, or use fewer few-shot examples" if shots else "omit it"
    with boundary(f"task {name} can't be run", way_out, LayerPruneError):
        set_seed(SEED)
        for one in task["tasks"].values():
            own = one.get_config("num_fewshot")
            if own != 0:  # a task that says 0 has no examples
                one.set_config(key="num_fewshot", value=(own or 0) if shots is None else shots)
            one.set_fewshot_seed(seed=SEED)
        yield


def prompts_hash(name: str, task: TaskDict, limit: int | None, shots: int | None) -> str:
    """One sha256 of everything that a task asks a model: the final prompts, the choices and the right answers.

    Raises:
        LayerPruneError: The task has fewer examples than are asked for.
    """
    digest = hashlib.sha256()
    with _prepare_task(name, task, shots):
        for one in task["tasks"].values():
            one.build_all_requests(limit=limit)
            for request in one.instances:
                content = repr((request.request_type, replace_images(request.arguments), replace_images(request.doc)))
                digest.update(content.encode("utf-8", "replace"))
    return digest.hexdigest()


def _samples_by_question(samples: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """The logged questions, by a key that is the same for every model."""
    return {
        f"{task}/{one['doc_id']}": one
        for task, rows in samples.items()
        for one in rows
        if one["filter"] == rows[0]["filter"]
    }


def _scores(evaluated: dict[str, Any], name: str, samples: dict[str, dict[str, Any]]) -> dict[str, Score]:
    results, better = evaluated["results"][name], evaluated["higher_is_better"].get(name, {})
    chance, scores = _chance(samples), {}
    for key, value in results.items():
        metric, _, which = key.partition(",")
        if not which or metric.endswith("_stderr") or metric in scores or not isinstance(value, int | float):
            continue
        stderr = results.get(f"{metric}_stderr,{which}")
        outcomes = {question: one[metric] for question, one in samples.items() if metric in one}
        plain = all(isinstance(outcome, int | float) for outcome in outcomes.values())
        is_mean = plain and outcomes and math.isclose(sum(outcomes.values()) / len(outcomes), value, abs_tol=1e-9)
        scores[metric] = Score(
            value=float(value),
            stderr=float(stderr) if isinstance(stderr, int | float) and math.isfinite(stderr) else None,
            higher_is_better=better.get(metric),
            chance=chance if metric in ("acc", "acc_norm") else None,
            outcomes={question: float(outcome) for question, outcome in outcomes.items()} if is_mean else {},
        )
    return scores


def _chance(samples: dict[str, dict[str, Any]]) -> float | None:
    """The accuracy of random guessing: the mean share of right choices. `None` where `acc` does not count right answers."""
    shares = []
    for one in samples.values():
        choices, right = len(one["arguments"]), one["target"]
        if choices < 2 or one.get("acc") not in (0, 1):
            return None
        shares.append((len(set(right)) if isinstance(right, list) else 1) / choices)
    return sum(shares) / len(shares)
