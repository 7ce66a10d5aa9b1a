"""Speed of SmolLM2-135M-Instruct, dense and without layers 12-18, in several engines, next to the theoretical ratio.

    python benchmarks/engines.py                                 transformers, vLLM, and llama.cpp in f32, Q4_0 and Q4_K_M
    python benchmarks/engines.py llama.cpp --prompt-lengths 256 --new-tokens 64 --repeats 7

Engines and models are those of `make engines`, in `.engines`; missing ones are installed or made. Each row is recorded by
`hf-layerprune bench --engine`. Set `OMP_NUM_THREADS=1` on a busy machine, since llama.cpp's threads wait actively.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.engines import environments, gguf_files, models  # noqa: E402


def runs(engine: str, files: list[str]) -> Iterator[tuple[str, str, list[str], list[str]]]:
    """The runs of `bench` for an engine.

    Args:
        engine (`str`): An engine of `bench`.
        files (`list[str]`): For llama.cpp, the kinds of GGUF files.

    Yields:
        `tuple[str, str, list[str], list[str]]`: A title, the interpreter, folders for the `PATH`, and the options.
    """
    if engine == "transformers":
        yield engine, sys.executable, [], ["--load-repeats", "0"]
    elif engine == "vllm":
        environments.build(engine)
        python = str(environments.python_of(engine))
        subprocess.run([python, "-m", "pip", "install", "--quiet", "-e", f"{ROOT}[eval]"], check=True)
        yield engine, python, [str(Path(python).parent)], ["--engine", engine]
    else:
        environments.build(engine)
        tools = environments.llama_cpp_tools()
        for kind in files:
            pair = [gguf_files.quantised(models.REAL, which, kind) for which in ("cut", "dense")]
            words = [word for file in pair for word in ("--gguf", str(file))]
            yield f"{engine}, {kind}", sys.executable, [str(tools)], ["--engine", engine, *words]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="*", default=["transformers", "vllm", "llama.cpp"])
    parser.add_argument("--files", default="f32,Q4_0,Q4_K_M", help="for llama.cpp, as llama-quantize names them")
    parser.add_argument("--prompt-lengths", default="256")
    parser.add_argument("--new-tokens", default="64")
    parser.add_argument("--repeats", default="7")
    args = parser.parse_args()
    folders = models.make(models.REAL)
    work = ["--batch-sizes", "1", "--prompt-lengths", args.prompt_lengths]
    work += ["--new-tokens", args.new_tokens, "--repeats", args.repeats]
    print(
        "| engine | weights | phase | dense, tokens/s | pruned, tokens/s | ratio | allowed |\n|---|---|---|---|---|---|---|"
    )
    for engine in args.engines:
        for title, python, path, options in runs(engine, args.files.split(",")):
            with tempfile.TemporaryDirectory() as folder:
                numbers = Path(folder) / "metrics.json"
                words = [str(folders["cut"]), "--base", str(folders["dense"]), *work]
                options += ["--output", str(numbers), "--device", "cpu"]
                command = [str(Path(python).with_name("hf-layerprune")), "bench", *words, *options]
                env = os.environ | {"PATH": os.pathsep.join([*path, os.environ["PATH"]]), "HF_HUB_OFFLINE": "1"}
                env["PYTHONPATH"] = str(ROOT)
                subprocess.run(command, env=env, check=True, stdout=sys.stderr)
                print_rows(title, json.loads(numbers.read_text()))
    return 0


def print_rows(title: str, metrics: dict) -> None:
    """Print a line for each phase: medians, and the median ratio of consecutive runs."""
    for one in metrics["comparisons"]:
        name = one["metric"].removesuffix("_tokens_per_second")
        if name == one["metric"]:
            continue
        same = [r for r in metrics["results"] if (r["metric"], r["settings"]) == (one["metric"], one["settings"])]
        values = {metrics["models"][row["weights"]]["role"]: row for row in same}
        cells = [title, values["dense"]["dtype"], name, *(f"{row['value']:,.0f}" for row in values.values())]
        print(f"| {' | '.join(cells)} | {one['share']:.2f} | {one['theoretical_share']:.2f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
