"""Part f: `accelerate launch` with the settings of `recipes/accelerate`, on a tiny model, whose output is checked.

A dry run adapts the settings to the CPU; see `fsdp_on_cpu.py` for FSDP. On a CPU, DeepSpeed compiles its communication at the
start, which takes minutes, so the dry run omits it unless `DS_ACCELERATOR=cpu` is set.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .steps import ROOT, Setting, Step, Unavailable, environment, tokenizer


def steps(rounds: int) -> list[Step]:
    """Each engine with one process, and with two if there are two cards."""
    names = ("single_gpu", "fsdp2", "deepspeed_zero2", "deepspeed_zero3")
    one = [Step(f"f-{name}", partial(run, name, 1), 3) for name in names]
    return [*one, *(Step(f"f-{name}-2", partial(run, name, 2), 3, cards=2) for name in ("ddp", *names[1:]))]


def base(setting: Setting) -> Path:
    """A tiny model of 8 layers with its tokenizer, and rows to train on."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = setting.work / "small"
    if not (folder / "rows.jsonl").exists():
        torch.manual_seed(0)
        config = LlamaConfig(
            hidden_size=64, intermediate_size=160, num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=128, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
            max_position_embeddings=2048,
        )  # fmt: skip
        dtype = torch.float32 if setting.tiny else torch.bfloat16
        LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        words = [" ".join(f"w{3 + (i * j) % 97}" for j in range(1, 13)) for i in range(64)]
        rows = [json.dumps({"prompt": text[:20] + " ", "completion": text[20:]}) + "\n" for text in words]
        (folder / "rows.jsonl").write_text("".join(rows))
    return folder


def write_cpu_config(file: Path, folder: Path) -> Path:
    """Write the same settings for the CPU into another file."""
    import yaml

    settings = yaml.safe_load(file.read_text()) | {"mixed_precision": "no"}
    if settings["distributed_type"] != "DEEPSPEED":  # with use_cpu, accelerate would leave DeepSpeed out
        settings["use_cpu"] = True
    changed = folder / f"{file.stem}_on_cpu.yaml"
    changed.write_text(yaml.safe_dump(settings))
    return changed


def run(name: str, processes: int, setting: Setting) -> dict[str, Any]:
    """Train, then compare the model, its adapter and its history with each other."""
    deepspeed = name.startswith("deepspeed")
    if deepspeed and find_spec("deepspeed") is None:
        raise Unavailable("deepspeed is not installed")
    if deepspeed and setting.tiny and os.environ.get("DS_ACCELERATOR") != "cpu":
        raise Unavailable("DeepSpeed runs on a CPU with DS_ACCELERATOR=cpu")

    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    import hf_layerprune  # noqa: F401 (its PEFT method)

    if not setting.tiny and torch.cuda.device_count() < processes:
        raise Unavailable(f"there is {torch.cuda.device_count()} card; this step needs {processes}")
    folder = base(setting)
    output = setting.work / f"engine-{name}-{processes}"
    if output.exists():
        shutil.rmtree(output)
    method = "last2" if name == "fsdp2" else "lm_head+last2"  # with float32 layers below a frozen head in 16 bits
    loss = "ce" if name == "deepspeed_zero3" else "ce+kd"  # there, the dense model would have to be split as well
    settings = {
        "model_name_or_path": folder, "dataset_name": folder / "rows.jsonl", "output_dir": output,
        "drop_layers": "3,4", "method": method, "loss": loss, "num_train_epochs": 2,
        "per_device_train_batch_size": 8 // processes, "learning_rate": 0.005, "max_length": 32, "logging_steps": 1,
        "report_to": "none", "disable_tqdm": "true", "save_strategy": "no", "bf16": str(not setting.tiny).lower(),
    }  # fmt: skip
    words = [part for key, value in settings.items() for part in (f"--{key}", str(value))]
    file = ROOT / "recipes" / "accelerate" / f"{name}.yaml"
    script = [str(ROOT / "recipes" / "sft_tail.py")]
    if setting.tiny:
        file = write_cpu_config(file, setting.work)
        if name.startswith("fsdp"):
            script.insert(0, str(Path(__file__).with_name("fsdp_on_cpu.py")))
    launch = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", str(processes),
        "--main_process_port", "0",
    ]  # fmt: skip
    command = [*launch, *script, *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-3000:])
    losses = [float(value) for value in re.findall(r"'loss': '?([\d.e-]+)", done.stdout + done.stderr)]
    entry = json.loads((output / "model" / "lineage.json").read_text())["entries"][-1]
    changed = {
        int(part[1]) for part in map(re.compile(r"layers\.(\d+)\.").split, entry["changed_tensors"]) if part[1:]
    }
    model = AutoModelForCausalLM.from_pretrained(output / "model", dtype=torch.float32).eval()
    adapter = AutoPeftModelForCausalLM.from_pretrained(output / "adapter", dtype=torch.float32).eval()
    pruned = AutoModelForCausalLM.from_pretrained(output / "pruned", dtype=torch.float32).eval()
    ids = torch.randint(3, 100, (2, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = model(ids).logits
        difference = (adapter(ids).logits - wanted).abs().max().item()
        learned = (pruned(ids).logits - wanted).abs().max().item()
    right = {
        "layers": model.config.num_hidden_layers == 6,
        "changed tensors": changed == {4, 5},
        "adapter": difference <= 1e-4 * wanted.abs().max().item(),
        "learned": learned > 1e-2 and losses[-1] < losses[0],
    }
    if wrong := [key for key, value in right.items() if not value]:
        raise RuntimeError(f"wrong: {', '.join(wrong)}; changed layers {changed}, losses {losses}")
    return {"processes": processes, "losses": [losses[0], losses[-1]], "adapter_difference": difference}
