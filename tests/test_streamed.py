"""A model on the CPU whose layers run on a GPU: what is moved there, and when. A stand-in for the GPU notes it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from hf_layerprune.adapter import prepare, pruning
from hf_layerprune.calibration import self_text
from hf_layerprune.runtime import walk
from hf_layerprune.runtime.loading import load_base
from hf_layerprune.runtime.mapping import load_mapped
from hf_layerprune.runtime.walk import LayerWalk
from hf_layerprune.stages.curve import quality_curve
from hf_layerprune.stages.prune import prune_to
from hf_layerprune.stages.rank import rank
from hf_layerprune.stages.requests import PruneRequest, RankRequest

from .heal_makers import word_tokenizer
from .measure_models import write_gguf
from .test_walk import walked
from .tiny_models import tiny_input, tiny_model


class Card:
    """Notes what is moved to it."""

    def __init__(self) -> None:
        self.fits = True  # whether it has room for a whole model
        self.device: Any = None
        self.moved: list[list[Any]] = []  # what was on it, each time that something was moved there
        self.now: list[Any] = []

    @contextmanager
    def moved_to(self, device: Any, *modules: Any) -> Iterator[None]:
        if not self.fits and device != "home" and any(isinstance(module, PreTrainedModel) for module in modules):
            raise torch.OutOfMemoryError("CUDA out of memory.")
        before, self.device = self.now, device
        self.now = [*before, *modules]
        self.moved.append(self.now)
        try:
            yield
        finally:
            self.now = before


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    card = Card()
    monkeypatch.setattr(walk, "moved_to", card.moved_to)
    monkeypatch.setattr(LayerWalk, "_is_streaming", True)
    return card


@pytest.fixture
def base(tmp_path: Path) -> str:
    tiny_model("llama").save_pretrained(tmp_path / "base")
    word_tokenizer().save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def test_one_layer_at_a_time(card: Card) -> None:
    model, ids = tiny_model("llama"), tiny_input()
    with torch.no_grad():
        wanted = model(ids).logits
    layers = LayerWalk(model)
    # Once in the model's own forward pass, and once alone.
    assert card.moved == [[layer] for layer in [*model.model.layers] * 2]
    assert torch.allclose(walked(layers, ids), wanted, rtol=1e-4, atol=1e-5)
    assert all("forward" not in vars(layer) for layer in model.model.layers)


FEW: dict[str, Any] = {"calibration_samples": 8, "calibration_length": 16}
COMMANDS: dict[str, Callable[[str, Path], object]] = {
    "prune": lambda base, out: prune_to(PruneRequest(base, out, drop_layers=[3, 4], repair="linear", **FEW)),
    "prune by text": lambda base, out: prune_to(PruneRequest(base, out, drop=2, criterion="block_influence", **FEW)),
    "rank": lambda base, out: rank(RankRequest(base, criteria=["block_influence"], drop=2, **FEW)),
    "curve": lambda base, out: quality_curve(base, curve_up_to=1, **FEW),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_model_that_writes_is_on_one_device(
    command: str, card: Card, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layers too, whatever was moved before."""
    whole: list[bool] = []
    write = self_text.generate_text

    def note(model: Any, *args: Any) -> torch.Tensor:
        whole.append(card.now == [model])
        return write(model, *args)

    monkeypatch.setattr(self_text, "generate_text", note)
    COMMANDS[command](base, tmp_path / "out")
    assert whole == [True]
    assert card.now == []


@pytest.mark.parametrize(
    "how", [{}, {"dtype": "bfloat16"}, {"adapter": True}, {"adapter": True, "check": True}], ids=str
)
def test_a_repair_is_fitted_on_the_accelerator(
    how: dict[str, Any], base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the cut is written afterwards."""
    there, devices = torch.device("cpu"), []

    def note(model: PreTrainedModel, device: torch.device | None = None) -> LayerWalk:
        devices.append(device)
        return LayerWalk(model, device=device)

    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: there)
    monkeypatch.setattr(prepare, "LayerWalk", note)
    prune_to(PruneRequest(base, tmp_path / "out", drop_layers=[3, 4], repair="linear", **FEW, **how))
    assert devices == [there]


@pytest.mark.parametrize("dtype", ["auto", "float32"])
def test_a_repair_is_fitted_in_the_type_that_a_gguf_file_is_unpacked_to(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    types: list[torch.dtype] = []

    def loaded(*args: Any, **kwargs: Any) -> PreTrainedModel:
        types.append((model := load_mapped(*args, **kwargs)).dtype)
        return model

    monkeypatch.setattr(pruning, "load_mapped", loaded)
    base = write_gguf(tmp_path / "tiny.gguf", layers=8)
    prune_to(PruneRequest(str(base), tmp_path / "out", drop_layers=[3, 4], repair="linear", dtype=dtype, **FEW))
    assert types == [torch.bfloat16 if dtype == "auto" else torch.float32]
    assert load_base(tmp_path / "out", dtype="auto").dtype == types[0]


@pytest.mark.parametrize("when", ["it is moved", "it writes"])
def test_a_model_that_is_too_large_for_the_card_writes_where_it_is(
    when: str, card: Card, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    layers = LayerWalk(tiny_model("llama"), device="cpu")
    monkeypatch.setattr(layers, "_storage_device", "home")
    card.fits = when == "it writes"
    tries: list[str] = []

    def write() -> str:
        assert card.now == [layers.model]
        tries.append(str(card.device))
        if when == "it writes" and len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return "text"

    assert layers.with_whole_model(write) == "text"
    assert tries == (["cpu", "home"] if when == "it writes" else ["home"])
    assert "cpu is too small for the whole model, so it runs on home for now" in caplog.text
    card.fits = True
    with pytest.raises(ZeroDivisionError):
        layers.with_whole_model(lambda: 1 / 0)
