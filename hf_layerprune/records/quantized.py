"""How a model was quantised, according to its config."""

from __future__ import annotations

from typing import Any

# Rounding to the nearest step, without data: the same weights give the same bytes.
_REPEATABLE = ("bitsandbytes", "torchao")
_PACKAGES = {
    "bitsandbytes": "bitsandbytes>=0.50", "torchao": "torchao", "gptq": "gptqmodel", "awq": "gptqmodel",
    "compressed-tensors": "compressed-tensors",
}  # fmt: skip


def quantization_method(settings: Any) -> str:
    """The method of a `quantization_config`: the name of a package for most, and `"unknown"` if it has none."""
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return method if isinstance(method, str) and method else "unknown"


def is_repeatable_method(settings: Any) -> bool:
    """Whether quantising the same weights with this `quantization_config` again is known to give the same bytes."""
    return quantization_method(settings) in _REPEATABLE


def quantization_package(settings: Any) -> str | None:
    """The package that transformers needs to load a model with this `quantization_config`, if that is known here."""
    return _PACKAGES.get(quantization_method(settings))


def describe_quantization(settings: Any) -> str:
    """A `quantization_config` in a few words: its method and, if it has one, its number type: `bitsandbytes, nf4`."""
    fields = settings if isinstance(settings, dict) else {}
    kind: Any = fields.get("quant_type") or fields.get("format")
    if isinstance(kind, dict):  # of torchao
        default = kind.get("default")
        kind = default.get("_type") if isinstance(default, dict) else default
    if fields.get("load_in_4bit"):
        kind = fields.get("bnb_4bit_quant_type")
    elif fields.get("load_in_8bit"):
        kind = "int8"
    elif kind is None and isinstance(fields.get("bits"), int):
        kind = f"{fields['bits']} bits"
    return f"{quantization_method(fields)}, {kind}" if isinstance(kind, str) else quantization_method(fields)
