"""Quantise the pruned, repaired and healed SmolLM2 with other projects' tools: does it reload, how large, how far off?

    python -m tests.engines.quantised                  every tool; llm-compressor and llama.cpp are installed on the first run
    python -m tests.engines.quantised llm-compressor   only this one

Prints a line of docs/engines.md for each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from . import gguf_files, models
from .asking import ask
from .environments import QUANTISERS, build, python_of

COMPRESSOR = "llmcompressor"
SCHEMES = ("RTN W8A8", "RTN W4A16", "GPTQ W4A16")


def _configs() -> dict[str, Any]:
    import torch
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig
    from transformers import BitsAndBytesConfig, TorchAoConfig

    four_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
    return {
        "bitsandbytes, NF4": BitsAndBytesConfig(**four_bits),
        "torchao, int8": TorchAoConfig(quant_type=Int8WeightOnlyConfig()),
        "torchao, int4, stored in 8 bits": TorchAoConfig(quant_type=IntxWeightOnlyConfig(weight_dtype=torch.int4)),
    }


def _load(folder: Path | str, **more: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cpu", **more).eval()


def _healed() -> Path:
    return models.make(models.HEALED)["cut"]


def _logs(logits: Any) -> Any:
    return logits.detach().float().log_softmax(-1)


def _line(name: str, folder: Path, same: bool, exact: Any, logs: Any) -> str:
    from hf_layerprune import record_quantized

    record_quantized(_healed(), folder)
    divergence = (exact.exp() * (exact - logs)).sum(-1).mean().item()
    agreement = (logs.argmax(-1) == exact.argmax(-1)).float().mean().item()
    facts = f"{_megabytes(folder):.0f} | {'yes' if same else 'no'} | {divergence:.3f} | {agreement:.0%}"
    return f"| {name} | {facts} | {_verdict(folder)} |"


def by_transformers() -> Iterator[str]:
    """What transformers quantises while it loads: bitsandbytes, torchao."""
    import torch

    ids = torch.tensor([models.prompt_of(models.HEALED)])
    exact = _logs(_load(_healed())(ids).logits[0])
    yield f"| none | {_megabytes(_healed()):.0f} | | 0 | 100% | {_verdict(_healed())} |"
    for name, config in _configs().items():
        with tempfile.TemporaryDirectory() as folder:
            model = _load(_healed(), quantization_config=config)
            model.save_pretrained(folder)
            ours = model(ids).logits[0].detach()
            same = torch.equal(ours, _load(folder)(ids).logits[0].detach())
            yield _line(name, Path(folder), same, exact, _logs(ours))


def by_llm_compressor() -> Iterator[str]:
    """What llm-compressor quantises in an environment of its own, with data and without."""
    import torch

    build(COMPRESSOR)
    script = Path(__file__).parent / QUANTISERS[COMPRESSOR].script
    prompt = models.prompt_of(models.HEALED)
    exact = _logs(_load(_healed())(torch.tensor([prompt])).logits[0])
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    for scheme in SCHEMES:
        with tempfile.TemporaryDirectory() as folder:
            words = [str(_healed()), folder, scheme, str(_healed().parent / "rows.jsonl"), json.dumps(prompt)]
            command = [str(python_of(COMPRESSOR)), str(script), *words]
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
            answer = json.loads(done.stdout.splitlines()[-1])
            logs = torch.tensor(answer["logits"]).log_softmax(-1)
            yield _line(f"llm-compressor, {scheme}", Path(folder), answer["same"], exact, logs)


def by_llama_cpp() -> Iterator[str]:
    """The converted folder, quantised: the next token after each part of what the healed model writes."""
    expected = models.reference(models.HEALED, "cut")["tokens"]
    prompt = models.prompt_of(models.HEALED)
    for kind in ("Q8_0", "Q4_K_M"):
        file = gguf_files.quantised(models.HEALED, "cut", kind)
        jobs = [
            {"name": str(i), "path": str(file), "prompt": prompt + expected[:i], "count": 1}
            for i in range(len(expected))
        ]
        answers = ask("llama.cpp", jobs)
        same = [answers[str(i)]["tokens"] == expected[i : i + 1] for i in range(len(expected))]
        yield f"| llama.cpp, {kind} | {file.stat().st_size / 1e6:.0f} | | | {sum(same) / len(same):.0%} | |"


TOOLS: dict[str, Callable[[], Iterator[str]]] = {
    "transformers": by_transformers,
    "llm-compressor": by_llm_compressor,
    "llama.cpp": by_llama_cpp,
}


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


def main(tools: list[str]) -> int:
    """Print the table."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    print("| tool | MB | same after a reload | KL from the healed model, nats | top-1 agreement | verify |")
    print("|---|---|---|---|---|---|")
    for tool in tools or TOOLS:
        for line in TOOLS[tool]():
            print(line.replace("%", " %"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
