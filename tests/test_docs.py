"""Every code block of the READMEs and of the documentation runs, against a stand-in Hub over real HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from .docs_blocks import ROOT, blocks
from .hub_server import HubServer, client_env
from .measure_datasets import write_datasets
from .measure_models import byte_tokenizer, write_gguf
from .multimodal_makers import write_llava, write_rows
from .tiny_models import randomize

pytestmark = pytest.mark.processes
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
TOKEN = "hf_" + "d" * 34  # made up
RECIPES = sorted((ROOT / "recipes").rglob("README.md"))
WRITTEN = (ROOT / "README.md", ROOT / "model_cards" / "README.md", *RECIPES, *sorted((ROOT / "docs").glob("*.md")))
PAGES = [page for page in WRITTEN if any(blocks(page))]


def write_base(folder: Path) -> Path:
    """A random model with as many layers as SmolLM2-135M, which reads and writes bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=30, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=259, max_position_embeddings=2048, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    randomize(model)
    model.save_pretrained(folder)
    tokenizer = byte_tokenizer(bos=True)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Base\n")
    return folder


def write_images(folder: Path) -> dict[str, str]:
    """A tiny model that reads images, rows with images, and questions about them."""
    rows, questions = write_rows(folder), folder / "questions"
    questions.mkdir()
    lines = [{"query": "w5 w6", "answer": "w7", "image": f"../pictures/{i}.png"} for i in range(2)]
    (questions / "seen.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = {"my-vlm": write_llava(folder / "llava"), rows.name: rows, "pictures": folder / "pictures"}
    return {name: str(path) for name, path in (made | {"questions": questions}).items()}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], str | None]:
    """The error of each block, by page and line, after one process has run them all."""
    root = tmp_path_factory.mktemp("docs")
    base = write_base(root / "base")
    text = root / "my-text.jsonl"
    text.write_text("".join(json.dumps({"text": f"Row {i} of a text of one's own."}) + "\n" for i in range(20)))
    files = {
        "my-model": str(base),
        "model.gguf": str(write_gguf(root / "tiny.gguf", layers=30)),
        text.name: str(text),
    } | write_images(root / "images")
    repos = {MODEL: base} | write_datasets(root / "datasets", questions=2, groups=True)
    with HubServer(repos, writers={TOKEN: None}) as server:
        env = client_env(server, root / "home", TOKEN) | {"DOCS_FILES": json.dumps(files), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.docs_blocks", *map(str, PAGES)]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {(line["page"], line["line"]): line["error"] for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_runs(page: Path, ran: dict[tuple[str, int], str | None]) -> None:
    for block in blocks(page):
        error = ran[block.page, block.line]
        assert error is None, f"{block.page}:{block.line}\n{error}"
