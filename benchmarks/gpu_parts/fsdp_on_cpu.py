"""Run a script with FSDP on the CPU: `accelerate launch --config_file FSDP.yaml fsdp_on_cpu.py SCRIPT ...`.

accelerate (1.15) silently ignores an FSDP config if there is no accelerator: its state has the type MULTI_CPU, for which it
trains with DDP. torch itself supports FSDP2 on the CPU, with gloo. So the state is told that the processes have GPUs;
everything else is accelerate's and torch's own code.
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
