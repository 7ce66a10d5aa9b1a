"""Time a whole and a cut GGUF file in llama.cpp, in turns, beside the ratio that bytes and multiplications allow.

    python -m tests.engines llama.cpp --models llama   # once: installs llama.cpp under .engines/
    python benchmarks/engines.py --drop 12-18 --model model.gguf

Tokens per second of the process's own CPU time, on one thread, so that a busy machine matters less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
ENGINE = ROOT / ".engines" / "llama.cpp"


def limits(dense: Path, cut: Path) -> dict[str, float]:
    """What a cut can bring at most.

    Args:
        dense (`Path`): The whole model.
        cut (`Path`): The cut one.

    Returns:
        `dict[str, float]`: For prefill, the ratio of the layers' parameters, since only the last token goes through the
            head; for decoding, that of all bytes, which is right where embeddings and head are the same tensor.
    """
    from gguf import GGUFReader

    sizes = {}
    for which, path in (("dense", dense), ("cut", cut)):
        tensors = GGUFReader(path).tensors
        layers = sum(int(tensor.n_elements) for tensor in tensors if tensor.name.startswith("blk."))
        sizes[which] = {"prefill": layers, "decode": sum(int(tensor.n_bytes) for tensor in tensors)}
    return {phase: sizes["dense"][phase] / sizes["cut"][phase] for phase in ("prefill", "decode")}


def main() -> int:
    """Cut, time, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file")
    parser.add_argument("--drop", default="12-18", help="layers to drop")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prefill", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=64, help="tokens to generate")
    args = parser.parse_args()
    if not (ENGINE / "installed.txt").is_file():
        parser.error("llama.cpp is not installed; run: python -m tests.engines llama.cpp --models llama")

    from hf_layerprune.cut.gguf import cut_gguf
    from hf_layerprune.layer_ranges import parse_layers

    with tempfile.TemporaryDirectory() as folder:
        cut = Path(folder) / "cut.gguf"
        cut_gguf(args.model, cut, parse_layers(args.drop), progress=False)
        files = [str(args.model.resolve()), str(cut)]
        script = str(ROOT / "tests" / "engines" / "speed.mjs")
        command = ["node", script, *map(str, (args.rounds, args.prefill, args.decode)), *files]
        done = subprocess.run(command, cwd=ENGINE, stdout=subprocess.PIPE, text=True, check=True)
        allowed = limits(args.model, cut)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    print("| phase | dense, tokens/s | pruned, tokens/s | ratio | allowed |\n|---|---|---|---|---|")
    for phase in ("prefill", "decode"):
        dense, pruned = ([row[phase] for row in rows if row["path"] == path] for path in files)
        ratio = statistics.median(b / a for a, b in zip(dense, pruned, strict=True))
        medians = f"{statistics.median(dense):.0f} | {statistics.median(pruned):.0f}"
        print(f"| {phase} | {medians} | {ratio:.2f} | {allowed[phase]:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
