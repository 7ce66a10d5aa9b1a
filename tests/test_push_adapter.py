"""The adapter's way over the Hub: one process prunes and pushes, another one, which knows only the id, loads.

Both are forks of one that has imported what they use, which takes longer than they do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file

from .hub_server import HubServer, client_env
from .hub_written import WrittenRepo

SHARED = """
import json, os, shutil, sys
import hf_layerprune, peft, torch, transformers
from huggingface_hub import HfApi
from safetensors.torch import save_file
from tests.tiny_models import EAGER, tiny_input, tiny_model

torch.set_num_threads(1)
out = {}
PLACE = sys.argv[1]

@torch.no_grad()
def logits(model):
    for parameter in model.parameters():  # see tests/matrix.py on alignment
        parameter.data = parameter.data.clone()
    return model.eval()(input_ids=tiny_input(), use_cache=False).logits
"""
EACH_ALONE = """
for name in sys.argv[2:]:
    if (child := os.fork()) == 0:
        exec(open(f"{PLACE}/{name}.py").read(), globals())
        with open(f"{PLACE}/{name}.json", "w") as file:
            json.dump(out, file)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)  # the next one is on another machine
"""
PUSH = """
from hf_layerprune import LayerDropConfig, prune_with
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(128)}, unk_token="w0"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
tiny_model("llama").push_to_hub("org/base", max_shard_size="100KB")
tokenizer.push_to_hub("org/base")
out["base"] = HfApi().model_info("org/base").sha

model = prune_with(LayerDropConfig(base_model_name_or_path="org/base", drop=0.25), **EAGER)
found = {"cut": logits(model).clone()}
torch.manual_seed(1)
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn_like(parameter))
found["tuned"] = logits(model)
save_file(found, PLACE + "/pushed.safetensors")
tuned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
save_file({name.replace(".modules_to_save.default", ""): one.detach() for name, one in tuned.items()},
          PLACE + "/tuned.safetensors")
for token in ("hf_read", False):  # without the right to
    try:
        model.push_to_hub("org/adapter", token=token)
    except Exception as error:
        out[str(token)] = error.response.status_code
out["pushed"] = model.push_to_hub("org/adapter", commit_message="the tuned tail").oid
out["types"] = sorted({str(one.dtype) for one in tuned.values()})
"""
PULL = """
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

auto = AutoPeftModelForCausalLM.from_pretrained("org/adapter", **EAGER)
onto = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("org/base", **EAGER), "org/adapter")
found = {"auto": logits(auto), "onto": logits(onto)}
out["layers"] = [one.get_base_model().config.num_hidden_layers for one in (auto, onto)]
out["words"] = len(AutoTokenizer.from_pretrained("org/base"))
merged = auto.merge_and_unload()
found["merged"] = logits(merged)
merged.push_to_hub("org/pruned")
found["plain"] = logits(AutoModelForCausalLM.from_pretrained("org/pruned", **EAGER))
save_file(found, PLACE + "/pulled.safetensors")
"""


def run(hub: HubServer, place: Path, **scripts: str) -> list[dict]:
    """Run scripts, each in a process of its own; what each leaves in `out`."""
    for name, script in scripts.items():
        (place / f"{name}.py").write_text(script)
    words = [sys.executable, "-c", SHARED + EACH_ALONE, str(place), *scripts]
    env = client_env(hub, place / "home", "hf_write")
    done = subprocess.run(words, env=env, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return [json.loads((place / f"{name}.json").read_text()) for name in scripts]


def newest(hub: HubServer, repo: str) -> dict[str, bytes]:
    written = hub.repos[repo]
    assert isinstance(written, WrittenRepo)
    return {name: file.path.read_bytes() for name, file in written.at("main").files.items()}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer(tokens={"hf_read": None}, writers={"hf_write": None}) as server:
        yield server


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_an_adapter_goes_over_the_hub(hub: HubServer, tmp_path: Path) -> None:
    out, pulled = run(hub, tmp_path, push=PUSH, pull=PULL)
    pushed = load_file(tmp_path / "pushed.safetensors")
    assert not torch.equal(pushed["cut"], pushed["tuned"])

    base = newest(hub, "org/base")
    assert sum(name.endswith(".safetensors") for name in base) > 1
    assert {"config.json", "model.safetensors.index.json", "README.md", "tokenizer.json"} <= set(base)

    files = newest(hub, "org/adapter")
    assert set(files) == {".gitattributes", "README.md", "adapter_config.json", "adapter_model.safetensors"}
    config = json.loads(files["adapter_config.json"])
    assert config["drop_layers"] == [6, 7]
    assert config["num_base_layers"] == 8
    assert config["base_model_name_or_path"] == "org/base"
    assert config["base_commit"] == out["base"] == hub.repos["org/base"].at("main").id

    kept, tuned = load(files["adapter_model.safetensors"]), load_file(tmp_path / "tuned.safetensors")
    assert kept.keys() == tuned.keys()
    assert all(torch.equal(kept[name], tuned[name]) and kept[name].dtype == tuned[name].dtype for name in tuned)
    assert out["types"] == ["torch.float32"]
    assert (out["hf_read"], out["False"]) == (403, 401)
    assert hub.repos["org/adapter"].at("main").id == out["pushed"]
    assert hub.repos["org/adapter"].at("main").title == "the tuned tail"
    assert sum(one.path.endswith("org/adapter/commit/main") for one in hub.log) == 1

    # Another machine, another cache, and nothing but the ids.
    assert pulled == {"layers": [6, 6], "words": 128}
    for name, found in load_file(tmp_path / "pulled.safetensors").items():
        assert torch.equal(found, pushed["tuned"]), name
    assert hub.bytes_served("adapter_model.safetensors") == len(files["adapter_model.safetensors"])
