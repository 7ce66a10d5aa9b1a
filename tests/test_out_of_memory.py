"""When memory runs out, batches are halved and the work goes on with the same result, on a CPU as on a GPU.

A layer refuses more than a few rows with the error that torch raises for a full GPU. `test_measure_distance.py`,
`test_measure_eval.py` and `test_measure_bench.py` do the same for what is measured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_layerprune.cut.memory import drop_layers
from hf_layerprune.errors import LayerPruneError
from hf_layerprune.heal.isolation import rows_are_isolated
from hf_layerprune.heal.self_data import RowWriter
from hf_layerprune.heal.store import StateCache, create_cache_folders
from hf_layerprune.runtime import memory
from hf_layerprune.runtime.head import OutputHead
from hf_layerprune.runtime.memory import free_bytes, is_out_of_memory
from hf_layerprune.runtime.walk import LayerWalk

from .heal_makers import Bench, losses, tuned, word_tokenizer
from .tiny_models import tiny_input, tiny_model

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB"


@contextmanager
def full(layer: torch.nn.Module, most: int, backward: bool = False) -> Any:
    """Let a layer run out of memory with more than a few rows, on its way forward or back."""
    refused = []

    def check(states: torch.Tensor) -> None:
        if len(states) > most:
            refused.append(len(states))
            raise torch.OutOfMemoryError(MESSAGE)

    if backward:
        hook = layer.register_full_backward_pre_hook(lambda module, gradients: check(gradients[0]))
    else:
        hook = layer.register_forward_pre_hook(lambda module, args: check(args[0]))
    try:
        yield refused
    finally:
        hook.remove()


@pytest.mark.parametrize(("backward", "most"), [(False, 2), (True, 1)])
def test_training_halves_its_batches_and_learns_the_same(
    llama: Bench, backward: bool, most: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the gradients of half a step have been added up already, to the head's among others."""
    settings = {"method": "lm_head+last1", "loss": "ce+kd", "gradient_accumulation_steps": 2, "max_steps": 3}
    wanted, trainer = llama.trainer(**settings), llama.trainer(**settings)
    wanted.train()
    caplog.set_level(logging.WARNING)
    with full(trainer.plain_model.model.layers[-1], most, backward) as refused:
        trainer.train()
    assert refused == [4] if most == 2 else [4, 2]
    assert f"continuing with batches of {most}" in caplog.text
    assert losses(trainer) == pytest.approx(losses(wanted), rel=1e-4)
    logged = [[entry.get("num_tokens") for entry in one.state.log_history] for one in (trainer, wanted)]
    assert logged[0] == logged[1]
    for name, value in tuned(wanted).items():
        assert torch.allclose(tuned(trainer)[name], value, atol=1e-5), name


def test_a_later_batch_of_a_step_runs_the_step_again(llama: Bench) -> None:
    settings = {"method": "lm_head+last1", "gradient_accumulation_steps": 3, "max_steps": 2}
    wanted, trainer = llama.trainer(**settings), llama.trainer(**settings)
    wanted.train()
    calls = []

    def third(module: Any, args: Any) -> None:
        if module.training and torch.is_grad_enabled():
            calls.append(len(args[0]))
            if len(calls) == 3:
                raise torch.OutOfMemoryError(MESSAGE)

    trainer.plain_model.model.layers[-1].register_forward_pre_hook(third)
    trainer.train()
    assert calls[:9] == [4, 4, 4, 2, 2, 2, 2, 2, 2]
    assert losses(trainer) == pytest.approx(losses(wanted), rel=1e-4)
    for name, value in tuned(wanted).items():
        assert torch.allclose(tuned(trainer)[name], value, atol=1e-5), name


def test_a_single_row_that_does_not_fit(llama: Bench) -> None:
    trainer = llama.trainer(method="last1", max_steps=1)
    with (
        full(trainer.plain_model.model.layers[-1], 0, backward=True),
        pytest.raises(LayerPruneError, match=r"a single row of \d+ tokens; use a smaller --max_length"),
    ):
        trainer.train()


def test_rows_that_are_one_sequence_are_not_divided(llama: Bench) -> None:
    trainer = llama.trainer(method="last1", max_steps=1)
    trainer.padding_free = True
    advice = "--per_device_train_batch_size 2 --gradient_accumulation_steps 2 gives the same result"
    with full(trainer.plain_model.model.layers[-1], 2), pytest.raises(LayerPruneError, match=advice):
        trainer.train()


def test_what_is_computed_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lengths, sizes = [5, 3, 4, 5, 2, 5, 1, 5], []

    def run(rows: list[int]) -> list[torch.Tensor]:
        sizes.append(len(rows))
        if len(rows) > most:
            raise torch.OutOfMemoryError(MESSAGE)
        return [torch.full((lengths[row], 3), float(row)) for row in rows]

    most = 2
    cache = StateCache(tmp_path / "states", lengths, 12)
    create_cache_folders([cache])
    cache.fill(run, 1000, "test")
    assert sizes == [8, 4, 2, 2, 2, 2]  # no more tokens than two of the longest rows have
    assert "continuing with batches of 2" in caplog.text
    assert all((states == row).all() for row, states in enumerate(cache.read(range(8))))
    most = 0
    cache.delete()
    with pytest.raises(LayerPruneError, match="out of memory with a single row"):
        cache.fill(run, 1000, "test")


@pytest.mark.parametrize("what", ["rows", "answers"])
def test_what_the_dense_model_writes(what: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), word_tokenizer()
    prompts = [[3, 4], [5], [6, 7, 8]] * 2
    write: dict[str, Callable[[Path], Any]] = {
        "rows": lambda folder: RowWriter(model, tokenizer, folder, 0).generate_rows(7, 9)["input_ids"][:],
        "answers": lambda folder: RowWriter(model, tokenizer, folder, 0)._generate_answers(prompts, 6, 0.0),
    }
    wanted = write[what](tmp_path / "all")
    with full(model.model.layers[0], 2) as refused:
        assert write[what](tmp_path / "few") == wanted
    assert refused


def test_what_torch_holds_for_tensors_to_come_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    figures = {"mem_get_info": (100, 1000), "memory_reserved": 70, "memory_allocated": 30}
    for name, figure in figures.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, figure=figure: figure)
    assert free_bytes(torch.device("cuda")) == 140


GROUPS = {
    # The process's groups, a group that exists, and the names of its files.
    "a container": ("0::/", ".", 2),
    "a container that sees the host's groups": ("0::/docker/1f", ".", 2),
    "a job": ("0::/slurm/job_1/step_0", "slurm/job_1", 2),
    "a container, version 1": ("3:cpu,cpuacct:/docker/1f\n2:memory:/docker/1f\n0::/", "memory", 1),
    "a job, version 1": ("9:cpuset:/\n4:memory:/slurm/job_1/step_0\n", "memory/slurm/job_1", 1),
}


@pytest.mark.parametrize(("own", "group", "version"), GROUPS.values(), ids=GROUPS)
@pytest.mark.parametrize("limit", ["1000000", "100", "max"])
def test_the_memory_of_a_container_or_a_job_is_limited(
    own: str, group: str, version: int, limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total, names = "", ("memory.max", "memory.current")
    if version == 1:
        total, names = "total_", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        limit = limit.replace("max", str((1 << 63) - 4096))
    (folder := tmp_path / group).mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, (limit, "500000"), strict=True):
        (folder / name).write_text(f"{text}\n")
    stat = f"file 7\n{total}active_file 10000\n{total}inactive_file 90000\nactive_anon 400000\n"
    (folder / "memory.stat").write_text(stat)
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(memory, "_GROUPS", tmp_path)
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    free = free_bytes(torch.device("cpu"))
    if limit.startswith("1"):
        assert free == max(0, int(limit) - 400000)
    else:
        assert free > 1 << 20


TRIES = {
    # What runs a model a few times to see whether it can be run, and how often a layer runs then.
    "walk": (LayerWalk, 2),
    "head": (OutputHead, 3),
    "cut": (lambda model: drop_layers(model, [3, 4]), 2),
}


@pytest.mark.parametrize(("what", "run"), [(what, run) for what, (_, runs) in TRIES.items() for run in range(runs)])
def test_a_full_gpu_is_not_taken_for_a_model_that_can_not_be_run(what: str, run: int) -> None:
    """In any of its runs; the model is as it was."""
    model, calls = tiny_model("llama"), []

    def fill(module: Any, args: Any) -> None:
        calls.append(module)
        if len(calls) == run + 1:
            raise torch.OutOfMemoryError(MESSAGE)

    with torch.no_grad():
        wanted = model(tiny_input()).logits
    hook = model.model.layers[2].register_forward_pre_hook(fill)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        TRIES[what][0](model)
    hook.remove()
    with torch.no_grad():
        assert torch.equal(model(tiny_input()).logits, wanted)


@torch.no_grad()
def test_rows_are_not_said_to_see_each_other_where_the_gradients_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = tiny_model("llama"), tiny_input()[:, :5].expand(2, -1)

    def states(rows: list[int]) -> list[torch.Tensor]:
        states = model.model(ids[rows]).last_hidden_state
        return list(states * (1 + (len(rows) - 1) * 1e-3))  # as rounding makes them, if tokens go to other experts

    def grad(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError(MESSAGE)

    run = [0, 1], states, lambda of, rows: list(of), model, 0
    assert rows_are_isolated(*run)
    monkeypatch.setattr(torch.autograd, "grad", grad)
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        rows_are_isolated(*run)


def test_a_matrix_product_without_room_for_its_workspace() -> None:
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED"))
