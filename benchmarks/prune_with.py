"""Load time and peak memory of `prune_with` at 25 %, compared with loading the dense model.

    python benchmarks/prune_with.py --gb 2 --repeats 5

A synthetic bf16 Llama checkpoint is written to a temporary folder, then loaded by fresh processes in turn: `dense`
with `AutoModelForCausalLM.from_pretrained`, `loaded` with `load_pruned`, `pruned` with `prune_with`, which also copies
the weights that it will tune (three layers and the head, unless `--tune-layers` says otherwise), and `import`, which
loads nothing. Since transformers maps a file and reads a weight only when it is used, there are three cases: `mapped`,
the load alone, which reads next to nothing; `used`, the load and a forward pass of one token, which reads each weight
once; `converted`, a load in float32, which reads and copies every weight. Peak memory is the peak resident set,
including mapped pages of the checkpoint. The files are in the page cache throughout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MODES = ("import", "dense", "loaded", "pruned")
CASES = ("mapped", "used", "converted")


def write_checkpoint(folder: Path, gb: float) -> None:
    """Write a Llama of about `gb` GB in bf16, with a constant for all weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    hidden, layers = 1024, 32
    inner = max(128, round((gb * 1e9 / 2 / layers - 4 * hidden**2) / (3 * hidden) / 128) * 128)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=16,
        vocab_size=8192, tie_word_embeddings=False, dtype=torch.bfloat16,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    model.save_pretrained(folder, max_shard_size="500MB")


def measure(mode: str, case: str, folder: str, tune_layers: int) -> dict[str, float]:
    """Import, load, and use the model in the case `used`. Returns the time and the peak memory."""
    start = time.perf_counter()
    import torch
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    from hf_layerprune import LayerDropConfig, prune_with
    from hf_layerprune.cut.lazy import load_pruned
    from hf_layerprune.records.lineage import peak_rss

    assert LlamaForCausalLM  # imported here, not during the load
    torch.set_num_threads(1)
    imported = time.perf_counter()
    model, kwargs = None, {"dtype": torch.float32} if case == "converted" else {}
    if mode == "dense":
        model = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    elif mode == "loaded":
        model = load_pruned(
            folder, lambda config: range(config.num_hidden_layers * 3 // 4, config.num_hidden_layers), **kwargs
        )
    elif mode == "pruned":
        config = LayerDropConfig(
            base_model_name_or_path=folder, drop=0.25, tune_layers=tune_layers, tune_lm_head=tune_layers > 0
        )
        model = prune_with(config, **kwargs)
    if model is not None and case == "used":
        with torch.no_grad():
            model(input_ids=torch.ones(1, 1, dtype=torch.long))
    end = time.perf_counter()
    return {"process": end - start, "load": end - imported, "mb": peak_rss() / 1e6}


def run(mode: str, case: str, folder: str, tune_layers: int) -> dict[str, float]:
    options = {"--measure": mode, "--case": case, "--folder": folder, "--tune-layers": str(tune_layers)}
    command = [sys.executable, __file__, *(word for option in options.items() for word in option)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def report(case: str, runs: dict[str, list[dict[str, float]]]) -> None:
    median = {m: {k: statistics.median(r[k] for r in rows) for k in rows[0]} for m, rows in runs.items()}
    base, dense = median["import"], median["dense"]
    print(f"{case}: medians, and ratios to dense (in brackets: with the import subtracted)")
    for mode, row in median.items():
        line = f"  {mode:7} process {row['process']:6.2f} s, load {row['load']:6.2f} s, peak {row['mb']:6.0f} MB"
        if mode in ("loaded", "pruned"):
            ratios = {key: row[key] / dense[key] for key in row}
            less = {key: (row[key] - base[key]) / max(dense[key] - base[key], 1e-9) for key in row}
            line += (
                f" | process {ratios['process']:.2f}x, load {ratios['load']:.2f}x, "
                f"peak {ratios['mb']:.2f}x ({less['mb']:.2f}x)"
            )
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gb", type=float, default=2.0, help="size of the checkpoint")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each kind")
    parser.add_argument("--folder", help="where to write the checkpoint, or where it is; default: a temporary folder")
    parser.add_argument(
        "--tune-layers", type=int, default=3, help="layers that prune_with tunes; 0: none, and not the head"
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES, help="which of the three cases")
    parser.add_argument("--measure", choices=MODES, help=argparse.SUPPRESS)
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.case, args.folder, args.tune_layers)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or temporary
        if not (Path(folder) / "config.json").exists():
            write_checkpoint(Path(folder), args.gb)
        size = sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))
        print(f"checkpoint of {size / 1e9:.2f} GB, {args.repeats} runs of each kind, taking turns", flush=True)
        run("dense", "converted", folder, args.tune_layers)  # the files are in the page cache from here on
        for case in args.cases:
            runs: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
            for _ in range(args.repeats):
                for mode in MODES:
                    runs[mode].append(run(mode, case, folder, args.tune_layers))
            report(case, runs)


if __name__ == "__main__":
    main()
