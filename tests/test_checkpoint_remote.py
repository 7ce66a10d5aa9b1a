"""Cutting straight from the Hub: the same files as a local cut, and only weight files with tensors to keep."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.checkpoint import make_llama
from hf_layerprune.records.fingerprints import fingerprint

from .cutting import cut_checkpoint
from .folders import snapshot
from .hub_repo import Repo
from .hub_server import HubServer, client_env
from .tiny_models import EAGER, tiny_input, tiny_model

TYPES = {"llama": [5, 6], "gemma3n_text": [1, 2], "qwen3_moe": [0, 4, 6]}
LICENCES = ("LICENSE", "NOTICE", "USAGE_POLICY", "Model License.pdf")
BIG_DROP = list(range(21, 29))
TOKEN = "hf_good"

# A process that cuts as it is told, a line of JSON at a time. The client library reads its settings when it is
# imported, so it can't be the tests' own process; a fresh one each time would be slow.
WORKER = """
import json, sys, traceback
from tests.cutting import cut_checkpoint
from hf_layerprune.cut.sizes import Sizes
from hf_layerprune.errors import LayerPruneError
from hf_layerprune.runtime.loading import load_base, load_config
from hf_layerprune.files.hub import Repo
for line in sys.stdin:
    order = json.loads(line)
    try:
        if order.pop("fingerprint", False):
            answer = {"files": Repo.open(order.pop("source"), **order).fingerprint()}
        elif order.pop("load", False):
            answer = {"loaded": type(load_base(order.pop("source"), **order)).__name__}
        elif order.pop("sizes", False):
            sizes = Sizes(load_config(order["source"]), order["source"])
            answer = {"bytes": sizes.file_bytes(order["drop_layers"])}
        else:
            plan = cut_checkpoint(**order)
            answer = {"kept": plan.weight_bytes}
    except LayerPruneError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    except BaseException:
        answer = {"crash": traceback.format_exc()}
    print(json.dumps(answer), flush=True)
"""


class Client:
    """A process that cuts from the Hub."""

    def __init__(self, server: HubServer, home: Path, **env: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER], env=client_env(server, home) | env, stdin=-1, stdout=-1, text=True
        )

    def ask(self, **order: Any) -> dict[str, Any]:
        print(json.dumps(order), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        assert "crash" not in answer, answer["crash"]
        return answer

    def cut(self, repo: str, target: Path, drop: list[int], cache: str | Path | None = None, **more: Any) -> dict:
        cache = cache or target.parent / "cache"
        return self.ask(source=repo, target=str(target), drop_layers=drop, cache_dir=str(cache), **more)

    def stop(self) -> None:
        self._process.stdin.close()
        assert self._process.wait(600) == 0
        self._process.stdout.close()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    for model_type in TYPES:
        tiny_model(model_type).save_pretrained(root / model_type, max_shard_size="40KB")
        (root / model_type / "README.md").write_text("# the base's card\n")
        (root / model_type / "tokenizer.json").write_text('{"a": 1}\n')
        (root / model_type / "training_args.bin").write_bytes(b"state of a training")
        (root / model_type / "additional_chat_templates").mkdir()
        (root / model_type / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}\n")
    tiny_model("llama").save_pretrained(root / "single")
    for name in LICENCES:
        (root / "single" / name).write_text("Terms.\n")
    make_llama(root / "big", 0.03, shard_bytes=2_000_000)
    (root / "pickled").mkdir()
    shutil.copy(root / "single" / "config.json", root / "pickled")
    (root / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04")
    (root / "adapter").mkdir()
    (root / "adapter" / "adapter_config.json").write_text("{}")
    shutil.copytree(root / "llama", root / "hostile")
    index = root / "hostile" / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.norm.weight"] = "../../../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    shutil.copytree(root / "llama", root / "missing")
    sorted((root / "missing").glob("*.safetensors"))[0].unlink()
    return {folder.name: folder for folder in root.iterdir()}


@pytest.fixture(scope="module")
def shared(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[HubServer, Client]]:
    repos = {f"org/{name}": folder for name, folder in bases.items()}
    repos |= {"org/private": bases["single"], "org/gated": bases["single"]}
    with HubServer(repos, private={"org/private"}, gated={"org/gated"}, tokens={TOKEN: None}) as server:
        client = Client(server, tmp_path_factory.mktemp("home"))
        yield server, client
        client.stop()


@pytest.fixture
def hub(shared: tuple[HubServer, Client]) -> HubServer:
    shared[0].reset()
    return shared[0]


@pytest.fixture
def client(shared: tuple[HubServer, Client]) -> Client:
    return shared[1]


def leftovers(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if path.name.startswith(f".{target.name}"))


def fetched(hub: HubServer) -> set[str]:
    """The weight files of which anything was sent."""
    return {one.path.rpartition("/")[2] for one in hub.log if one.sent and one.path.endswith(".safetensors")}


@pytest.mark.parametrize("name", [*TYPES, "single"])
def test_the_same_files_as_a_local_cut(
    hub: HubServer, client: Client, bases: dict[str, Path], tmp_path: Path, name: str
) -> None:
    drop = TYPES.get(name, [3])
    assert "error" not in client.cut(f"org/{name}", tmp_path / "far", drop)
    cut_checkpoint(bases[name], tmp_path / "near", drop)
    far = snapshot(tmp_path / "far")
    assert far == snapshot(tmp_path / "near")
    assert leftovers(tmp_path / "far") == []
    assert not any(one.path.endswith((".bin", "README.md")) for one in hub.log)
    if name != "single":
        assert {"tokenizer.json", "additional_chat_templates/tool.jinja"} <= far.keys()
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "far", dtype=torch.float32, **EAGER)
        with torch.no_grad():
            assert torch.isfinite(model(tiny_input(), use_cache=False).logits).all()


def test_sizes_are_known_from_headers_alone(
    hub: HubServer, client: Client, bases: dict[str, Path], tmp_path: Path
) -> None:
    plan = cut_checkpoint(bases["big"], tmp_path / "near", BIG_DROP)
    assert client.ask(source="org/big", drop_layers=BIG_DROP, sizes=True) == {"bytes": plan.weight_bytes}
    assert sum(one.sent for one in hub.log) < plan.weight_bytes / 4


def test_only_files_with_something_that_stays_are_fetched_and_once(
    hub: HubServer, client: Client, bases: dict[str, Path], tmp_path: Path
) -> None:
    client.cut("org/big", tmp_path / "cut", BIG_DROP)
    index = json.loads((bases["big"] / "model.safetensors.index.json").read_text())["weight_map"]
    stays = {file for name, file in index.items() if not any(f".layers.{i}." in name for i in BIG_DROP)}
    assert stays < set(index.values())
    assert fetched(hub) == stays
    # All is asked for at one commit.
    commit = hub.repos["org/big"].branches["main"]
    assert all(
        f"/resolve/{commit}/" in one.path
        for one in hub.log
        if one.path.endswith(".safetensors") and "/resolve/" in one.path
    )

    # The files are where the Hub client, and so the teacher, finds them later.
    hub.reset()
    client.cut("org/big", tmp_path / "again", BIG_DROP)
    assert snapshot(tmp_path / "again") == snapshot(tmp_path / "cut")
    assert not fetched(hub)
    assert not any(one.authorized for one in hub.log)

    # Without a connection, what is in the cache is enough. transformers has left a listing there of files that it did not fetch.
    client.ask(source="org/llama", load=True, cache_dir=str(tmp_path / "cache"))
    offline = Client(hub, tmp_path / "other home", HF_HUB_OFFLINE="1")
    hub.reset()
    found = offline.ask(source="org/llama", fingerprint=True, cache_dir=str(tmp_path / "cache"))["files"]
    assert found.keys() == {"config.json", "generation_config.json"} | {
        path.name for path in bases["llama"].glob("*.safetensors*")
    }
    assert "error" not in offline.cut("org/big", tmp_path / "offline", BIG_DROP, tmp_path / "cache")
    assert snapshot(tmp_path / "offline") == snapshot(tmp_path / "cut")
    error = offline.cut("org/big", tmp_path / "more", [3], tmp_path / "cache")["error"]
    assert "is not in the cache, and the Hub can't be reached (HF_HUB_OFFLINE is set)" in error
    assert "is not in the cache" in offline.cut("org/single", tmp_path / "more", [3], tmp_path / "cache")["error"]
    offline.stop()
    assert hub.log == []


def test_access(hub: HubServer, client: Client, tmp_path: Path) -> None:
    target = tmp_path / "cut"

    def error(repo: str, **more: Any) -> str:
        answer = client.cut(repo, target, [3], tmp_path / f"cache-{len(hub.log)}", **more)
        assert not target.exists()
        assert leftovers(target) == []
        assert "\n" not in answer["error"]
        assert TOKEN not in answer["error"]
        return answer["error"]

    for repo in ("org/private", "org/nothing"):
        assert "nor on the Hub, unless it is private" in error(repo)
        assert "hf auth login" in error(repo)
    assert "is gated; ask for access" in error("org/gated")
    assert "hf auth login" in error("org/gated", token="hf_bad")
    assert "has no revision 'v9'" in error("org/single", revision="v9")
    assert "org/single@main is not a Hub id: Repo id must use" in error("org/single@main")
    assert "org/adapter is an adapter, not a model; merge it" in error("org/adapter")
    assert "only pickled weights (pytorch_model.bin)" in error("org/pickled")
    assert "is not a plain .safetensors file beside it" in error("org/hostile")
    assert "has no model-00001-of" in error("org/missing")
    assert not fetched(hub)
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "thesis.txt").write_text("mine")
    assert "exists and is not empty" in client.cut("org/big", target, [3])["error"]  # before anything is fetched
    assert not fetched(hub)
    for repo in ("org/private", "org/gated"):
        hub.reset()
        assert "error" not in client.cut(repo, tmp_path / repo, [3], tmp_path / "cache", token=TOKEN)
        assert (tmp_path / repo / "model.safetensors").exists()
        assert {one.authorized for one in hub.log if one.path.startswith("/cdn/")} == {False}


def test_hostile_weight_files(hub: HubServer, client: Client, bases: dict[str, Path], tmp_path: Path) -> None:
    assert client.ask(load=True, source="org/llama") == {"loaded": "LlamaForCausalLM"}
    folder = Path(shutil.copytree(bases["llama"], tmp_path / "model"))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps(content | {"weight_map": dict.fromkeys(content["weight_map"], "weights.bin")}))
    torch.save(tiny_model("llama").state_dict(), folder / "weights.bin")
    odd = Path(shutil.copytree(bases["single"], tmp_path / "odd"))
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}).encode()
    (odd / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    hub.repos |= {"org/pickles": Repo(folder), "org/odd": Repo(odd)}
    answer = client.ask(load=True, source="org/pickles")
    assert "names 'weights.bin', which is not a plain .safetensors file" in answer["error"]
    assert not hub.bytes_served("weights.bin")
    answer = client.ask(sizes=True, source="org/odd", drop_layers=[1])
    assert "org/odd/model.safetensors is not a valid safetensors file" in answer["error"]


def test_a_file_that_arrives_otherwise_than_listed_is_refused(
    hub: HubServer, client: Client, bases: dict[str, Path], tmp_path: Path
) -> None:
    """The same length, other bytes: the Hub's own hash tells."""
    base = Path(shutil.copytree(bases["single"], tmp_path / "base"))
    hub.repos["org/garbled"] = Repo(base)
    hub.repos["org/garbled"].at("main")
    weights, state = base / "model.safetensors", (base / "model.safetensors").stat()
    raw = weights.read_bytes()
    weights.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))  # the stand-in hashes it again otherwise
    answer = client.cut("org/garbled", tmp_path / "cut", [3])
    assert "org/garbled/model.safetensors differs from the file on the Hub" in answer["error"]
    assert "run the command again" in answer["error"]
    assert not list((tmp_path / "cache").rglob("model.safetensors"))
    weights.write_bytes(raw)
    os.utime(weights, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert "error" not in client.cut("org/garbled", tmp_path / "cut", [3])
    (cached,) = (tmp_path / "cache").rglob("model.safetensors")
    cached.resolve().write_bytes(raw[:-1])
    assert "is incomplete; delete it from the cache" in client.cut("org/garbled", tmp_path / "more", [3])["error"]
    assert not (tmp_path / "more").exists()


def test_what_answers_is_not_the_hub(tmp_path: Path) -> None:
    from http.server import BaseHTTPRequestHandler, HTTPServer
    from threading import Thread

    class Portal(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(b"<html>\n<body>Welcome to the hotel; please log in</body></html>")

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Portal)
    Thread(target=server.serve_forever, daemon=True).start()

    class Hub:
        endpoint = f"http://127.0.0.1:{server.server_port}"

    client = Client(Hub, tmp_path / "home")
    error = client.cut("org/model", tmp_path / "cut", [3])["error"]
    assert "is not from the Hub" in error
    assert "log-in page or a proxy" in error
    assert "\n" not in error
    server.shutdown()
    server.server_close()
    # And with nothing there at all:
    error = client.cut("org/model", tmp_path / "cut", [3])["error"]
    assert "is not in the cache, and the Hub can't be reached" in error
    client.stop()


def test_a_base_is_told_apart_by_what_the_hub_lists(
    hub: HubServer, client: Client, bases: dict[str, Path], tmp_path: Path
) -> None:
    client.cut("org/llama", tmp_path / "cut", TYPES["llama"])
    hub.reset()
    files = client.ask(source="org/llama", fingerprint=True, cache_dir=str(tmp_path / "cache"))["files"]
    assert files == fingerprint(bases["llama"])
    assert not fetched(hub)


def test_weights_that_the_hub_lists_without_a_hash_are_told_apart_by_their_content(
    hub: HubServer, client: Client, bases: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small ones may be kept in git itself. Whatever is in the cache, they are recorded in the same way."""
    monkeypatch.setattr("tests.hub_repo.LFS_SUFFIXES", set())
    hub.repos["org/plain"] = Repo(bases["llama"])
    client.cut("org/plain", tmp_path / "cut", TYPES["llama"])
    weights = {name: entry for name, entry in fingerprint(bases["llama"]).items() if name.endswith(".safetensors")}
    for cache in ("cache", "empty"):
        files = client.ask(source="org/plain", fingerprint=True, cache_dir=str(tmp_path / cache))["files"]
        assert weights.items() <= files.items()


def run(hub: HubServer, home: Path, *commands: list[str], **env: str) -> tuple[list[int], str, str]:
    """Run commands in one process; their exit codes, and what they said."""
    code = (
        "import json, sys; from hf_layerprune.cli import main; print([main(each) for each in json.loads(sys.argv[1])])"
    )
    words = [sys.executable, "-c", code, json.dumps(commands)]
    done = subprocess.run(words, env=client_env(hub, home) | env, capture_output=True, text=True, check=True)
    *said, codes = done.stdout.splitlines()
    return json.loads(codes), "\n".join(said), done.stderr


def test_the_command(hub: HubServer, bases: dict[str, Path], tmp_path: Path) -> None:
    out, home = tmp_path / "out", tmp_path / "home"
    gated = ["prune", "org/gated", str(tmp_path / "no")]
    adapter = ["inspect", "org/adapter"]
    codes, said, error = run(hub, home, ["prune", "org/llama", str(out), "--drop", "2"], gated, adapter)
    assert codes == [0, 1, 1], error
    assert "org/adapter is an adapter, not a model; merge it into its base first" in error
    assert said.startswith(f"dropped layers 6-7 of 8: 6 left, in {out}; next: hf-layerprune eval {out} --base ")
    assert "org/gated is gated; ask for access" in error
    assert re.search(
        r"^org/llama: downloading \d+ weight files? with tensors to keep \([0-9.]+ kB\)$", error, re.MULTILINE
    )
    assert re.search(r"^org/llama: keeping 6 of 8 layers and [0-9.]+ kB of weights$", error, re.MULTILINE)
    assert "Traceback" not in error
    assert not (tmp_path / "no").exists()
    cut_checkpoint(bases["llama"], tmp_path / "near", [6, 7])
    written = snapshot(out)
    base = json.loads(written.pop("lineage.json"))["base"]
    assert written == snapshot(tmp_path / "near")
    assert base["id"] == "org/llama"
    assert base["commit"] == hub.repos["org/llama"].branches["main"]
    assert base["files"] == fingerprint(bases["llama"])

    hub.reset()
    again = ["prune", "org/llama", str(tmp_path / "again"), "--drop", "2"]
    unknown = ["prune", "org/single", str(tmp_path / "no"), "--drop", "2"]
    codes, said, error = run(hub, home, again, unknown, HF_HUB_OFFLINE="1")
    assert codes == [0, 1], error
    assert not hub.log
    assert snapshot(tmp_path / "again").keys() == snapshot(out).keys()
    assert "is not in the cache" in error
    assert "downloading" not in error
    assert "Traceback" not in error
    assert not (tmp_path / "no").exists()


def test_the_licence_goes_with_the_model_even_if_the_base_is_loaded(hub: HubServer, tmp_path: Path) -> None:
    """Loading a model from the Hub downloads no licence."""
    ways = {"copied": [], "converted": ["--dtype", "bfloat16"], "adapter": ["--adapter"]}
    for name, options in ways.items():
        command = ["prune", "org/single", str(tmp_path / name), "--drop-layers", "3", *options]
        codes, _, error = run(hub, tmp_path / f"home-{name}", command)
        assert codes == [0], error
        assert not [one for one in LICENCES if not (tmp_path / name / one).is_file()]


@pytest.mark.parametrize("options", [["--adapter"], []])
def test_an_adapter_can_do_without_a_licence_file_that_is_not_served(
    hub: HubServer, tmp_path: Path, options: list[str]
) -> None:
    hub.status("/LICENSE", 404, times=9)
    command = ["prune", "org/single", str(tmp_path / "out"), "--drop-layers", "3", *options]
    codes, _, error = run(hub, tmp_path / "home", command)
    assert codes == [0 if options else 1], error
    assert ("copy the licence into" in error) == bool(options)
    assert (tmp_path / "out" / "adapter_config.json").is_file() == bool(options)
