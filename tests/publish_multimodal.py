"""A multimodal model on the Hub: pruned from there, pushed, verified, and loaded again with its processor; `publish_flow.py` runs this."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

from tests.hub_repo import Repo
from tests.hub_server import HubServer
from tests.publish_child import cli, files


def run_card(folder: Path) -> tuple[str, bool]:
    """The task that a card names, and whether its code example prints something."""
    from hf_layerprune.records.declared import split_front_matter

    fields, body = split_front_matter((folder / "README.md").read_text())
    code = re.sub('"path/to/[^"]+"', repr(str(folder)), body.partition("```python\n")[2].partition("```")[0])
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(code, {})
    return fields["pipeline_tag"], bool(said.getvalue().strip())


def run_all(hub: HubServer, place: Path) -> dict[str, Any]:
    """Push the model, and load it again."""
    import torch
    from transformers import AutoModelForMultimodalLM, AutoProcessor

    from tests.multimodal_makers import noise, write_llava

    base, folder = write_llava(place / "base"), place / "pruned"
    hub.repos["org/llava"] = Repo(base)
    found: dict[str, Any] = {"prune": cli("prune", "org/llava", folder, "--drop-layers", "3-4")}
    found["card"] = cli("card", folder, "--license", "mit")
    found["push"] = cli("push", folder, "org/pruned")
    found["names"] = sorted(files(hub, "org/pruned"))
    beside = ("processor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json")
    found["beside"] = [files(hub, "org/pruned")[name] == (base / name).read_bytes() for name in beside]
    found["verify"] = cli("verify", "org/pruned")
    model, here = (AutoModelForMultimodalLM.from_pretrained(name).eval() for name in ("org/pruned", folder))
    question = AutoProcessor.from_pretrained("org/pruned")(images=noise(0), text="<image> w5", return_tensors="pt")
    with torch.no_grad():
        found["logits"] = bool(torch.equal(model(**question).logits, here(**question).logits))
    found["class"] = type(model).__name__
    small = place / "adapter"
    cli("prune", "org/llava", small, "--drop-layers", "3-4", "--adapter", "--tune-layers", "1")
    found["use"] = [cli("card", small), *map(run_card, (folder, small))]
    return found
