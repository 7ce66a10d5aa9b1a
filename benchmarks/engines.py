"""Time a whole and a cut model in an engine, in turns, beside the ratio that bytes and multiplications allow.

    python -m tests.engines llama.cpp vllm --models llama   # once: installs them under .engines/
    python benchmarks/engines.py --model model.gguf --drop 12-18
    python benchmarks/engines.py --engine vllm --model SmolLM2-135M-Instruct --drop 12-18

Tokens per second of the process's own CPU time, on one thread, so that a busy machine matters less.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = {"llama.cpp": "speed_llama_cpp.mjs", "vllm": "speed_vllm.py"}


def sizes(path: Path) -> dict[str, int]:
    """What each phase has to get through.

    Args:
        path (`Path`): A GGUF file, or a folder with one safetensors file.

    Returns:
        `dict[str, int]`: For prefill, the layers' parameters, since only the last token goes through the head; for
            decoding, all bytes, which is right where embeddings and head are the same tensor.
    """
    if path.is_file():
        from gguf import GGUFReader

        tensors = GGUFReader(path).tensors
        layers = sum(int(tensor.n_elements) for tensor in tensors if tensor.name.startswith("blk."))
        return {"prefill": layers, "decode": sum(int(tensor.n_bytes) for tensor in tensors)}
    from safetensors import safe_open

    with safe_open(path / "model.safetensors", "pt") as file:
        counts = {name: math.prod(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return {"prefill": sum(n for name, n in counts.items() if ".layers." in name), "decode": sum(counts.values())}


def main() -> int:
    """Cut, time, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=SCRIPTS, default="llama.cpp")
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file for llama.cpp, a folder for vLLM")
    parser.add_argument("--drop", default="12-18", help="layers to drop")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prefill", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--decode", type=int, default=64, help="tokens to generate")
    args = parser.parse_args()
    engine = ROOT / ".engines" / args.engine
    if not (engine / "installed.txt").is_file():
        parser.error(f"{args.engine} is not installed; run: python -m tests.engines {args.engine} --models llama")

    from hf_layerprune.cut.disk import cut_checkpoint
    from hf_layerprune.cut.gguf import cut_gguf
    from hf_layerprune.layer_ranges import parse_layers

    with tempfile.TemporaryDirectory() as folder:
        make, name = (cut_gguf, "cut.gguf") if args.engine == "llama.cpp" else (cut_checkpoint, "cut")
        cut = Path(folder) / name
        make(args.model, cut, parse_layers(args.drop))
        program = "node" if args.engine == "llama.cpp" else str(engine / "bin" / "python")
        script = str(ROOT / "tests" / "engines" / SCRIPTS[args.engine])
        files = [str(args.model.resolve()), str(cut)]
        command = [program, script, *map(str, (args.rounds, args.prefill, args.decode)), *files]
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
        env["PATH"] = f"{engine / 'bin'}{os.pathsep}{env['PATH']}"
        done = subprocess.run(command, cwd=engine, env=env, stdout=subprocess.PIPE, text=True, check=True)
        whole, left = sizes(args.model), sizes(cut)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    print("| phase | dense, tokens/s | pruned, tokens/s | ratio | allowed |\n|---|---|---|---|---|")
    for phase in ("prefill", "decode"):
        dense, pruned = ([row[phase] for row in rows if row["path"] == path] for path in files)
        ratio = statistics.median(b / a for a, b in zip(dense, pruned, strict=True))
        medians = f"{statistics.median(dense):.0f} | {statistics.median(pruned):.0f}"
        print(f"| {phase} | {medians} | {ratio:.2f} | {whole[phase] / left[phase]:.2f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
