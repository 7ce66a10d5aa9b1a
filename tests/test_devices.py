"""Where weights are during healing and after it, as far as a CPU can show; `test_gpu.py` has the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_layerprune.heal.teacher import Teacher
from hf_layerprune.runtime.head import Head
from hf_layerprune.runtime.prefix import Prefix

from .test_heal_trainer import Bench


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("llama"))


def test_a_teacher_that_was_passed_goes_back_in_one_piece(tmp_path: Path) -> None:
    """To the meta device in place of the CPU, and from the CPU in place of a card."""
    bench = Bench(tmp_path)
    student = AutoModelForCausalLM.from_pretrained(bench.pruned)
    prefix = Prefix(student, 4)
    prefix.run(input_ids=torch.tensor([[3, 4, 5]]))
    teacher = Teacher(bench.dense, student, prefix)
    assert teacher.shares
    teacher._home = torch.device("meta")
    wanted = bench.dense.lm_head.weight.detach().clone()
    names = set(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict())
    head = teacher.let_go(torch.device("cpu"), Head())
    assert {p.device.type for p in (*bench.dense.parameters(), *bench.dense.buffers())} == {"meta"}
    assert set(bench.dense.state_dict()) == names
    assert head.weight is not None
    assert torch.equal(head.weight, wanted)
