"""Run a script with FSDP on the CPU: `accelerate launch --config_file FSDP.yaml fsdp_on_cpu.py SCRIPT ...`.

accelerate (1.15) ignores an FSDP config where it finds no accelerator: its state knows processes on CPUs as MULTI_CPU,
from which it never goes on to FSDP, and trains with DDP without saying so. torch itself has FSDP2 for the CPU, with gloo.
So the state is told that these are GPUs; everything behind that is accelerate's and torch's own.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType

plain = PartialState.__init__


def init(self: PartialState, cpu: bool = False, **kwargs: Any) -> None:
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    first = not PartialState._shared_state
    plain(self, cpu, **kwargs)
    if first:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = init
    del sys.argv[0]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        print("trained by", AcceleratorState().distributed_type.value, flush=True)
