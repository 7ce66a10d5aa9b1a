"""The table of architectures: prove every causal model type, and write what came out.

python -m tests.architectures                     prove all, print what fails
python -m tests.architectures llama gpt2          prove some
python -m tests.architectures --write             prove all, then write docs/architectures.md and proven.txt
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from pathlib import Path

from hf_layerprune import families

from .matrix import cuts, prove
from .tiny_models import MODEL_TYPES, tiny_config

ROOT = Path(__file__).parents[1]
DOCUMENT = ROOT / "docs" / "architectures.md"
PROVEN = ROOT / "hf_layerprune" / "families" / "proven.txt"

HEADER = """\
# Architectures

Every causal language model type of transformers {version}: {proven} proven, {refused} refused, no third state. An
unknown type is refused too. Made by `make docs`; do not edit.

*Proven* means: a tiny random model of the type, with its own alternations between layers, was cut at its tail
and, at an odd number of places that are not neighbours, in its middle, and each time

1. the cut model in memory and the same model saved and reloaded by plain transformers gave the same logits, to
   the last bit;
2. both gave the logits of the dense model in which each dropped layer hands its input on unchanged;
3. greedy generation gave the same tokens with the key-value cache and without it;
4. the saved config passed transformers' own validation;
5. the same cut made on disk, and the model loaded without the dropped layers, had the same tensors and logits.

Single cuts of a proven type can still be refused, with a reason: where layers share keys and values, where a
config can only describe a period, or where a layer can stand at one place only.

| model type | tail cut | middle cut | fields rewritten besides the layer count |
|---|---|---|---|
"""


def middle_fields(model_type: str) -> list[str]:
    """The config fields that the middle cut of a type rewrites, without the layer count."""
    config = tiny_config(model_type)
    cut = families.make_cut(config, cuts(model_type, config)["middle"])
    before = families.text_config(config).to_dict()
    after = families.text_config(families.cut_config(config, cut)).to_dict()
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    return sorted(changed - {families.MARKER, families.count_field(families.text_config(config))})


def render() -> str:
    """The document, from the families table and the tiny configs, without running the proofs."""
    proven = [t for t in MODEL_TYPES if t not in families.REFUSED]
    refused = [t for t in MODEL_TYPES if t in families.REFUSED]
    lines = [HEADER.format(version=version("transformers"), proven=len(proven), refused=len(refused)).rstrip("\n")]
    for model_type in proven:
        both = cuts(model_type, tiny_config(model_type))
        spelled = [", ".join(map(str, both[name])) for name in ("tail", "middle")]
        fields = ", ".join(f"`{name}`" for name in middle_fields(model_type))
        lines.append(f"| {model_type} | {spelled[0]} | {spelled[1]} | {fields} |")
    lines += ["", "## Refused", "", "| model type | reason |", "|---|---|"]
    lines += [f"| {model_type} | {families.REFUSED[model_type]} |" for model_type in refused]
    return "\n".join(lines) + "\n"


def proven_types() -> list[str]:
    """What proven.txt lists: the types that are not refused, and the text decoders inside them."""
    types = [t for t in MODEL_TYPES if t not in families.REFUSED]
    return sorted({*types, *(families.text_config(tiny_config(t)).model_type for t in types)})


def _prove(model_type: str) -> tuple[str, str | None, float]:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    start = time.perf_counter()
    try:
        prove(model_type)
    except Exception as error:
        return model_type, f"{type(error).__name__}: {error}", time.perf_counter() - start
    return model_type, None, time.perf_counter() - start


def main() -> int:
    """Prove, report, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="model types; all by default")
    parser.add_argument("--write", action="store_true", help="write the document and proven.txt if all is proven")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    args = parser.parse_args()
    if args.write and args.types:
        parser.error("--write goes with all types")
    if args.write:
        PROVEN.write_text("\n".join(proven_types()) + "\n")
    types = args.types or [t for t in MODEL_TYPES if t not in families.REFUSED]
    failed = 0
    with ProcessPoolExecutor(args.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_prove, model_type) for model_type in types]):
            model_type, error, seconds = done.result()
            failed += error is not None
            print(f"{model_type:32} {seconds:6.1f} s  {error or 'proven'}", flush=True)
    print(f"{len(types) - failed} of {len(types)} proven")
    if args.write and not failed:
        DOCUMENT.write_text(render())
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
