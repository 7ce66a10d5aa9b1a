"""Quantise the pruned SmolLM2 with other projects' tools: does it reload, how large is it, how far off is it?

python -m tests.engines.quantised
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from . import gguf_files, models
from .asking import ask
from .environments import HOME
from .quantise_gguf import TYPES

TORCHAO = "torchao==0.18.0"  # a folder beside the project's environment: no other package is needed


def _configs():
    import torch
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from transformers import BitsAndBytesConfig, TorchAoConfig

    four_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    return {
        "bitsandbytes, NF4": BitsAndBytesConfig(**four_bits),
        "torchao, int8": TorchAoConfig(quant_type=Int8WeightOnlyConfig()),
        "torchao, int4": TorchAoConfig(quant_type=IntxWeightOnlyConfig(weight_dtype=torch.int4)),
    }


def table() -> str:
    """A line for each tool."""
    import torch
    from transformers import AutoModelForCausalLM

    from hf_layerprune import record_quantized

    def load(folder, **more):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", **more).eval()

    pruned = models.make(models.REAL)["cut"]
    ids = torch.tensor([models.prompt_of(models.REAL)])
    exact = load(pruned)(ids).logits[0].detach().float().log_softmax(-1)
    lines = [
        "| tool | MB | same after a reload | KL from the pruned model, nats | top-1 agreement | verify |",
        "|---|---|---|---|---|---|",
    ]
    lines.append(f"| none | {_megabytes(pruned):.0f} | | 0 | 100 % | {_verdict(pruned)} |")
    for name, config in _configs().items():
        with tempfile.TemporaryDirectory() as folder:
            model = load(pruned, quantization_config=config)
            model.save_pretrained(folder)
            ours = model(ids).logits[0].detach()
            same = torch.equal(ours, load(folder)(ids).logits[0].detach())
            logs = ours.float().log_softmax(-1)
            divergence = (exact.exp() * (exact - logs)).sum(-1).mean().item()
            agreement = (logs.argmax(-1) == exact.argmax(-1)).float().mean().item()
            record_quantized(pruned, folder)
            facts = f"{_megabytes(Path(folder)):.0f} | {'yes' if same else 'no'} | {divergence:.3f} | {agreement:.0%}"
            lines.append(f"| {name} | {facts} | {_verdict(Path(folder))} |")
    if (HOME / "llama.cpp" / "installed.txt").is_file():
        lines += _in_llama_cpp()
    return "\n".join(lines).replace("%", " %").replace("  %", " %")


def _in_llama_cpp() -> list[str]:
    """The converted folder, quantised: the next token after each part of what the pruned model writes."""
    source, expected = gguf_files.converted(models.REAL, "cut"), models.reference(models.REAL, "cut")["tokens"]
    prompt, lines = models.prompt_of(models.REAL), []
    with tempfile.TemporaryDirectory() as folder:
        for kind in TYPES:
            target = Path(folder) / f"{kind}.gguf"
            command = [sys.executable, "-m", "tests.engines.quantise_gguf", str(source), str(target), kind]
            subprocess.run(command, check=True, capture_output=True)
            jobs = [
                {"name": str(i), "path": str(target), "prompt": prompt + expected[:i], "count": 1}
                for i in range(len(expected))
            ]
            answers = ask("llama.cpp", jobs)
            same = [answers[str(i)]["tokens"] == expected[i : i + 1] for i in range(len(expected))]
            lines.append(
                f"| llama.cpp, {kind} | {target.stat().st_size / 1e6:.0f} | | | {sum(same) / len(same):.0%} | |"
            )
    return lines


def _verdict(folder: Path) -> str:
    """The verdict, and how many tensors it rests on."""
    from hf_layerprune.publish.requests import VerifyRequest
    from hf_layerprune.publish.verify.verdict import verify

    found = verify(VerifyRequest(str(folder)))
    counts = [
        int(line.text.split()[0]) for line in found.lines if line.what == "tensors" and " the base's" in line.text
    ]
    return f"{found.verdict.partition(':')[0].lower()}: {sum(counts)} proven, {found.recorded.total()} as recorded"


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6


def main() -> int:
    """Print the table; torchao is installed on the first run."""
    folder = HOME / "torchao"
    if importlib.util.find_spec("torchao") is None:
        if not folder.is_dir():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), TORCHAO]
            subprocess.run(pip, check=True)
        path = os.pathsep.join([str(HOME.parent), str(folder)])
        env = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
        return subprocess.run([sys.executable, "-m", "tests.engines.quantised"], env=env).returncode
    print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
