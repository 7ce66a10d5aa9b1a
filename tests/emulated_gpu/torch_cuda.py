"""What `torch.cuda` says of the emulated card."""

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

TOTAL = 16 << 30
_kept: list[torch.library.Library] = []


class Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.time = 0.0

    def record(self, stream: Any = None) -> None:
        self.time = time.perf_counter()

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Event) -> float:
        return 1e3 * (other.time - self.time)


class Stream:
    device, cuda_stream, stream_id, device_index, device_type = torch.device("cuda", 0), 0, 0, 0, 1

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, other: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: Any = None) -> Event:
        return event or Event()


def install(library: str) -> None:
    """Put the functions of one card into `torch.cuda`."""
    spec: Any = importlib.util.spec_from_file_location("device", library)
    device = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(device)
    card = SimpleNamespace(
        name="emulated", major=9, minor=0, total_memory=TOTAL, multi_processor_count=1, warp_size=32, gcnArchName="",
        uuid="0",
    )  # fmt: skip

    def memory() -> dict[str, int]:
        kinds = ("allocated", "reserved", "active", "inactive_split")
        return {f"{kind}_bytes.all.{when}": size() for kind in kinds for when, size in sizes.items()}

    sizes = {"current": device.held, "peak": device.most}
    answers: dict[str, Any] = {
        "is_available": True, "_is_compiled": True, "is_initialized": True, "is_bf16_supported": True,
        "is_current_stream_capturing": False, "device_count": 1, "_device_count_nvml": 1, "current_device": 0,
        "get_device_name": card.name, "get_device_capability": (9, 0), "get_device_properties": card,
        "_exchange_device": 0, "_maybe_exchange_device": 0,
    }  # fmt: skip
    nothing = (
        "_lazy_init", "init", "set_device", "synchronize", "empty_cache", "ipc_collect", "set_stream", "manual_seed",
        "manual_seed_all", "seed_all", "set_rng_state", "set_rng_state_all",
    )  # fmt: skip
    found = {name: lambda *args, _value=value, **kwargs: _value for name, value in answers.items()}
    found |= {name: lambda *args, **kwargs: None for name in nothing}
    found |= {f"memory_{kind}": lambda *args: device.held() for kind in ("allocated", "reserved")}
    found |= {f"max_memory_{kind}": lambda *args: device.most() for kind in ("allocated", "reserved")}
    found |= {
        "reset_peak_memory_stats": lambda *args: device.forget(),
        "memory_stats": lambda *args: memory(),
        "mem_get_info": lambda *args: (TOTAL - device.held(), TOTAL),
        "get_rng_state": lambda *args: torch.get_rng_state(),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "current_stream": lambda *args: Stream(),
        "default_stream": lambda *args: Stream(),
        "stream": lambda *args: contextlib.nullcontext(),
    }
    vars(torch.cuda).update(found, Event=Event, Stream=Stream, default_generators=(torch.default_generator,))
    inside: dict[str, Any] = {"getDeviceCount": 1, "getDevice": 0, "getCurrentRawStream": 0, "init": None}
    for name, value in inside.items():
        setattr(torch._C, f"_cuda_{name}", lambda *args, _value=value: _value)
    sys.meta_path.insert(0, _Bitsandbytes())


class _Bitsandbytes(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """In place of bitsandbytes' kernels for GPUs, those for the CPU."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        ours = ("bitsandbytes.backends.cuda", "bitsandbytes.backends.cuda.ops")
        return importlib.machinery.ModuleSpec(name, self, is_package=name == ours[0]) if name in ours else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        if not module.__name__.endswith(".ops"):
            return
        library = torch.library.Library("bitsandbytes", "IMPL")
        _kept.append(library)  # its kernels are unregistered when it is collected
        for name in torch._C._dispatch_get_all_op_names():
            space, _, own = name.partition("::")
            if space == "bitsandbytes" and not own.endswith(".out"):
                packet, _, overload = own.partition(".")
                operator = getattr(getattr(torch.ops.bitsandbytes, packet), overload or "default")
                library.impl(own, _by_the_cpu(operator), "CUDA")


def _by_the_cpu(operator: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        devices = {one.device for one in (*args, *kwargs.values()) if isinstance(one, torch.Tensor)}
        if len(devices) > 1:
            raise RuntimeError(f"{operator} got tensors on {devices}")
        result = operator(*map(_cpu, args), **{name: _cpu(value) for name, value in kwargs.items()})
        return tuple(map(_card, result)) if isinstance(result, tuple | list) else _card(result)

    return run


def _cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value


def _card(value: Any) -> Any:
    return value.cuda() if isinstance(value, torch.Tensor) else value
