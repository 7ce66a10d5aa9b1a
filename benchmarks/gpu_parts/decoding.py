"""Part d: decoding and prefill of a dense and a cut 8B shape, compared with the remaining bytes and operations."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

from .steps import Setting, Step, last, peak_bytes, random_model, reset_peak, synchronise


def steps(rounds: int) -> list[Step]:
    """Eager mode; then compiled with a static cache, one step for each batch size."""
    compiled = [Step(f"d-compiled-{batch}", partial(run, True, (batch,)), 7) for batch in (1, 8, 64)]
    return [Step("d-eager", partial(run, False, (1, 8, 64)), 5), *compiled]


def run(compiled: bool, batches: tuple[int, ...], setting: Setting) -> dict[str, Any]:
    """Time both models in alternation; for each batch size, the ratio of their speeds, and the ideal ratio."""
    from hf_layerprune.measure.cost import decode_bytes, prefill_flops
    from hf_layerprune.measure.requests import Workload
    from hf_layerprune.measure.speed import time_models

    prompt, new = (8, 4) if setting.tiny else (512, 64)
    models = {"dense": random_model(setting), "cut": random_model(setting, last(setting))}
    works = [Workload(batch, prompt, new) for batch in batches]
    if compiled:
        for model in models.values():
            use_static_cache(model, prompt + new)
    reset_peak(setting)
    timed = time_models(models, works, repeats=2 if setting.tiny else 5)
    found: dict[str, Any] = {"prompt_tokens": prompt, "new_tokens": new}
    for work, runs in timed.items():
        entry: dict[str, Any] = {}
        for metric in ("decode_tokens_per_second", "prefill_tokens_per_second"):
            values = {name: statistics.median(one[metric] for one in runs[name]) for name in models}
            entry[metric] = values | {"ratio": values["cut"] / values["dense"]}
        if compiled:
            values = {name: compiled_prefill(model, work, setting) for name, model in models.items()}
            entry["prefill_tokens_per_second"] = values | {"ratio": values["cut"] / values["dense"]}
        held = prompt + new // 2
        read = {name: decode_bytes(model, work.batch, held) for name, model in models.items()}
        flops = {name: prefill_flops(model, work.batch, prompt) for name, model in models.items()}
        entry["decode_ideal"] = read["dense"] / read["cut"]
        entry["prefill_ideal"] = flops["dense"] / flops["cut"]
        found[f"batch {work.batch}"] = entry
    return found | {"peak_bytes": peak_bytes(setting)}


def use_static_cache(model: Any, length: int) -> None:
    """Let a model generate with a static cache, with which transformers compiles decoding on a GPU.

    It is the same one in all calls: for another, CUDA graphs would be recorded again, while the tokens are timed.
    """
    from transformers import StaticCache

    cache, plain = StaticCache(config=model.config, max_cache_len=length), model.generate

    def generate(*args: Any, **kwargs: Any) -> Any:
        cache.reset()
        return plain(*args, past_key_values=cache, **kwargs)

    model.generate = generate


def compiled_prefill(model: Any, work: Any, setting: Setting) -> float:
    """Tokens per second of a compiled forward pass without a cache, with logits of the last token."""
    import torch

    # In a dry run dynamo alone, without a compiler.
    compiled = torch.compile(model.forward, backend="eager" if setting.tiny else "inductor")
    ids = torch.ones(work.batch, work.prompt_tokens, dtype=torch.long, device=setting.device)
    times = []
    with torch.inference_mode():
        for _ in range(6):
            synchronise(setting)
            start = time.perf_counter()
            compiled(input_ids=ids, use_cache=False, logits_to_keep=1)
            synchronise(setting)
            times.append(time.perf_counter() - start)
    return ids.numel() / statistics.median(times[2:])
