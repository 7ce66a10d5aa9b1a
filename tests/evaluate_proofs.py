"""The proof of what a model is used and measured by besides its logits: text that it writes itself, decoding times, sizes.

Text is judged by the logits of transformers' own `generate`, without a cache, which is led through what was written.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from hf_layerprune import CutError, families
from hf_layerprune.calibration.self_text import generate_text
from hf_layerprune.cut.sizes import Sizes
from hf_layerprune.families.layout import ties_head
from hf_layerprune.measure.cost import decode_bytes, prefill_flops
from hf_layerprune.runtime.generation import plain_generation
from hf_layerprune.runtime.loading import load_config
from hf_layerprune.runtime.model_class import auto_class_of
from hf_layerprune.runtime.parts import cache_of
from hf_layerprune.select.decode_times import time_decoding
from hf_layerprune.stages.inspect import inspect_model
from hf_layerprune.stages.requests import InspectRequest

from .comparing import TOLERANCE
from .matrix import ProofError
from .tiny_models import tiny_input

# Layers that only run if there is an image.
WITH_IMAGE = {"mllama": [1, 4], "mllama_text_model": [1, 4]}
# Types whose cache's size is not known without running them: their forward pass depends on values, or returns no cache.
UNSIZED_CACHE = (
    "big_bird", "dbrx", "glm5_next", "granite4_vision", "jetmoe", "longcat_flash", "megatron-bert", "moshi",
    "qwen4_exp", "qwen4_exp_text", "recurrent_gemma", "rembert", "roformer", "step3p5", "step3p7", "xlnet", "xmod",
)  # fmt: skip


def prove_writing(dense: Any) -> None:
    """Each token of the text that the model writes is the one that its distribution has at the number that was drawn."""
    rows = generate_text(dense, None, 3, 8, seed=0)
    start, written = rows[:, :1], rows[:, 1:]
    with plain_generation(dense):
        led = dense.generate(
            start, attention_mask=torch.ones_like(start), max_new_tokens=written.shape[1], do_sample=False, use_cache=False,
            prefix_allowed_tokens_fn=lambda row, ids: [int(rows[row, len(ids)])],
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    shares = torch.stack(led.logits, 1).double().softmax(-1)
    upper = shares.cumsum(-1).gather(-1, written[..., None])[..., 0]
    lower = upper - shares.gather(-1, written[..., None])[..., 0]
    draws = torch.rand(written.shape, generator=torch.Generator().manual_seed(0))
    off = torch.maximum(lower - draws, draws - upper)
    # A few types count positions by the tokens that are not padding, behind which they differ with and without a cache.
    off = off.masked_fill((rows[:, :-1] == 0).cumsum(-1) > 0, 0)
    if not off.max() <= TOLERANCE:
        raise ProofError(f"text that the model writes: {off.max():.2g} beside what was drawn")


def prove_times(dense: Any, pruned: Any) -> None:
    """Every layer that runs is timed, and a cut saves operations and reads."""
    times = time_decoding(dense, 32)
    still = [i for i, time in enumerate(times.layers) if not time > 0]
    if len(times.layers) != families.layer_count(dense.config) or not times.rest > 0:
        raise ProofError(f"decoding: {len(times.layers)} layers are timed, and {times.rest} s for the rest")
    if still != WITH_IMAGE.get(dense.config.model_type, []):
        raise ProofError(f"decoding: layers {still} take no time")
    for name, cost in (("prefill", prefill_flops), ("decoding", decode_bytes)):
        if not 0 < cost(pruned, 1, 8) < cost(dense, 1, 8):
            raise ProofError(f"{name}: {cost(pruned, 1, 8)} with fewer layers, {cost(dense, 1, 8)} with all")


def prove_sizes(dense: Any, pruned: Any) -> None:
    """The parameters, file and cache of a model and its cut are what `inspect` and the targets say without loading it."""
    if type(dense.config) not in auto_class_of(dense.config)._model_mapping:
        return  # the text part of a larger model, which is not loaded alone
    drop = getattr(pruned.config, families.MARKER)["drop_layers"]
    with tempfile.TemporaryDirectory() as folder:
        dense.save_pretrained(folder)
        anatomy, sizes = inspect_model(InspectRequest(folder)), Sizes(load_config(folder), folder)
        on_disk = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        _equal("parameters", anatomy.total, dense.num_parameters())
        _equal("parameters of the cut", sizes.parameters(drop), pruned.num_parameters())
        _equal("layers", len(anatomy.layers), families.layer_count(dense.config))
        _equal("tied head", anatomy.tied, ties_head(dense))
        _equal("weight file", anatomy.file_bytes[:1], [on_disk])
        try:
            held = sizes.memory_bytes(drop, context=16, batch=2) - sizes.weight_bytes(drop)
        except CutError:
            if dense.config.model_type not in UNSIZED_CACHE:
                raise
        else:
            _equal("cache of the cut", held, real_cache(pruned, 16, 2))


@torch.no_grad()
def real_cache(model: Any, tokens: int, batch: int) -> int:
    """Bytes of every tensor in a cache that was really filled."""
    cache = cache_of(model(input_ids=tiny_input(batch=batch, length=tokens), use_cache=True))
    cache = getattr(cache, "self_attention_cache", cache)
    leaves = tree_leaves([vars(layer) for layer in getattr(cache, "layers", [cache] if cache else [])])
    return sum({id(leaf): leaf.nbytes for leaf in leaves if isinstance(leaf, torch.Tensor)}.values())


def _equal(name: str, mine: Any, wanted: Any) -> None:
    if mine != wanted:
        raise ProofError(f"{name}: {mine}, should be {wanted}")
