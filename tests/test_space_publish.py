"""A Space for a model: written, and published with it, against a stand-in Hub."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from base64 import b64encode
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from hf_layerprune import CutError, __version__
from hf_layerprune.cli import main
from hf_layerprune.errors import CheckpointError
from hf_layerprune.publish.hub.space import secret_from_env
from hf_layerprune.publish.space import build_space
from tests.chat_models import pruned_model, tiny_chat_model
from tests.compat import STACKS
from tests.hub_repo import Repo
from tests.hub_server import HubServer, client_env

FILES = {
    "README.md", "about.py", "answers.py", "api.py", "app.py", "chat.py", "images.py", "page.py",
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


@pytest.fixture(scope="module")
def hub(folder: Path) -> Iterator[HubServer]:
    with HubServer({"org/base": folder / "base"}, writers={"hf_write": ["org"]}) as server:
        yield server


# A process that pushes as it is told, a line of JSON at a time. The client library reads its settings when it is
# imported, so it can't be the tests' own process; a fresh one each time would be slow.
WORKER = """
import contextlib, io, json, os, sys
from hf_layerprune.cli import main
usual = dict(os.environ)
for line in sys.stdin:
    order = json.loads(line)
    os.environ.clear()
    os.environ.update(usual | order["env"])
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["push", *order["words"]])
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


@dataclass
class Pushed:
    """What a push did and said."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture(scope="module")
def push(hub: HubServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Pushed]]:
    env = client_env(hub, tmp_path_factory.mktemp("home"), "hf_write")
    with subprocess.Popen([sys.executable, "-c", WORKER], env=env, stdin=-1, stdout=-1, text=True) as process:

        def ask(*words: str, **more: str) -> Pushed:
            print(json.dumps({"words": words, "env": more}), file=process.stdin, flush=True)
            return Pushed(*json.loads(process.stdout.readline()))

        yield ask
        process.stdin.close()


def front_matter(space: Path) -> dict:
    return yaml.safe_load((space / "README.md").read_text().split("---")[1])


def requirements(space: Path) -> dict[str, Requirement]:
    lines = [line for line in (space / "requirements.txt").read_text().splitlines() if not line.startswith("#")]
    return {one.name: one for one in map(Requirement, lines)}


def test_a_complete_space(folder: Path, tmp_path: Path) -> None:
    space = tmp_path / "space"
    build_space(space, model_repo_id="org/pruned", model=folder / "pruned")
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
    assert f"transformers{pins['transformers'].specifier}" in STACKS["newest"].packages
    # A plain model needs nothing of this package.
    assert "hf-layerprune" not in pins
    for path in space.rglob("*.py"):
        if path.name not in ("source.py", "weights.py"):
            assert "hf_layerprune" not in path.read_text()


def test_a_model_that_reads_images_needs_more_packages(folder: Path, tmp_path: Path) -> None:
    """Most image processors are of torchvision; without it the page would answer text alone. Some towers are of timm."""
    for name, section, packages in (
        ("text", {}, set()),
        ("images", {"vision_config": {"hidden_size": 8}}, {"torchvision"}),
        ("gemma3n", {"vision_config": {"model_type": "gemma3n_vision"}}, {"torchvision", "timm"}),
    ):
        shutil.copytree(folder / "pruned", tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | section))
        space = tmp_path / f"{name}-space"
        build_space(space, model_repo_id="org/pruned", model=tmp_path / name)
        adapter = tmp_path / f"{name}-adapter"
        shutil.copytree(folder / "adapter", adapter)
        settings = json.loads((adapter / "adapter_config.json").read_text())
        settings["base_model_name_or_path"] = str(tmp_path / name)
        (adapter / "adapter_config.json").write_text(json.dumps(settings))
        of_adapter = tmp_path / f"{name}-adapter-space"
        build_space(of_adapter, model_repo_id="org/adapter", model=adapter)
        for one in (space, of_adapter):
            assert {"torchvision", "timm"} & set((one / "requirements.txt").read_text().splitlines()) == packages


def test_an_adapter_of_a_local_base(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It needs this package. Its base is not named, since a Space can't read a folder of this machine."""
    space, moved = tmp_path / "space", Path(shutil.copytree(folder / "adapter", tmp_path / "adapter"))
    for model in (folder / "adapter", moved):
        build_space(space, model_repo_id="org/adapter", model=model)
        assert str(requirements(space)["hf-layerprune"].specifier) == f"=={__version__}"
        assert front_matter(space)["models"] == ["org/adapter"]
        assert ("may need more packages than" in caplog.text) == (model == moved)
        shutil.rmtree(space)
        settings = (moved / "adapter_config.json").read_text()
        (moved / "adapter_config.json").write_text(settings.replace(str(folder / "base"), str(tmp_path / "gone")))


def test_packed_weights_need_what_unpacks_them(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = folder / "pruned" / "config.json"
    text = config.read_text()
    try:
        for method in ("bitsandbytes", "unheard-of"):
            config.write_text(text.replace("{", f'{{"quantization_config": {{"quant_method": "{method}"}},', 1))
            space = tmp_path / method
            build_space(space, model_repo_id="org/pruned", model=folder / "pruned")
            assert ("bitsandbytes" in requirements(space)) == (method == "bitsandbytes")
    finally:
        config.write_text(text)
    assert "a package for unheard-of weights" in caplog.text


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CutError, match="'pruned' is not a Hub id"):
        build_space(tmp_path / "space", model_repo_id="pruned", model=tmp_path)
    (tmp_path / "space").mkdir()
    (tmp_path / "space" / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="is not empty"):
        build_space(tmp_path / "space", model_repo_id="org/pruned", model=tmp_path)
    assert [path.name for path in (tmp_path / "space").iterdir()] == ["mine"]
    monkeypatch.delenv("NOT_SET", raising=False)
    for name in ("NOT_SET", "hf_" + "aB3" * 12):  # a token in place of a name is not repeated
        with pytest.raises(CutError, match="names an environment variable that is not set") as error:
            secret_from_env(name)
        assert name not in str(error.value)


def test_push_a_model_and_its_space(hub: HubServer, push: Callable[..., Pushed], folder: Path) -> None:
    hub.reset()
    words = [str(folder / "pruned"), "org/pruned", "--space", "org/pruned-chat"]
    done = push(*words)
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
    again = push(*words)
    assert "unchanged: the Space" in again.stdout
    assert space.at("main").id == head.id


def test_another_space_is_not_replaced(
    hub: HubServer, push: Callable[..., Pushed], folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "app.py").write_text("print('mine')\n")
    hub.repos["spaces/org/game"] = Repo(tmp_path)
    done = push(str(folder / "pruned"), "org/unseen", "--space", "org/game")
    assert done.returncode == 1
    assert "org/game exists, and is not a chat of hf-layerprune" in done.stderr
    (tmp_path / "app.py").rename(tmp_path / "LICENSE")  # and .gitattributes: made by hand, and empty
    for name in (".gitattributes", ".gitignore", "README.md"):
        (tmp_path / name).touch()
    done = push(str(folder / "pruned"), "org/unseen", "--private", "--space", "org/game")
    assert done.returncode == 1
    assert "the Space org/game exists and is public, but --private was given" in done.stderr
    assert "org/unseen" not in hub.repos
    done = push(str(folder / "pruned"), "org/unseen", "--space", "org/game")
    assert "org/game is a folder that is only served" in done.stderr  # by the stand-in, which was to write to it


@pytest.mark.parametrize(
    ("model", "space", "made"),
    [("org/first", "theirs/new", ["org/first"]), ("org/first", "theirs/chat", []), ("theirs/model", "org/new", [])],
)
def test_what_may_not_be_written_is_refused_before_anything_is_sent(
    hub: HubServer, push: Callable[..., Pushed], folder: Path, model: str, space: str, made: list[str]
) -> None:
    before = dict(hub.repos)
    hub.writers["hf_all"] = None
    assert push(str(folder / "pruned"), "theirs/model", "--space", "theirs/chat", HF_TOKEN="hf_all").returncode == 0
    heads = {name: hub.repos[name].at("main").id for name in ("theirs/model", "spaces/theirs/chat")}
    present = set(hub.repos)
    try:
        done = push(str(folder / "pruned"), model, "--space", space)
        assert done.returncode == 1
        refused = f"the Space {space}" if space.startswith("theirs") else model
        assert f"this token may not write to {refused} (" in done.stderr
        assert ("--create-pr" in done.stderr) == (model == "theirs/model")
        assert sorted(hub.repos.keys() - present) == made  # of which nobody knows yet
        assert all(hub.repos[name].at("main").parent is None for name in made)
        assert heads == {name: hub.repos[name].at("main").id for name in heads}
    finally:
        hub.repos.clear()
        hub.repos.update(before)


def test_a_model_whose_space_fails_after_it(hub: HubServer, push: Callable[..., Pushed], folder: Path) -> None:
    hub.status("/commit/main", 412, method="POST", prefix="/api/spaces/")
    words = [str(folder / "pruned"), "org/half", "--space", "org/half-chat"]
    done = push(*words)
    assert done.returncode == 1
    assert (
        f"the model is on the Hub ({hub.endpoint}/org/half), but its Space was not published: somebody else changed"
        in done.stderr
    )
    assert "org/half-chat" in (folder / "pruned" / "README.md").read_text()
    done = push(*words)
    assert "nothing has changed" in done.stdout
    assert "published: the Space" in done.stdout


def test_changes_of_a_spaces_owner_are_not_replaced(hub: HubServer, push: Callable[..., Pushed], folder: Path) -> None:
    def change(name: str, text: str) -> None:
        content = b64encode(text.encode()).decode()
        changes = {"key": "file", "value": {"path": name, "content": content}}
        space.commit("main", [{"value": {"summary": f"Update {name}"}}, changes])

    def text(name: str) -> str:
        return space.at("main").files[name].path.read_text()

    words = [str(folder / "pruned"), "org/owned", "--space", "org/owned-chat"]
    assert push(*words).returncode == 0
    space, app = hub.repos["spaces/org/owned-chat"], (Path("spaces") / "chat" / "app.py").read_text()
    change("style.css", "body { color: red }")
    change("notes.txt", "Mine.")
    change("app.py", "# mine\n")
    done = push(str(folder / "pruned"), "org/unseen", *words[2:])
    assert done.returncode == 1
    assert "org/owned-chat has changes that hf-layerprune did not make, in app.py, style.css; omit" in done.stderr
    assert "org/unseen" not in hub.repos
    assert text("app.py") == "# mine\n"
    change("app.py", app)
    done = push(*words, "--overwrite-space")
    assert done.returncode == 0, done.stderr
    assert text("style.css") != "body { color: red }"
    assert text("notes.txt") == "Mine."
    done = push(str(folder / "pruned"), "org/owned-too", *words[2:])  # what is ours changes: the model's name
    assert done.returncode == 0, done.stderr
    assert "org/owned-too" in text("README.md")


def test_a_private_model_and_the_token_that_its_space_reads_it_with(
    hub: HubServer, push: Callable[..., Pushed], folder: Path
) -> None:
    needed = "the model is private or gated, so the Space needs a secret HF_TOKEN to read it"
    words = [str(folder / "pruned"), "org/secret", "--private", "--space", "org/secret-chat"]
    done = push(*words)
    assert done.returncode == 0, done.stderr
    assert {"org/secret", "spaces/org/secret-chat"} <= hub.private
    assert needed in done.stdout
    assert not hub.repos["spaces/org/secret-chat"].secrets
    done = push(*words, "--space-secret", "READ_TOKEN", READ_TOKEN="hf_only_read")
    assert done.returncode == 0, done.stderr
    assert hub.repos["spaces/org/secret-chat"].secrets == {"HF_TOKEN": "hf_only_read"}
    assert "with the token of READ_TOKEN as its secret HF_TOKEN" in done.stdout
    assert "hf_only_read" not in done.stdout + done.stderr
    for file in hub.repos["spaces/org/secret-chat"].at("main").files.values():
        assert "hf_" not in file.path.read_text().replace("hf_layerprune", "").replace("huggingface", "")
    # So is a later Space of a model that is known to be private, until its owner makes it public.
    later = [*words[:2], "--space", "org/later-chat"]
    done = push(*later)
    assert done.returncode == 0, done.stderr
    assert "spaces/org/later-chat" in hub.private
    assert needed in done.stdout
    hub.private.remove("spaces/org/later-chat")
    done = push(*later)
    assert done.returncode == 0, done.stderr
    assert "spaces/org/later-chat" not in hub.private
    hub.private.remove("org/secret")
    assert needed not in push(*later).stdout
    hub.gated.add("org/secret")
    assert needed in push(*later).stdout
    # Whether new ones are public is up to the settings of their owner.
    hub.writers["hf_team"], hub.closed = ["team"], {"team"}
    done = push(words[0], "team/model", "--space", "team/chat", HF_TOKEN="hf_team")
    assert done.returncode == 0, done.stderr
    assert {"team/model", "spaces/team/chat"} <= hub.private


def test_a_card_that_may_not_be_read_is_not_replaced(
    hub: HubServer, push: Callable[..., Pushed], folder: Path
) -> None:
    assert push(str(folder / "pruned"), "org/pruned").returncode == 0
    hub.repos["others/gated"] = hub.repos["org/pruned"]
    hub.gated.add("others/gated")
    done = push(str(folder / "pruned"), "others/gated", "--create-pr")
    assert done.returncode == 1
    assert "Access to model others/gated is restricted" in done.stderr
    assert not hub.repos["others/gated"].pulls


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--space", "chat"], "'chat' is not a Hub id"),
        (
            ["--space", "org/chat", "--create-pr"],
            "--space shows the model's main branch; omit --revision and --create-pr",
        ),
        (["--overwrite-space"], "need --space"),
        (["--space-secret", "NOT_SET"], "need --space"),
        (["--space", "org/chat", "--space-secret", "NOT_SET"], "names an environment variable that is not set"),
    ],
)
def test_words_that_make_no_sense_push_nothing(
    hub: HubServer, push: Callable[..., Pushed], folder: Path, words: list[str], message: str
) -> None:
    before = set(hub.repos)
    done = push(str(folder / "pruned"), "org/never", *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert set(hub.repos) == before
