"""Enter the method into PEFT's mappings, without importing PEFT (and torch with it) before somebody needs it.

`import hf_layerprune` must be enough for `PeftModel.from_pretrained` to understand a saved adapter, and must not
cost the seconds that importing torch takes. So registration happens at once where PEFT is loaded already, and
otherwise right after PEFT's own import, whoever causes it.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from .versions import check_peft, let_peft_save


def register() -> None:
    """Make PEFT know the method; a second call changes nothing."""
    check_peft()
    from peft import mapping

    from .adapter.config import LayerDropConfig, LayerDropPeftType
    from .adapter.model import LayerDropModel

    # PEFT's `register_peft_method` takes only members of its own enum. The mappings behind it are plain
    # dictionaries that are looked up by value, which a string enum of ours satisfies.
    kind: Any = LayerDropPeftType.LAYER_DROP
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING.setdefault(kind, LayerDropConfig)
    mapping.PEFT_TYPE_TO_TUNER_MAPPING.setdefault(kind, LayerDropModel)
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING.setdefault(kind, LayerDropModel.prefix)
    let_peft_save(kind)


class _RegisteringLoader(importlib.abc.Loader):
    """Loads a module as its own loader would, then registers."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        register()


class _PeftFinder(importlib.abc.MetaPathFinder):
    """Notices the first import of PEFT. Others may only ask whether there is a PEFT, and import it later."""

    _asking = False

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "peft" or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self._asking = False
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisteringLoader(spec.loader)
        return spec


def register_when_peft_is_imported() -> None:
    """Register now if PEFT is loaded, else as soon as it is."""
    if "peft" in sys.modules:
        register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())
