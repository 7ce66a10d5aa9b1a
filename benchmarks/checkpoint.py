"""Time and peak memory of cutting a checkpoint on disk, compared with copying it and with other ways to cut it.

    python benchmarks/checkpoint.py --copy-only
    python benchmarks/checkpoint.py --gb 8 --repeats 5 --mergekit /path/to/python

Makes a bf16 Llama of random bytes (32 layers, shards of about 1 GB), drops 8 layers from it in several ways, in turn
in each round, and prints a Markdown table. Each way runs in its own process. CPU seconds (user and system) depend less on
other load than the elapsed time. There are three memory peaks: the resident set, which includes every accessed page of a
mapped file; its anonymous part, which is the process's own memory; and its part in mapped files. They are read from the
child's `/proc/PID/status` while it runs, because on Linux the `ru_maxrss` of a child starts at its parent's value.
Everything is removed at the end.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

LAYERS, DROP = 32, tuple(range(21, 29))
VOCAB = 32_000

CONFIG_ONLY = """
import sys
from transformers import AutoConfig
AutoConfig.from_pretrained(sys.argv[1])
"""
OURS = """
import sys, time
from pathlib import Path
from hf_layerprune.cut.disk import plan_cut
from tests.cutting import write_checkpoint
plan = plan_cut(Path(sys.argv[1]), [int(i) for i in sys.argv[3].split(",")])
started, cpu = time.perf_counter(), time.process_time()
write_checkpoint(plan, Path(sys.argv[2]))
print(time.perf_counter() - started, time.process_time() - cpu)
"""
PRUNE = """
import sys
from hf_layerprune.cli import main
sys.exit(main(["prune", *sys.argv[1:]]))
"""
LOADED = """
import sys, torch
from hf_layerprune.cut.lazy import load_pruned
model = load_pruned(sys.argv[1], [int(i) for i in sys.argv[3].split(",")], dtype="auto")
with torch.no_grad():
    model(torch.tensor([[1]]))
"""
TRANSFORMERS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
drop = {int(i) for i in sys.argv[3].split(",")}
model.model.layers = torch.nn.ModuleList(l for i, l in enumerate(model.model.layers) if i not in drop)
model.config.num_hidden_layers = len(model.model.layers)
model.save_pretrained(sys.argv[2], max_shard_size="1GB")
"""


def llama_config(gb: float) -> dict:
    """The config of a Llama with about `gb` billion bytes of bf16 weights."""
    width = 64
    while 2 * (13 * LAYERS * width**2 + 2 * VOCAB * width) < gb * 1e9:
        width += 64
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": width,
        "intermediate_size": width * 7 // 2, "num_hidden_layers": LAYERS, "num_attention_heads": width // 16,
        "num_key_value_heads": width // 64, "vocab_size": VOCAB, "tie_word_embeddings": False, "dtype": "bfloat16",
    }  # fmt: skip


def tensor_shapes(config: dict) -> dict[str, list[int]]:
    """Name and shape of every tensor, in the order in which they are saved."""
    h, m, kv = config["hidden_size"], config["intermediate_size"], config["hidden_size"] // 4
    shapes = {"model.embed_tokens.weight": [VOCAB, h]}
    for i in range(LAYERS):
        for name, shape in (
            ("self_attn.q_proj", [h, h]), ("self_attn.k_proj", [kv, h]), ("self_attn.v_proj", [kv, h]),
            ("self_attn.o_proj", [h, h]), ("mlp.gate_proj", [m, h]), ("mlp.up_proj", [m, h]), ("mlp.down_proj", [h, m]),
            ("input_layernorm", [h]), ("post_attention_layernorm", [h]),
        ):  # fmt: skip
            shapes[f"model.layers.{i}.{name}.weight"] = shape
    return shapes | {"model.norm.weight": [h], "lm_head.weight": [VOCAB, h]}


def make_llama(
    folder: Path, gb: float, *, sparse: bool = False, shard_bytes: int = 1_000_000_000, noise: bytes | None = None
) -> None:
    """Write a Llama checkpoint of a given size.

    Args:
        folder (`Path`): The folder to create.
        gb (`float`): Approximate size of the weights in billions of bytes.
        sparse (`bool`, *optional*, defaults to `False`): Leave holes instead of random bytes.
        shard_bytes (`int`, *optional*): The largest size of one file.
        noise (`bytes`, *optional*): A pattern that is repeated to fill the weights; random bytes by default, which
            are not meaningful as numbers.
    """
    folder.mkdir(parents=True)
    config = llama_config(gb)
    (folder / "config.json").write_text(json.dumps(config))
    shapes = tensor_shapes(config)
    sizes = {name: 2 * math.prod(shape) for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name in shapes:
        if shards[-1] and sum(sizes[other] for other in shards[-1]) + sizes[name] > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    weight_map = {}
    noise = os.urandom(16 << 20) if noise is None else noise
    for number, names in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, position = {"__metadata__": {"format": "pt"}}, 0
        for name in sorted(names):  # as the safetensors library does
            end = position + sizes[name]
            header[name] = {"dtype": "BF16", "shape": shapes[name], "data_offsets": [position, end]}
            weight_map[name], position = file_name, end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / file_name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            if sparse:
                file.truncate(8 + len(text) + position)
            else:
                for start in range(0, position, len(noise)):
                    file.write(noise[: min(len(noise), position - start)])
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def mergekit_recipe(source: Path) -> str:
    """A passthrough merge of the kept layers."""
    runs = ((0, DROP[0]), (DROP[-1] + 1, LAYERS))
    slices = "".join(f"  - sources: [{{model: {source}, layer_range: [{a}, {b}]}}]\n" for a, b in runs)
    return f"slices:\n{slices}merge_method: passthrough\ndtype: bfloat16\n"


class Peaks:
    """Records the peak resident set of a process, and the peaks of its two parts, in MB."""

    def __init__(self, pid: int) -> None:
        self.resident = self.anonymous = self.mapped = 0.0
        self._status, self._done = Path(f"/proc/{pid}/status"), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            with suppress(OSError):
                fields = dict(line.split(":", 1) for line in self._status.read_text().splitlines() if "kB" in line)
                self.resident = max(self.resident, int(fields.get("VmHWM", "0").split()[0]) / 1000)
                self.anonymous = max(self.anonymous, int(fields.get("RssAnon", "0").split()[0]) / 1000)
                self.mapped = max(self.mapped, int(fields.get("RssFile", "0").split()[0]) / 1000)

    def stop(self) -> None:
        self._done.set()
        self._thread.join()


class Run(NamedTuple):
    """The time and memory of a command, and its output."""

    seconds: float
    cpu: float
    peaks: Peaks
    output: str


def run(command: list[str]) -> Run:
    started = time.perf_counter()
    with tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        peaks = Peaks(child.pid)
        output = child.stdout.read()
        _, status, used = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - started
        child.returncode = os.waitstatus_to_exitcode(status)
        peaks.stop()
        if child.returncode:
            errors.seek(0)
            sys.exit(f"{' '.join(command)[:200]} failed:\n{errors.read().decode()[-2000:]}")
    return Run(seconds, used.ru_utime + used.ru_stime, peaks, output)


def remove(paths: Iterable[Path]) -> None:
    for path in paths:
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)


def measure(work: Path, repeats: int, mergekit: str | None, copy_only: bool) -> dict[str, list[Run]]:
    source, target, recipe = work / "base", work / "cut", work / "merge.yaml"
    python, drop = sys.executable, ",".join(map(str, DROP))
    recipe.write_text(mergekit_recipe(source))
    # The bytes that remain after the cut, in one file.
    run([python, "-c", OURS, str(source), str(target), drop])
    kept = work / "kept"
    with open(kept, "wb") as output:
        for shard in sorted(target.glob("*.safetensors")):
            with open(shard, "rb") as file:
                shutil.copyfileobj(file, output, 16 << 20)
    remove([target])
    copied = str(target)
    ways = {
        "cp of the kept bytes": ["cp", str(kept), copied],
        "cp, then sync": ["sh", "-c", f"cp '{kept}' '{copied}' && sync '{copied}'"],
        "start-up: import transformers, read the config": [python, "-c", CONFIG_ONLY, str(source)],
        "hf_layerprune, whole command": [python, "-c", OURS, str(source), copied, drop],
        "hf-layerprune prune": [python, "-c", PRUNE, str(source), copied, "--drop-layers", "21-28"],
        "load_pruned, one token": [python, "-c", LOADED, str(source), copied, drop],
        "transformers: load, slice, save": [python, "-c", TRANSFORMERS, str(source), copied, drop],
    }
    if mergekit:
        ways["mergekit passthrough"] = [mergekit, "-m", "mergekit.scripts.run_yaml", str(recipe), copied]
    if copy_only:
        ways = {name: ways[name] for name in ("cp of the kept bytes", "cp, then sync", "hf_layerprune, whole command")}
    results: dict[str, list[Run]] = {name: [] for name in ways} | {"hf_layerprune, copy alone": []}
    for number in range(repeats):
        for name, command in ways.items():
            remove([target])
            os.sync()
            one = run(command)
            results[name].append(one)
            if command[1:3] == ["-c", OURS]:
                seconds, cpu = map(float, one.output.split())
                results["hf_layerprune, copy alone"].append(one._replace(seconds=seconds, cpu=cpu))
            took = f"{one.seconds:.2f} s, {one.peaks.resident:.0f} MB"
            print(f"round {number + 1}: {name}: {took}", file=sys.stderr, flush=True)
    return results


def table(results: dict[str, list[Run]]) -> str:
    """The results as a markdown table, with ratios of medians."""
    median = {name: statistics.median(one.seconds for one in runs) for name, runs in results.items()}
    lines = [
        "| way | median s | min-max s | CPU s | peak MB | anonymous | mapped | x cp | x cp, then sync |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in results.items():
        times, peaks = [one.seconds for one in runs], [one.peaks for one in runs]
        cells = [name, f"{median[name]:.2f}", f"{min(times):.2f}-{max(times):.2f}"]
        cells.append(f"{statistics.median(one.cpu for one in runs):.2f}")
        cells += [f"{max(getattr(one, part) for one in peaks):.0f}" for part in ("resident", "anonymous", "mapped")]
        cells += [f"{median[name] / median[other]:.2f}" for other in ("cp of the kept bytes", "cp, then sync")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.4, help="size of the base's weights in billions of bytes")
    parser.add_argument("--repeats", type=int, default=7, help="number of rounds; the table has medians")
    parser.add_argument("--copy-only", action="store_true", help="only cp, cp with sync, and the cut on disk")
    parser.add_argument("--work", type=Path, help="a folder to work in; default: a temporary one")
    parser.add_argument("--mergekit", metavar="PYTHON", help="a Python with mergekit, to compare with it too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.work, prefix="checkpoint-benchmark-") as folder:
        work = Path(folder)
        make_llama(work / "base", args.gb)
        size = sum(path.stat().st_size for path in (work / "base").glob("*.safetensors"))
        results = measure(work, args.repeats, args.mergekit, args.copy_only)
        kept = (work / "kept").stat().st_size
    print(f"{size / 1e9:.2f} GB, {LAYERS} layers, to {kept / 1e9:.2f} GB, {LAYERS - len(DROP)} layers; ", end="")
    print(f"warm cache, {args.repeats} rounds\n\n{table(results)}")


if __name__ == "__main__":
    main()
