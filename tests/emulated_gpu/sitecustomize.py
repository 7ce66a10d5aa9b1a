"""Give torch the emulated card, in this process and in those that it starts; see `__main__.py`."""

import ctypes
import importlib.abc
import importlib.machinery
import os
import sys
from types import ModuleType
from typing import Any

LIBRARY = os.environ["EMULATED_GPU"]


class _Torch(importlib.abc.MetaPathFinder):
    """Loads the device before torch, which looks for one when it is imported, and adapts `torch.cuda` after it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != "torch" or (spec := importlib.machinery.PathFinder.find_spec(name, path)) is None:
            return None
        loader: Any = spec.loader
        load = loader.exec_module

        def with_card(module: ModuleType) -> None:
            ctypes.CDLL(LIBRARY)
            load(module)
            import torch_cuda

            torch_cuda.install(LIBRARY)

        loader.exec_module = with_card
        return spec


if os.environ.get("CUDA_VISIBLE_DEVICES") != "":
    sys.meta_path.insert(0, _Torch())
