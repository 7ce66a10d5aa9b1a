"""Each criterion against its formula, written out naively on whole models of four architectures."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from hf_layerprune import CutError, drop_layers
from hf_layerprune.calibration.rows import CalibrationSet
from hf_layerprune.families.layout import find_decoder_layers
from hf_layerprune.select import passes, taylor
from hf_layerprune.select.runner import score_layers

from .tiny_models import LAYERS, VOCAB, tiny_model

# Rotary and learned positions, sliding windows and norms behind modules, experts.
ARCHITECTURES = ("llama", "gpt2", "gemma2", "qwen3_moe")
ROWS, LENGTH = 20, 12


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> Any:
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def text() -> CalibrationSet:
    ids = torch.randint(3, VOCAB, (ROWS, LENGTH), generator=torch.Generator().manual_seed(3))
    return CalibrationSet.from_ids(ids, "random")


def layers_of(model: Any) -> Any:
    return find_decoder_layers(model).layers


def without(model: Any, layers: list[int]) -> Any:
    cut = copy.deepcopy(model)
    drop_layers(cut, layers)
    return cut


@torch.no_grad()
def hidden_states(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """What enters the first layer and leaves each, in float64, taken at the layers."""
    states: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(
            lambda module, args, kwargs, output: states.extend(
                [(args[0] if args else kwargs["hidden_states"])] * (not states)
                + [output if torch.is_tensor(output) else output[0]]
            ),
            with_kwargs=True,
        )
        for layer in layers_of(model)
    ]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return [state.double() for state in states]


def loss(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits.double()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def weights(model: Any, index: int) -> list[torch.Tensor]:
    return [p for name, p in layers_of(model)[index].named_parameters() if not name.endswith("bias")]


def naive_magnitude(power: int, variant: str) -> Callable[..., list[float | None]]:
    def compute(model: Any, ids: torch.Tensor) -> list[float | None]:
        def size(weight: torch.Tensor) -> float:
            total = weight.detach().double().abs().pow(power).sum().item()
            return total ** (1 / power) if variant == "original" else total

        return [sum(size(weight) for weight in weights(model, i)) for i in range(LAYERS)]

    return compute


def naive_taylor(variant: str) -> Callable[..., list[float | None]]:
    def compute(model: Any, ids: torch.Tensor) -> list[float | None]:
        model = copy.deepcopy(model).requires_grad_(True)
        parts = ids.split(10) if variant == "paper" else [ids]
        products: dict[tuple[int, int], torch.Tensor] = {}
        for part in parts:
            model.zero_grad()
            loss(model, part).backward()
            for i in range(LAYERS):
                for k, weight in enumerate(weights(model, i)):
                    if weight.grad is not None:
                        product = (weight * weight.grad).detach().double()
                        products[i, k] = products.get((i, k), 0) + product
        return [sum(p.abs().sum().item() for (j, _), p in products.items() if j == i) for i in range(LAYERS)]

    return compute


@torch.no_grad()
def naive_perplexity(model: Any, ids: torch.Tensor) -> list[float | None]:
    return [loss(without(model, [i]), ids).exp().item() for i in range(LAYERS)]


@torch.no_grad()
def naive_kl(model: Any, ids: torch.Tensor) -> list[float | None]:
    dense = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    found = []
    for i in range(LAYERS):
        cut = without(model, [i])(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
        found.append((dense.exp() * (dense - cut)).sum(-1).mean().item())
    return found


def naive_influence(model: Any, ids: torch.Tensor) -> list[float | None]:
    states = hidden_states(model, ids)
    return [1 - F.cosine_similarity(x, y, dim=-1).mean().item() for x, y in itertools.pairwise(states)]


def naive_influence_of_paper(model: Any, ids: torch.Tensor) -> list[float | None]:
    states = [state.flatten() for state in hidden_states(model, ids)]
    found = [1 - ((x @ y) / (x.norm() * y.norm())).item() for x, y in itertools.pairwise(states)]
    return [*found[:-1], None]


FORMULAS: list[tuple[str, str, Callable[..., list[float | None]]]] = [
    ("magnitude_l1", "original", naive_magnitude(1, "original")),
    ("magnitude_l1", "paper", naive_magnitude(1, "paper")),
    ("magnitude_l2", "original", naive_magnitude(2, "original")),
    ("magnitude_l2", "paper", naive_magnitude(2, "paper")),
    ("taylor", "original", naive_taylor("original")),
    ("taylor", "paper", naive_taylor("paper")),
    ("perplexity", "original", naive_perplexity),
    ("kl", "original", naive_kl),
    ("block_influence", "original", naive_influence),
    ("block_influence", "paper", naive_influence_of_paper),
]


@pytest.mark.parametrize(("criterion", "variant", "formula"), FORMULAS, ids=lambda v: v if isinstance(v, str) else "")
def test_formula(
    model: Any, text: CalibrationSet, criterion: str, variant: str, formula: Callable[..., list[float | None]]
) -> None:
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = score_layers(model, text, [criterion], variant=variant)[criterion]
    expected = formula(model, text.input_ids)
    assert [score is None for score in found.layers] == [score is None for score in expected]
    assert [s or 0.0 for s in found.layers] == pytest.approx([s or 0.0 for s in expected], rel=1e-5)
    assert len({score for score in found.layers if score is not None}) > LAYERS // 2
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("rows", [5, ROWS])
def test_taylor_in_parts(model: Any, text: CalibrationSet, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights a few rows at a time, and one batch or several."""
    monkeypatch.setattr(taylor, "_WEIGHT_ROWS", 7)
    ids = text.input_ids[:rows]
    for variant in ("original", "paper"):
        found = score_layers(model, CalibrationSet.from_ids(ids, "random"), ["taylor"], variant=variant)["taylor"]
        assert found.layers == pytest.approx(naive_taylor(variant)(model, ids), rel=1e-5)


def test_taylor_in_float16_keeps_small_gradients(text: CalibrationSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of one row among many; the head's weights are small, so that a few rows are many."""
    monkeypatch.setattr(passes, "BATCH_TOKENS", LENGTH)
    half = tiny_model("llama")
    half.lm_head.weight.data *= 2.0**-10
    half = half.half()
    found, wanted = (
        score_layers(one, text, ["taylor"])["taylor"].layers for one in (half, copy.deepcopy(half).float())
    )
    assert found == pytest.approx(wanted, rel=0.01)


def test_angular_distance(model: Any, text: CalibrationSet) -> None:
    found = score_layers(model, text, ["angular_distance"])["angular_distance"]
    last = [state[:, -1] for state in hidden_states(model, text.input_ids)]
    assert len(found.blocks) == sum(LAYERS + 1 - n for n in range(1, LAYERS))
    for block, distance in found.blocks.items():
        x, y = last[block[0]], last[block[-1] + 1]
        expected = F.cosine_similarity(x, y, dim=-1).clamp(-1, 1).arccos().mean() / torch.pi
        assert distance == pytest.approx(expected.item(), rel=1e-5)


@torch.no_grad()
def test_perplexity_of_blocks(model: Any, text: CalibrationSet) -> None:
    found = score_layers(model, text, ["perplexity"], lengths=[3])["perplexity"]
    assert found.layers == pytest.approx(naive_perplexity(model, text.input_ids), rel=1e-5)
    for block, perplexity in found.blocks.items():
        expected = loss(without(model, list(block)), text.input_ids).exp().item()
        assert perplexity == pytest.approx(expected, rel=1e-5)
    assert len(found.blocks) == LAYERS - 2


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi", "granite"])
def test_repairability(model_type: str, text: CalibrationSet) -> None:
    """Against `numpy.linalg.lstsq`-like ridge by hand, on the rows that the criterion fits and judges with."""
    model = tiny_model(model_type)
    found = score_layers(model, text, ["repairability"], drop=3)["repairability"]
    assert set(found.blocks) == {(i, i + 1, i + 2) for i in range(1, LAYERS - 2)}
    states, outputs = hidden_states(model, text.input_ids), last_linear_outputs(model, text.input_ids)
    gain = getattr(model.config, "residual_multiplier", 1.0)
    fitted, judged = slice(0, ROWS - ROWS // 5), slice(ROWS - ROWS // 5, ROWS)
    for block, share in found.blocks.items():
        features, change = outputs[block[0] - 1] * gain, states[block[-1] + 1] - states[block[0]]
        x, z = features[fitted].flatten(0, 1), change[fitted].flatten(0, 1)
        best = 1.0
        for strength in (10.0**k for k in range(-6, 4)):
            ridge = strength * (x.T @ x).trace() / x.shape[1] * torch.eye(x.shape[1], dtype=x.dtype)
            solution = torch.linalg.solve(x.T @ x + ridge, x.T @ z)
            left = change[judged] - features[judged] @ solution
            best = min(best, (left.square().sum() / change[judged].square().sum()).item())
        assert share == pytest.approx(best, rel=1e-5)


@torch.no_grad()
def last_linear_outputs(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """What each layer's MLP adds, before any multiplier."""
    names = ("mlp.down_proj", "mlp.c_proj", "mlp.fc2")
    found: list[torch.Tensor] = []
    handles = [
        next(layer.get_submodule(name) for name in names if name in dict(layer.named_modules())).register_forward_hook(
            lambda module, args, output: found.append(output.double())
        )
        for layer in layers_of(model)
    ]
    model(input_ids=ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def test_taylor_needs_gradients(text: CalibrationSet) -> None:
    model = tiny_model("llama")
    with torch.inference_mode():
        inside = copy.deepcopy(model)
        with pytest.raises(CutError, match=r"taylor needs gradients.*use torch.no_grad\(\) instead"):
            score_layers(model, text, ["taylor"])
        assert set(score_layers(model, text, ["taylor", "kl"])) == {"kl"}
    with pytest.raises(CutError, match="a model that was loaded inside it"):
        score_layers(inside, text, ["taylor"])
    with torch.no_grad():
        assert set(score_layers(model, text, ["taylor"])) == {"taylor"}
