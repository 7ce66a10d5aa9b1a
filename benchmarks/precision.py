"""Is a model faster in float32 or in bfloat16 on this CPU, and does the package choose the faster type?

    python benchmarks/precision.py
    python benchmarks/precision.py --model SmolLM2-135M-Instruct --tokens 512

Times a forward pass of a model in both types, and of the bfloat16 model after `to_fast_precision`, in turn. Without
`--model`, it is a Llama with random weights and the shape of SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_layerprune.runtime.loading import load_base
from hf_layerprune.runtime.precision import to_fast_precision

SHAPE = {
    "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
}  # fmt: skip


def load(name: str | None, dtype: torch.dtype) -> Any:
    if name is not None:
        return load_base(name, dtype=dtype)
    return AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), dtype=dtype).eval()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, a Hub id or a GGUF file")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = {
        "float32": load(args.model, torch.float32),
        "bfloat16": load(args.model, torch.bfloat16),
        "bfloat16, after to_fast_precision": to_fast_precision(load(args.model, torch.bfloat16)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in models}
    ids = torch.randint(3, models["float32"].config.vocab_size, (1, args.tokens))
    for number in range(args.repeats + 1):  # the first round warms up
        for name, model in models.items():
            start = time.process_time()
            model(ids, use_cache=False, logits_to_keep=1)
            if number:
                seconds[name].append(time.process_time() - start)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"{args.tokens} tokens, {args.threads} threads, medians of {args.repeats}\n")
    print("| | computes in | CPU seconds | ratio to float32 |\n|---|---|---|---|")
    for name, value in medians.items():
        dtype = str(models[name].dtype).removeprefix("torch.")
        print(f"| {name} | {dtype} | {value:.2f} | {value / medians['float32']:.2f} |")


if __name__ == "__main__":
    main()
