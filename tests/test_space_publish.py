"""A Space for a model: written, and published with it, against a stand-in Hub."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from hf_layerprune import CutError, __version__
from hf_layerprune.cli import main
from hf_layerprune.errors import CheckpointError
from hf_layerprune.publish.space import build_space, secret_from, space_source
from tests.chat_models import pruned_model, tiny_chat_model
from tests.hub_server import HubServer, client_env

FILES = {
    "README.md", "about.py", "answers.py", "api.py", "app.py", "chat.py", "figures.py", "measured.py", "page.py",
    "requirements.txt", "source.py", "style.css", "weights.py",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("space")
    tiny_chat_model(folder / "base")
    pruned_model(folder / "base", folder / "pruned")
    pruned_model(folder / "base", folder / "adapter", "--adapter")
    assert main(["card", str(folder / "pruned"), "--base-model", "org/base", "--license", "apache-2.0"]) == 0
    return folder


@pytest.fixture
def hub(folder: Path) -> Iterator[HubServer]:
    with HubServer({"org/base": folder / "base"}, writers={"hf_write": ["org"]}) as server:
        yield server


def front_matter(space: Path) -> dict:
    return yaml.safe_load((space / "README.md").read_text().split("---")[1])


def requirements(space: Path) -> dict[str, Requirement]:
    lines = [line for line in (space / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    return {one.name: one for one in map(Requirement, lines)}


def test_a_complete_space(folder: Path, tmp_path: Path) -> None:
    space = build_space(tmp_path / "space", model_repo_id="org/pruned", base_repo_id="org/base")
    assert {path.name for path in space.iterdir()} == FILES
    found = front_matter(space)
    assert found["models"] == ["org/pruned", "org/base"]
    assert found["title"] == "pruned"
    assert found["sdk"] == "gradio"
    assert found["app_file"] == "app.py"
    assert found["license"] == "apache-2.0"
    assert found["emoji"]
    assert len(found["short_description"]) <= 60
    # What is pinned for Gradio is what the front matter names, and what this package asks for.
    pins = requirements(space)
    assert str(pins["gradio"].specifier) == f"=={found['sdk_version']}"
    assert pins["gradio"].extras == {"mcp"}
    ours = {one.name: one for one in map(Requirement, requires("hf-layerprune"))}
    for name, pin in pins.items():
        version = str(pin.specifier).removeprefix("==")
        if name in ours and "==" in str(pin.specifier):
            assert ours[name].specifier.contains(version), name
    # A plain model needs nothing of this package.
    assert "hf-layerprune" not in pins
    for path in space.glob("*.py"):
        if path.name not in ("source.py", "weights.py"):
            assert "hf_layerprune" not in path.read_text()


def test_the_base_is_the_one_that_the_history_names(folder: Path, tmp_path: Path) -> None:
    """If it is on the Hub; a folder of this machine is nothing to a Space."""
    space = build_space(tmp_path / "space", model_repo_id="org/pruned", model=folder / "pruned")
    assert front_matter(space)["models"] == ["org/pruned", "org/base"]
    space = build_space(tmp_path / "other", model_repo_id="org/adapter", model=folder / "adapter")
    assert front_matter(space)["models"] == ["org/adapter"]


def test_an_adapter_needs_this_package(folder: Path, tmp_path: Path) -> None:
    space = build_space(tmp_path / "space", model_repo_id="org/adapter", model=folder / "adapter")
    assert str(requirements(space)["hf-layerprune"].specifier) == f"=={__version__}"


def test_packed_weights_need_what_unpacks_them(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = folder / "pruned" / "config.json"
    text = config.read_text()
    try:
        for method in ("bitsandbytes", "unheard-of"):
            config.write_text(text.replace("{", f'{{"quantization_config": {{"quant_method": "{method}"}},', 1))
            space = build_space(tmp_path / method, model_repo_id="org/pruned", model=folder / "pruned")
            assert ("bitsandbytes" in requirements(space)) == (method == "bitsandbytes")
    finally:
        config.write_text(text)
    assert "weights of the kind unheard-of" in caplog.text


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CutError, match="'pruned' is no id on the Hub"):
        build_space(tmp_path / "space", model_repo_id="pruned")
    (tmp_path / "space").mkdir()
    (tmp_path / "space" / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="is not empty"):
        build_space(tmp_path / "space", model_repo_id="org/pruned")
    assert [path.name for path in (tmp_path / "space").iterdir()] == ["mine"]
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(CutError, match="NOT_SET is not set"):
        secret_from("NOT_SET")


def push(hub: HubServer, home: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    script = "import sys; from hf_layerprune.cli import main; sys.exit(main())"
    env = client_env(hub, home, "hf_write") | more
    return subprocess.run([sys.executable, "-c", script, "push", *words], env=env, capture_output=True, text=True)


def test_push_a_model_and_its_space(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    words = [str(folder / "pruned"), "org/pruned", "--space", "org/pruned-chat"]
    done = push(hub, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert "published: the Space" in done.stdout
    space = hub.repos["spaces/org/pruned-chat"]
    assert space.sdk == "gradio"
    head = space.at("main")
    assert set(head.files) >= FILES
    assert space.at(head.parent).parent is None  # one commit after the one that makes it
    assert "org/pruned" in head.files["README.md"].path.read_text()
    assert "spaces/org/pruned-chat" in hub.repos["org/pruned"].at("main").files["README.md"].path.read_text()
    assert not space.secrets
    assert not [one for one in hub.log if one.path.endswith("/secrets")]
    again = push(hub, tmp_path, *words)
    assert "unchanged: the Space" in again.stdout
    assert space.at("main").id == head.id


def test_a_private_model_and_the_token_that_its_space_reads_it_with(
    hub: HubServer, folder: Path, tmp_path: Path
) -> None:
    words = [str(folder / "pruned"), "org/secret", "--private", "--space", "org/secret-chat"]
    done = push(hub, tmp_path, *words)
    assert done.returncode == 0, done.stderr
    assert {"org/secret", "spaces/org/secret-chat"} <= hub.private
    assert "the Space can't read a private model yet" in done.stdout
    assert not hub.repos["spaces/org/secret-chat"].secrets
    done = push(hub, tmp_path, *words, "--space-secret", "READ_TOKEN", READ_TOKEN="hf_only_read")
    assert done.returncode == 0, done.stderr
    assert hub.repos["spaces/org/secret-chat"].secrets == {"HF_TOKEN": "hf_only_read"}
    assert "hf_only_read" not in done.stdout + done.stderr
    for file in hub.repos["spaces/org/secret-chat"].at("main").files.values():
        assert "hf_" not in file.path.read_text().replace("hf_layerprune", "").replace("huggingface", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--space", "chat"], "'chat' is no id on the Hub"),
        (["--space", "org/chat", "--create-pr"], "leave out --revision and --create-pr"),
        (["--space", "org/chat", "--space-secret", "NOT_SET"], "the variable NOT_SET is not set"),
    ],
)
def test_words_that_make_no_sense_push_nothing(
    hub: HubServer, folder: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    done = push(hub, tmp_path, str(folder / "pruned"), "org/pruned", *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert set(hub.repos) == {"org/base"}


def test_the_source_is_found() -> None:
    assert {path.name for path in space_source().iterdir() if path.suffix} >= FILES
