"""Times prefill and decoding of several models in turns, so that a slow phase of the machine affects all of them.

runs = time_models({"dense": dense, "pruned": pruned}, [Workload(1, 128, 32)], repeats=5)
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch

from ..runtime.devices import synchronise
from ..runtime.generation import token_times
from ..runtime.memory import free_memory, is_out_of_memory
from ..runtime.parts import evaluation_mode
from ..screen import progress_bar
from .cost import prefill
from .paired import in_turns
from .requests import Workload

if TYPE_CHECKING:
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


def time_models(
    models: Mapping[str, PreTrainedModel], workloads: Sequence[Workload], *, repeats: int = 5
) -> dict[Workload, dict[str, list[dict[str, float]]]]:
    """Time models on the same random prompts, in turns, after one warm-up run of each workload.

    A workload that does not fit into memory is skipped with a warning. The metrics of each repeat are named as in
    `metrics.json`; runs of the same repeat directly follow each other.
    """
    embeddings: list[Any] = [model.get_input_embeddings() for model in models.values()]
    vocabulary = min(table.weight.shape[0] for table in embeddings)
    generator = torch.Generator().manual_seed(0)
    timed: dict[Workload, dict[str, list[dict[str, float]]]] = {}
    names = list(models)
    with (
        evaluation_mode(*models.values()),
        progress_bar(total=len(workloads) * (repeats + 1) * len(names), desc="timing", unit="run") as bar,
    ):
        for work in workloads:
            ids = torch.randint(vocabulary, (work.batch, work.prompt_tokens), generator=generator)
            timings: dict[str, list[dict[str, float]]] = {name: [] for name in names}
            try:
                for name in in_turns(names, repeats + 1):
                    timings[name].append(time_once(models[name], ids, work))
                    bar.update()
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                logger.warning("out of memory with %d x %d tokens, which are skipped", work.batch, work.prompt_tokens)
                free_memory()
                continue
            timed[work] = {name: runs[1:] for name, runs in timings.items()}
    return timed


def time_once(model: PreTrainedModel, ids: torch.Tensor, work: Workload) -> dict[str, float]:
    """Run a workload once on a model in evaluation mode, with prompts `[batch, prompt_tokens]`.

    Returns:
        `dict[str, float]`: Throughput of reading the prompts, with logits for their last token; seconds until `generate`
            returns the first token; and throughput from the first token to the last, if there are several.
    """
    ids = ids.to(model.device)
    synchronise(model.device)
    start = perf_counter()
    prefill(model, ids)
    synchronise(model.device)
    prefill_seconds = perf_counter() - start
    start = perf_counter()
    first, *later = token_times(model, ids, work.new_tokens)
    metrics = {
        "prefill_tokens_per_second": work.batch * work.prompt_tokens / prefill_seconds,
        "time_to_first_token": first - start,
    }
    if later:
        metrics["decode_tokens_per_second"] = work.batch * len(later) / (later[-1] - first)
    return metrics
