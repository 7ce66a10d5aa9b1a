"""The published Space, whole: its environment made from its own requirements, and its page served from a stand-in Hub.

pytest -m space tests/test_space_whole.py
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError

from hf_layerprune.cli import main
from tests.chat_models import pruned_model, tiny_chat_model
from tests.hub_server import HubServer, client_env

pytestmark = pytest.mark.space


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    tiny_chat_model(tmp_path / "base")
    with HubServer(
        {"org/base": tmp_path / "base"}, writers={"hf_write": ["org"]}, tokens={"hf_read": {"org/pruned"}}
    ) as server:
        yield server


def test_the_published_space(hub: HubServer, tmp_path: Path) -> None:
    # Publish, as its maker does.
    pruned = pruned_model(tmp_path / "base", tmp_path / "pruned")
    assert main(["card", str(pruned), "--base-model", "org/base", "--license", "apache-2.0"]) == 0
    script = "import sys; from hf_layerprune.cli import main; sys.exit(main())"
    words = ["push", str(pruned), "org/pruned", "--private", "--space", "org/pruned-chat", "--space-secret", "SECRET"]
    env = client_env(hub, tmp_path / "maker", "hf_write") | {"SECRET": "hf_read"}
    subprocess.run([sys.executable, "-c", script, *words], env=env, check=True, timeout=300)

    # Build, as the Hub does: the Space's own files, and nothing but its own requirements.
    space = tmp_path / "space"
    for name, file in hub.repos["spaces/org/pruned-chat"].at("main").files.items():
        (space / name).parent.mkdir(parents=True, exist_ok=True)
        (space / name).write_bytes(file.path.read_bytes())
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-r", "requirements.txt"]
    subprocess.run(install, cwd=space, check=True, timeout=1800)
    found = subprocess.run([python, "-m", "pip", "list"], capture_output=True, text=True, check=True).stdout
    assert "hf-layerprune" not in found

    # Run, with the secret that the Space has.
    secrets = hub.repos["spaces/org/pruned-chat"].secrets
    env = client_env(hub, tmp_path / "home") | secrets | {"GRADIO_ANALYTICS_ENABLED": "False", "PYTHONUNBUFFERED": "1"}
    env = {name: value for name, value in env.items() if name not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    with subprocess.Popen([python, "app.py"], cwd=space, env=env, stdout=subprocess.PIPE, text=True) as process:
        try:
            url = next(found[0] for line in process.stdout if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            client = Client(url, verbose=False)
            answer = _when_loaded(lambda: client.predict("ba be", max_tokens=8, seed=3, api_name="/chat"))
            assert answer
            both = _when_loaded(lambda: client.predict("ba be", max_tokens=8, seed=3, api_name="/compare"))
            assert both["pruned"]["text"] == answer
            assert both["dense"]["text"] not in ("", answer)
            assert client.predict(api_name="/about")["lineage"]["entries"][0]["settings"]["drop_layers"] == [3, 4]
        finally:
            process.terminate()


def _when_loaded(ask: Callable[[], Any]) -> Any:
    for _ in range(600):
        try:
            return ask()
        except AppError as error:
            if "loading" not in str(error):
                raise
            time.sleep(0.1)
    raise AssertionError("the weights did not load")
