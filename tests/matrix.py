"""The proof that a model type survives a cut: five checks, for a cut at the tail and one in the middle.

(a) the cut model in memory, and the same model saved and reloaded, give bit-identical logits;
(b) both give the logits of the dense model with each dropped layer replaced by the identity;
(c) greedy generation with both gives the same tokens with and without the key-value cache;
(d) the saved config is valid, and names the dropped layers;
(e) the same cut made on disk, and the model loaded without the dropped layers, have the same tensors and logits.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AutoConfig

from hf_layerprune import families
from hf_layerprune.cut.lazy import load_pruned
from hf_layerprune.cut.memory import drop_layers
from hf_layerprune.families.layout import find_decoder_layers
from hf_layerprune.runtime.model_class import auto_class_of

from .cutting import cut_checkpoint
from .tiny_models import EAGER, VOCAB, tiny_input

CUT = "cut"
_SHARED_KV = ("gemma3n", "gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")

# How many of its arguments a layer passes on to the next one; in most families, only the hidden states.
CARRIED = {"zaya": 2}

# Cuts that keep the base's own pattern, where the config can't describe another one.
MIDDLE: dict[str, tuple[int, ...]] = {
    "jamba": (2, 6, 10),  # one layer of each period of four
    **dict.fromkeys(_SHARED_KV, (1, 2, 6)),  # 3 and 4 feed later layers
    "recurrent_gemma": (1, 3, 5),  # 2 and 5 are the attention layers, and one must stay
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), (0, 3, 6)),  # 1 and 4 hold n-gram tables
}
DEFAULT_MIDDLE = (2, 3, 5)
TAIL_LENGTH = 2
# Another seed, where the default one makes two tokens almost equally likely at some step of (c).
SEED = {"nemotron_h": 1}


class ProofError(AssertionError):
    """A check does not hold."""


def cuts(model_type: str, config: Any) -> dict[str, tuple[int, ...]]:
    """The two cuts that a type is proven on: the last layers that may be dropped, and an odd number from the middle."""
    n, protected = families.layer_count(config), families.protected_layers(config)
    free = [i for i in range(n) if i not in protected]
    middle = MIDDLE.get(model_type, DEFAULT_MIDDLE)
    if model_type not in MIDDLE and any(i in protected for i in middle):  # layers that take in features of a tower
        middle = tuple(free[0::2][:3])
    return {"tail": tuple(free[-TAIL_LENGTH:]), "middle": middle}


@contextmanager
def identities(model: Any, layers: Sequence[int]) -> Iterator[None]:
    """Turn layers into identities: they run, but their effect on the hidden states is discarded."""
    carried = CARRIED.get(families.text_config(model.config).model_type, 1)

    def undo(module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        before = args[:carried] if args else (kwargs["hidden_states"],)
        return (*before, *output[carried:]) if isinstance(output, tuple | list) else before[0]

    stack = find_decoder_layers(model).layers
    handles = [stack[i].register_forward_hook(undo, with_kwargs=True) for i in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def logits(model: Any, input_ids: torch.Tensor, **media: torch.Tensor) -> torch.Tensor:
    """Logits of one pass without a cache, `[batch, seq, vocab]`."""
    return model(input_ids=input_ids, use_cache=False, **media).logits


def greedy(model: Any, input_ids: torch.Tensor, use_cache: bool, **media: torch.Tensor) -> torch.Tensor:
    """Greedy continuation, `[batch, seq]`."""
    how = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False, "use_cache": use_cache}
    if special := list(range(VOCAB, families.text_config(model.config).vocab_size)):
        how["suppress_tokens"] = special  # placeholders of images can't be written
    return model.generate(input_ids, **{"attention_mask": torch.ones_like(input_ids)} | media, **how)


def _check(name: str, holds: bool, detail: Callable[[], str]) -> None:
    if not holds:
        raise ProofError(f"({name}) {detail()}")


Inputs = dict[str, torch.Tensor]


def prove_cut(
    dense: Any, dropped: Sequence[int], saved: str | None = None, inputs: dict[str, Inputs] | None = None
) -> None:
    """Prove one cut of one model.

    Args:
        dense (`Any`): The model.
        dropped (`Sequence[int]`): The layers to drop.
        saved (`str`, *optional*): The folder of the model. With it, the cut is also made on disk, and loaded without
            the dropped layers.
        inputs (`dict[str, Inputs]`, *optional*): The inputs of the model, by kind; text alone by default.

    Raises:
        ProofError: One of the checks does not hold.
    """
    inputs = inputs or text_inputs()
    n = families.layer_count(dense.config)
    whole = {kind: logits(dense, **given) for kind, given in inputs.items()}
    with identities(dense, dropped):
        reference = {kind: logits(dense, **given) for kind, given in inputs.items()}
    for kind, wanted in reference.items():
        _check("b", not wanted.isnan().any(), lambda: f"the reference has NaNs, so nothing is proven with {kind}")  # noqa: B023
        same = torch.equal(whole[kind], wanted)
        _check("b", not same, lambda: f"the dropped layers do nothing, so nothing is proven with {kind}")  # noqa: B023

    model = copy.deepcopy(dense)
    drop_layers(model, dropped)
    mine = {kind: logits(model, **given) for kind, given in inputs.items()}
    for kind, wanted in reference.items():
        off = (mine[kind] - wanted).abs().max()
        _check("b", torch.allclose(mine[kind], wanted, rtol=1e-5, atol=1e-5), lambda: f"{kind}: off by {off}")  # noqa: B023
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = AutoConfig.from_pretrained(folder)
        config.validate()
        families.text_config(config).validate()
        left = families.layer_count(config)
        _check("d", left == n - len(dropped), lambda: f"the saved config has {left} layers")
        said = getattr(config, families.MARKER, None)
        told = {"drop_layers": sorted(dropped), "num_base_layers": n}
        _check("d", said == told, lambda: f"the saved config says {said}")
        again, lost = load(folder, dense)
    _check("a", not lost, lambda: f"reload: {lost}")
    for kind, given in inputs.items():
        off = (mine[kind] - logits(again, **given)).abs().max()
        _check("a", off == 0, lambda: f"{kind}: off by {off} after a reload")  # noqa: B023
        without_cache = greedy(again, use_cache=False, **given).tolist()
        for name, candidate in (("in memory", model), ("reloaded", again)):
            with_cache = greedy(candidate, use_cache=True, **given).tolist()
            _check(
                "c",
                with_cache == without_cache,
                lambda: f"{kind}, {name}: {with_cache} with cache, {without_cache} without",  # noqa: B023
            )
    if saved is not None:
        _prove_forms(saved, dropped, model, inputs, mine)


def text_inputs() -> dict[str, Inputs]:
    """Random text alone."""
    return {"text": {"input_ids": tiny_input()}}


def _prove_forms(saved: str, dropped: Sequence[int], model: Any, inputs: dict[str, Inputs], expected: Inputs) -> None:
    """Check (e): of a model in a folder, a cut on disk and a model loaded without the layers equal the cut in memory."""
    tensors = model.state_dict()
    with tempfile.TemporaryDirectory() as folder:
        cut_checkpoint(saved, f"{folder}/cut", dropped)
        on_disk, lost = load(f"{folder}/cut", model)
    _check("e", not lost, lambda: f"cut on disk: {lost}")
    lazy = realign(load_pruned(saved, dropped, dtype=torch.float32, **EAGER))
    for name, other in (("cut on disk", on_disk), ("loaded without the layers", lazy)):
        other_tensors = other.state_dict()
        _check("e", other_tensors.keys() == tensors.keys(), lambda: f"{name}: other tensors")  # noqa: B023
        for key, tensor in tensors.items():
            _check("e", torch.equal(tensor, other_tensors[key]), lambda: f"{name}: {key} differs")  # noqa: B023
        for kind, given in inputs.items():
            off = (logits(other, **given) - expected[kind]).abs().max().item()
            _check("e", off == 0, lambda: f"{name}: logits of {kind} are off by {off}")  # noqa: B023


def load(folder: str, like: Any) -> tuple[Any, dict[str, Any]]:
    """Load a model with plain transformers, in the class of another; also return what the loader reports."""
    # A text decoder of a multimodal model may have no auto class of its own.
    config = AutoConfig.from_pretrained(folder)
    auto = auto_class_of(config)
    loader = auto if type(config) in auto._model_mapping else type(like)
    model, info = loader.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **EAGER)
    return realign(model), {
        key: info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]
    }


def realign(model: Any) -> Any:
    """Copy all weights to fresh memory.

    Weights in a mapped file are aligned differently, and the rounding of some kernels depends on alignment.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    return model.eval()


def prove(dense: Any, proven_cuts: dict[str, tuple[int, ...]], inputs: dict[str, Inputs] | None = None) -> None:
    """Prove a model on some cuts, or raise.

    Args:
        dense (`Any`): The model.
        proven_cuts (`dict[str, tuple[int, ...]]`): See [`cuts`].
        inputs (`dict[str, Inputs]`, *optional*): See [`prove_cut`].
    """
    with tempfile.TemporaryDirectory() as folder:
        dense.save_pretrained(folder)
        for dropped in proven_cuts.values():
            prove_cut(dense, dropped, folder, inputs)
