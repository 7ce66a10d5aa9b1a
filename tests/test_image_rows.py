"""Choice and repair on rows with images or audio: each type against the model's own forward, computed naively."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hf_layerprune import LayerPruneError, UnsupportedModelError, families
from hf_layerprune.calibration.rows import CalibrationSet, Rows
from hf_layerprune.families.layout import find_decoder_layers
from hf_layerprune.families.multimodal import placeholder_tokens
from hf_layerprune.repair.fit import fit_repair
from hf_layerprune.repair.writers import swap_parameters
from hf_layerprune.runtime.parts import hook_scope
from hf_layerprune.runtime.walk import LayerWalk
from hf_layerprune.select import taylor
from hf_layerprune.select.trials import Trial, evaluate_trials

from .comparing import divergence, same
from .matrix import cuts, identities
from .multimodal_inputs import AUDIO, IMAGES
from .multimodal_makers import media_rows
from .repair_proofs import added_by_fit
from .test_matrix import REPRESENTATIVE
from .tiny_models import tiny_model
from .tiny_multimodal import WHOLE, whole_model

# Plain, features added to later layers (two ways), positions in three dimensions, attention in both directions, audio.
QUICK = (*REPRESENTATIVE, "granite4_vision", "qwen2_5_vl", "paligemma")
TYPES = sorted(t for t in {*IMAGES, *AUDIO} if t not in families.REFUSED and t not in families.REFUSED_AT["rank"])
REPAIRED = [t for t in TYPES if t not in families.REFUSED_AT["repair"]]


def of_type(model_type: str, *more: str, skipped: bool = False) -> Any:
    """A case of a type that, unless it is quick, is one of the matrix, or with `skipped` of the whole matrix alone."""
    marks = [pytest.mark.matrix, *([pytest.mark.whole_matrix] if skipped else [])]
    return pytest.param(model_type, *more, marks=() if model_type in QUICK else marks)


def made(model_type: str, count: int) -> tuple[Any, CalibrationSet, list[Rows]]:
    model = whole_model(model_type) if model_type in WHOLE else tiny_model(model_type)
    rows = media_rows(model_type, model, count)
    longest = max(ids.shape[1] for ids, _ in rows)
    padded = torch.cat([F.pad(ids, (0, longest - ids.shape[1])) for ids, _ in rows])
    lengths = [ids.shape[1] for ids, _ in rows]
    return model, CalibrationSet.from_ids(padded, "noise", media=[media for _, media in rows], lengths=lengths), rows


def naive(model: Any, row: Rows) -> torch.Tensor:
    """The logits of the model's own forward, `[seq, vocab]`."""
    ids, media = row
    return model(input_ids=ids, **{**media, "use_cache": False}).logits[0]


def asked(model: Any, ids: torch.Tensor) -> list[int]:
    """The positions whose next token is text."""
    tokens = placeholder_tokens(model.config)
    return [i for i in range(ids.shape[1] - 1) if ids[0, i + 1].item() not in tokens]


def loss(model: Any, row: Rows) -> torch.Tensor:
    ids, _ = row
    positions = asked(model, ids)
    return F.cross_entropy(naive(model, row)[positions].double(), ids[0, 1:][positions])


# Types that are not quick take turns: one is ranked, the next one refitted.
@pytest.mark.parametrize("model_type", [of_type(t, skipped=TYPES.index(t) % 2 == 1) for t in TYPES])
def test_ranked(model_type: str) -> None:
    """Perplexity and KL of cuts, and a Taylor score, count what follows text, and no placeholder."""
    model, text, rows = made(model_type, 2)
    assert placeholder_tokens(model.config)
    walk = LayerWalk(model)
    n, drop = walk.num_layers, cuts(model_type, model.config)["middle"]
    tried = [(), (n - 2,), drop]
    with torch.no_grad():
        dense = [naive(model, row) for row in rows]
    for layers, outcome in zip(tried, evaluate_trials(walk, text, [Trial(layers) for layers in tried]), strict=True):
        with identities(model, layers), torch.no_grad():
            same(f"loss without {layers}", outcome.loss, sum(loss(model, row) for row in rows) / len(rows))
            by_row = [
                divergence(whole, naive(model, row))[[*asked(model, row[0]), row[0].shape[1] - 1]].mean()
                for whole, row in zip(dense, rows, strict=True)
            ]
        assert outcome.kl == pytest.approx(sum(by_row).item() / len(rows), rel=1e-4, abs=1e-7)
    index = drop[0]
    score = taylor.score(walk, text).layers[index]
    same("Taylor score", score, naive_taylor(model, rows, index))


def naive_taylor(model: Any, rows: Sequence[Rows], index: int) -> float:
    layer = find_decoder_layers(model).layers[index]
    weights = [p for name, p in layer.named_parameters() if not name.endswith("bias")]
    model.requires_grad_(False)
    for weight in weights:
        weight.requires_grad_(True)
    counts = [len(asked(model, ids)) for ids, _ in rows]
    total = sum(loss(model, row) * count for row, count in zip(rows, counts, strict=True)) / sum(counts)
    found = torch.autograd.grad(total, weights, allow_unused=True)
    return sum((w * g).abs().sum().item() for w, g in zip(weights, found, strict=True) if g is not None)


@contextmanager
def entering(model: Any, index: int) -> Iterator[list[torch.Tensor]]:
    """Collect the states that enter a layer in the model's own forward."""
    seen: list[torch.Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handle = find_decoder_layers(model).layers[index].register_forward_pre_hook(keep, with_kwargs=True)
    yield seen
    handle.remove()


@torch.no_grad()
def states(model: Any, index: int, rows: Sequence[Rows]) -> torch.Tensor:
    """The states that enter a layer, of all rows, `[tokens, hidden]`."""
    with entering(model, index) as seen:
        for row in rows:
            naive(model, row)
    return torch.cat([state[0] for state in seen]).double()


@lru_cache(maxsize=1)
def made_to_repair(model_type: str) -> tuple[Any, CalibrationSet, list[Rows]]:
    """What the tests of each repair share."""
    return made(model_type, 5)


def fitted_methods(model_type: str) -> list[str]:
    """The fitted repairs that a type takes: of mixtures of experts, often only `linear`."""
    proven = families.proven_stages()[model_type]["repair"]
    return [method for method in ("linear", "refit") if method in proven]


@pytest.mark.parametrize(
    ("model_type", "method"),
    [
        of_type(t, method, skipped="refit" in fitted_methods(t) and (method == "linear" or TYPES.index(t) % 2 == 0))
        for t in REPAIRED
        for method in fitted_methods(t)
    ],
)
def test_repaired(model_type: str, method: str) -> None:
    """A map is the ridge solution for the states of the model's own forward, with images in their places."""
    model, text, rows = made_to_repair(model_type)
    drop, repair = first_repair(model, text, method)
    assert repair is not None, "its text can be repaired"
    (cut,) = repair.cuts
    index, _, name = cut["folded_into"].partition(".")
    before, fitted = int(index), rows[:4]  # the fifth row judges
    layer = find_decoder_layers(model).layers[before]
    module = layer.get_submodule(name)
    wanted = states(model, drop[-1] + 1, fitted)
    seen: list[torch.Tensor] = []
    with hook_scope(module.register_forward_hook(lambda m, args, output: seen.extend((args[0], output.clone())))):
        plain = states(model, drop[0], fitted)
    features, output = (torch.cat([x.flatten(0, -2) for x in seen[start::2]]).double() for start in (0, 1))
    with hook_scope(module.register_forward_hook(lambda m, args, output: torch.zeros_like(output))):
        written = plain - states(model, drop[0], fitted)
    added = added_by_fit(method, cut, layer, features, output, written, wanted - plain)
    with swap_parameters(layer, repair.by_layer()[before]):
        mine = states(model, drop[0], fitted)
    same("states behind the cut", mine, plain + added, 1e-3)
    assert cut["tokens"] == sum(ids.shape[1] for ids, _ in fitted)


def first_repair(model: Any, text: CalibrationSet, method: str) -> tuple[tuple[int, ...], Any]:
    """A block that a repair accepts, and the repair."""
    n, protected = families.layer_count(model.config), families.protected_layers(model.config)
    for first in range(n - 3, 1, -1):
        block = (first, first + 1)
        # What is added to the input of the layer behind the block would hide what the block did.
        if protected.keys() & {*block, first + 2}:
            continue
        try:
            return block, fit_repair(model, block, text, method)
        except LayerPruneError:
            continue
    return (), None


def test_scaled_by_the_ratio_of_all_tokens() -> None:
    model, text, rows = made("llava", 3)
    repair = fit_repair(model, [3, 4], text, "magnitude")
    before, after = (states(model, i, rows).abs().sum(-1) for i in (3, 5))
    same("ratio", repair.cuts[0]["size_ratio"], (after / before).mean())
    layers = find_decoder_layers(model).layers
    for (i, name), value in repair.tensors.items():
        same(name, value, layers[i].get_parameter(name) / (after / before).mean())


def test_features_that_a_scale_would_miss_are_refused() -> None:
    """Features of the tower are added in front of layer 4 at their own size, whatever the layers are scaled by."""
    model, text, _ = made("granite4_vision", 2)
    with pytest.raises(LayerPruneError, match="can't rescale layer 4"):
        fit_repair(model, [2, 3], text, "magnitude")


def test_features_between_layers_that_may_go_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text, _ = made("qwen3_vl", 2)
    monkeypatch.setattr("hf_layerprune.runtime.walk.protected_layers", lambda config: {})
    with pytest.raises(UnsupportedModelError, match="features are added between layers 0 and 1"):
        fit_repair(model, [4, 5], text, "linear")


def test_what_the_walk_misses_is_refused() -> None:
    """A model that mixes rows of images by more than hidden states is found by the first of them."""
    model, text, _ = made("llava", 2)
    inner = model.model.language_model
    own = inner.forward

    def leaking(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        if kwargs["inputs_embeds"].shape[1] > 20:
            output.last_hidden_state = output.last_hidden_state * 1.5 + kwargs["inputs_embeds"]
        return output

    inner.forward = leaking
    with pytest.raises(UnsupportedModelError, match="can't be run one at a time: they pass more than hidden states"):
        evaluate_trials(LayerWalk(model), text, [Trial((3,))])
