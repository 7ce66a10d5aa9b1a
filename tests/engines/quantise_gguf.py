"""llama.cpp's own quantiser, out of the library in the npm package: what `llama-quantize IN OUT TYPE` calls.

python -m tests.engines.quantise_gguf IN.gguf OUT.gguf TYPE
"""

import ctypes
import sys

from .environments import HOME

TYPES = {"Q8_0": 7, "Q4_K_M": 15}


class _Params(ctypes.Structure):
    """The first two fields of llama.cpp's, and more room than the rest needs."""

    _fields_ = [("threads", ctypes.c_int32), ("type", ctypes.c_int32), ("rest", ctypes.c_byte * 248)]


def main(source: str, target: str, kind: str) -> int:
    """Quantise a file."""
    (path,) = (HOME / "llama.cpp" / "node_modules" / "@node-llama-cpp").glob("*/bins/*/libllama.v*.so")
    library = ctypes.CDLL(str(path))
    library.llama_model_quantize_default_params.restype = _Params
    library.llama_model_quantize.restype = ctypes.c_uint32
    library.llama_model_quantize.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_Params)]
    library.llama_backend_init()
    params = library.llama_model_quantize_default_params()
    params.threads, params.type = 1, TYPES[kind]
    return library.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(params))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
