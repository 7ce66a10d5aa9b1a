"""Register the method with PEFT, without importing PEFT (and torch with it) before it is needed.

`import hf_layerprune` must be enough for `PeftModel.from_pretrained` to understand a saved adapter, and must not
cost the seconds that importing torch takes. So registration happens at once where PEFT is loaded already, and
otherwise right after PEFT's own import, whoever causes it. What the method itself imports must therefore not import PEFT
at its top: it would be half-imported when it is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .versions import let_peft_save

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec


def register() -> None:
    """Register the method with PEFT; a second call changes nothing."""
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


class _PeftFinder:
    """Registers after the first import of PEFT. Others may only ask whether there is a PEFT, and import it later."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        finders = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        others = (finder.find_spec(name, path, target) for finder in finders)
        spec = next(filter(None, others), None)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                register()

            loader.exec_module = execute_and_register
        return spec


def register_when_peft_is_imported() -> None:
    """Register now if PEFT is loaded, else as soon as it is."""
    if "peft" in sys.modules:
        register()
    elif not any(isinstance(finder, _PeftFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _PeftFinder())
