"""Borrowed neurons: where a neuron's rows are, which neurons are chosen, and what the layer has then."""

from __future__ import annotations

import itertools

import pytest
import torch

from hf_layerprune import LayerPruneError, families
from hf_layerprune.repair.borrow import find_readers
from hf_layerprune.repair.fit import fit_repair
from hf_layerprune.repair.subset import prepare_refit, select_features
from hf_layerprune.repair.writers import find_writers
from hf_layerprune.runtime.walk import LayerWalk

from .repair_proofs import fitted_as_written
from .test_repair import calibration
from .tiny_models import tiny_input, tiny_model


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("llama", ("mlp.gate_proj", "mlp.up_proj")),
        ("phi3", ("mlp.gate_up_proj",)),  # both in one module
        ("gpt2", ("mlp.c_fc",)),  # a Conv1D with a bias
        ("opt", ("fc1",)),  # in the layer itself
        ("bitnet", None),  # a norm over all neurons
        ("mamba", None),  # a convolution along the text
    ],
)
def test_rows_of_neurons_are_found_by_trying(model_type, names):
    model = tiny_model(model_type)
    walk = LayerWalk(model)
    batch = walk.begin(tiny_input())
    layer = walk.layers[0]
    with walk.layer(0) as run:
        readers = find_readers(layer, find_writers(layer, run, batch)[0], run, batch)
    assert (readers.names if readers else None) == names
    if readers:
        rows = readers.rows_of(layer)
        for name, value in readers.to_parameters(layer, rows).items():
            assert torch.equal(value, layer.get_parameter(name))


def test_survivors_are_the_best_subset():
    """Where a subset can be searched for exhaustively, it is found."""
    torch.manual_seed(0)
    x = torch.randn(400, 7, dtype=torch.float64) @ torch.randn(7, 7, dtype=torch.float64)
    weight = torch.randn(7, 3, dtype=torch.float64)
    wanted = torch.randn(400, 3, dtype=torch.float64) + x[:, :4] @ torch.randn(4, 3, dtype=torch.float64)
    errors = {}
    for kept in itertools.combinations(range(7), 4):
        some = x[:, list(kept)]
        errors[kept] = (wanted - some @ torch.linalg.lstsq(some, wanted).solution).square().sum().item()
    refit = prepare_refit([(x, wanted - x @ weight)], weight, 1e-12, 400)
    assert tuple(select_features(refit, 7, 4).tolist()) == min(errors, key=errors.__getitem__)


def test_weights_are_refitted_alike_by_tokens_and_by_sums():
    torch.manual_seed(0)
    x, change, weight = (torch.randn(*shape, dtype=torch.float64) for shape in ((20, 30), (20, 4), (30, 4)))
    rows = [(x[:12][None], change[:12][None]), (x[12:][None], change[12:][None])]
    by_tokens, by_sums = (prepare_refit(rows, weight, 0.1, tokens) for tokens in (20, 30))
    for some in (torch.arange(30), torch.arange(0, 30, 2)):
        for one, other in zip(by_tokens(some), by_sums(some), strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("model_type", "drop"), [("phi3", [3, 4]), ("gpt2", [2, 5]), ("gpt_neox", [3, 4])])
def test_borrowed_neurons_explain_more_than_the_layers_own(model_type, drop):
    model = tiny_model(model_type)
    rows = calibration(model, samples=400)
    refit, borrow = (fit_repair(model, drop, rows, method) for method in ("refit", "borrow"))
    first, other = refit.cuts[0], borrow.cuts[0]
    assert other["borrowed_neurons"] > 0
    assert other["unexplained_share"] < 0.97 * first["unexplained_share"]
    changed, own = borrow.by_layer()[first["layers"][0] - 1], LayerWalk(model).layers[first["layers"][0] - 1]
    assert all(value.shape == own.get_parameter(name).shape for name, value in changed.items())


@pytest.mark.parametrize("model_type", ["llama", "phi3", "gpt2"])
def test_the_projection_is_the_least_squares_one_for_the_neurons(model_type):
    model = tiny_model(model_type)
    rows = calibration(model, samples=5, length=64)
    repair = fit_repair(model, [2, 3, 5], rows, "borrow")
    assert any(cut["borrowed_neurons"] for cut in repair.cuts)
    fitted_as_written(model, repair, (2, 3, 5), rows)


def test_a_twin_is_borrowed_whole():
    """A dropped layer that does what its neighbour's MLP could do is made up for."""
    model = tiny_model("llama")
    with torch.no_grad():
        layers = model.model.layers
        layers[3].self_attn.o_proj.weight.zero_()
        layers[2].mlp.down_proj.weight.mul_(0.01)
        layers[3].mlp.down_proj.weight.mul_(2.0)
    rows = calibration(model, samples=200)
    shares = [fit_repair(model, [3], rows, method).cuts[0]["unexplained_share"] for method in ("refit", "borrow")]
    assert shares[1] < 0.01
    assert shares[0] > 0.1


def test_where_borrowing_gains_nothing_the_layer_is_refitted():
    """With few rows, borrowed neurons explain less of those that are held out."""
    model = tiny_model("llama")
    refit, borrow = (
        fit_repair(model, [3, 4], calibration(model, samples=5), method) for method in ("refit", "borrow")
    )
    assert borrow.cuts[0].pop("borrowed_neurons") == 0
    assert borrow.cuts == refit.cuts
    assert borrow.tensors.keys() == refit.tensors.keys()
    assert all(torch.equal(value, refit.tensors[key]) for key, value in borrow.tensors.items())


def test_what_is_not_made_of_neurons_is_refused(monkeypatch):
    model = tiny_model("bitnet")
    with pytest.raises(LayerPruneError, match=r"'bitnet' has no layer for repair='borrow'; it takes linear, refit"):
        fit_repair(model, [3, 4], calibration(model), "borrow")
    monkeypatch.setattr(families, "proven_stages", dict)  # as for a type that is not in the table
    with pytest.raises(LayerPruneError, match="finds no neurons in layer 2"):
        fit_repair(model, [3, 4], calibration(model), "borrow")
