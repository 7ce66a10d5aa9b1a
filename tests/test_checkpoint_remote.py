"""Cutting straight from the Hub: the same files as a local cut, for no more bytes than stay, whatever goes wrong."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.checkpoint import make_llama
from hf_layerprune.cut.disk import cut_checkpoint
from hf_layerprune.cut.download import _joined, _missing
from hf_layerprune.records.fingerprints import fingerprint

from .hub_server import HubServer, Request, client_env
from .tiny_models import EAGER, tiny_input, tiny_model

TYPES = {"llama": [5, 6], "gemma3n_text": [1, 2], "qwen3_moe": [0, 4, 6]}
BIG_DROP = list(range(21, 29))
TOKEN = "hf_good"

# A process that cuts as it is told, a line of JSON at a time. The client library reads its settings when it is
# imported, so it can't be the tests' own process; a fresh one each time would be slow.
WORKER = """
import json, sys, traceback
from hf_layerprune.cut import download, ranges
from hf_layerprune.cut.disk import cut_checkpoint
from hf_layerprune.errors import LayerPruneError
ranges.FIRST_WAIT, download.CHUNK, download.ROWS_CHUNK = 0.02, 1 << 18, 1 << 12
for line in sys.stdin:
    order = json.loads(line)
    try:
        if fetch := order.pop("fetch", None):
            from huggingface_hub import hf_hub_download
            hf_hub_download(order["source"], fetch, cache_dir=order["cache_dir"])
            answer = {}
        else:
            plan = cut_checkpoint(**order, progress=False)
            answer = {"kept": plan.weight_bytes, "source_bytes": plan.source_bytes}
    except LayerPruneError as error:
        answer = {"error": str(error), "kind": type(error).__name__}
    except BaseException:
        answer = {"crash": traceback.format_exc()}
    print(json.dumps(answer), flush=True)
"""


class Client:
    """A process that cuts from the Hub."""

    def __init__(self, server: HubServer, home: Path) -> None:
        self._home = home
        self._process = subprocess.Popen(
            [sys.executable, "-c", WORKER], env=client_env(server, home), stdin=-1, stdout=-1, text=True
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
    make_llama(root / "big", 0.03, shard_bytes=2_000_000)
    (root / "pickled").mkdir()
    shutil.copy(root / "single" / "config.json", root / "pickled")
    (root / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04")
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


@pytest.fixture(scope="module")
def big_cut(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    target = tmp_path_factory.mktemp("local") / "cut"
    cut_checkpoint(bases["big"], target, BIG_DROP, progress=False)
    return content(target)


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights(log: list[Request]) -> list[Request]:
    return [one for one in log if one.path.endswith(".safetensors") and one.method == "GET"]


def served(hub: HubServer) -> int:
    return sum(one.sent for one in weights(hub.log))


def leftovers(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if path.name.startswith(f".{target.name}"))


@pytest.mark.parametrize("name", [*TYPES, "single"])
def test_the_same_files_as_a_local_cut(
    hub: HubServer, client: Client, bases: dict[str, Path], tmp_path: Path, name: str
) -> None:
    drop = TYPES.get(name, [3])
    assert "error" not in client.cut(f"org/{name}", tmp_path / "far", drop)
    cut_checkpoint(bases[name], tmp_path / "near", drop, progress=False)
    far = content(tmp_path / "far")
    assert far == content(tmp_path / "near")
    assert leftovers(tmp_path / "far") == []
    assert not any(one.path.endswith((".bin", "README.md")) for one in hub.log)
    if name != "single":
        assert {"tokenizer.json", "additional_chat_templates/tool.jinja"} <= far.keys()
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "far", dtype=torch.float32, **EAGER)
        with torch.no_grad():
            assert torch.isfinite(model(tiny_input(), use_cache=False).logits).all()


def test_only_what_stays_is_fetched(
    hub: HubServer, client: Client, bases: dict[str, Path], big_cut: dict[str, bytes], tmp_path: Path
) -> None:
    done = client.cut("org/big", tmp_path / "cut", BIG_DROP)
    assert content(tmp_path / "cut") == big_cut
    assert done["source_bytes"] == sum(path.stat().st_size for path in bases["big"].glob("*.safetensors"))
    assert 0.7 * done["source_bytes"] < done["kept"] < 0.9 * done["source_bytes"]
    assert served(hub) <= 1.01 * done["kept"]

    index = json.loads((bases["big"] / "model.safetensors.index.json").read_text())["weight_map"]
    stays = {file for name, file in index.items() if not any(f".layers.{i}." in name for i in BIG_DROP)}
    assert stays < set(index.values())
    asked = {one.path.rpartition("/")[2] for one in hub.log}
    assert asked & set(index.values()) == stays

    # The token is for the Hub alone, the commit is asked for once, and all else is asked for at it.
    commit = hub.repos["org/big"].branches["main"]
    assert all(f"/resolve/{commit}/" in one.path for one in hub.log if "/resolve/" in one.path)
    assert all(one.status == 206 for one in weights(hub.log))

    # With the files in the cache, nothing is fetched; of those that are not, only what stays.
    hub.reset()
    name = index["model.layers.0.mlp.up_proj.weight"]
    client.ask(source="org/big", cache_dir=str(tmp_path / "cache"), fetch=name)
    hub.reset()
    client.cut("org/big", tmp_path / "again", BIG_DROP)
    assert content(tmp_path / "again") == big_cut
    assert not any(one.path.endswith(name) for one in hub.log)
    assert served(hub) > 0
    for file in stays:
        client.ask(source="org/big", cache_dir=str(tmp_path / "cache"), fetch=file)
    hub.reset()
    client.cut("org/big", tmp_path / "cached", BIG_DROP)
    assert content(tmp_path / "cached") == big_cut
    assert not weights(hub.log)
    assert not any(one.authorized for one in hub.log)


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
        assert "is not on the Hub, or it is private" in error(repo)
        assert "hf auth login" in error(repo)
    assert "is gated; ask for access" in error("org/gated")
    assert "hf auth login" in error("org/gated", token="hf_bad")
    assert "has no revision 'v9'" in error("org/single", revision="v9")
    assert "only pickled weights (pytorch_model.bin)" in error("org/pickled")
    assert "is no plain .safetensors file beside it" in error("org/hostile")
    assert "which is not there" in error("org/missing")
    assert not weights(hub.log)
    for repo in ("org/private", "org/gated"):
        hub.reset()
        assert "error" not in client.cut(repo, tmp_path / repo, [3], tmp_path / "cache", token=TOKEN)
        assert (tmp_path / repo / "model.safetensors").exists()
        assert {one.authorized for one in hub.log if one.path.startswith("/cdn/")} == {False}
        assert {one.authorized for one in hub.log if not one.path.startswith("/cdn/")} == {True}


def test_a_hub_that_sends_files_itself_gets_the_token(
    hub: HubServer, client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "redirect_lfs", False)
    assert "error" not in client.cut("org/private", tmp_path / "cut", [3], token=TOKEN)
    assert weights(hub.log)
    assert all(one.authorized for one in hub.log)


def test_breaks_are_mended_at_the_byte(
    hub: HubServer, client: Client, big_cut: dict[str, bytes], tmp_path: Path
) -> None:
    client.cut("org/big", tmp_path / "clean", BIG_DROP)
    clean, requests = served(hub), len(weights(hub.log))

    hub.reset()
    hub.fail_after(100_001, ".safetensors", times=11, prefix="/cdn/")
    client.cut("org/big", tmp_path / "broken", BIG_DROP)
    assert content(tmp_path / "broken") == big_cut
    assert served(hub) == clean
    assert len(weights(hub.log)) > requests

    hub.reset()
    hub.status(".safetensors", 500, 3, method="GET", prefix="/cdn/")
    hub.status(".safetensors", 503, 2, method="HEAD")
    hub.status("/org/big", 502, 1, prefix="/api/")
    hub.status(".safetensors", 429, 1, method="GET", prefix="/cdn/")
    hub.status(".safetensors", 403, 1, method="GET", prefix="/cdn/")  # a signed address that has run out
    client.cut("org/big", tmp_path / "errors", BIG_DROP)
    assert content(tmp_path / "errors") == big_cut
    assert {one.status for one in weights(hub.log)} == {206, 500, 429, 403}
    assert sum(one.sent for one in weights(hub.log) if one.status == 206) == clean

    hub.reset()
    hub.status(".safetensors", 429, 1, method="GET", prefix="/cdn/")
    hub.lie(".safetensors", "Retry-After", "4000", prefix="/cdn/")
    assert "not to try for 4000 s" in client.cut("org/big", tmp_path / "later", BIG_DROP)["error"]


def data_requests(hub: HubServer) -> list[Request]:
    """The requests for tensors of `org/big`: all but the first for each file, and one up to its header's end."""
    seen: set[str] = set()
    found = []
    for one in weights(hub.log):
        if one.path.startswith("/cdn/"):
            with (hub.repos["org/big"].folder / one.path.rpartition("/")[2]).open("rb") as file:
                header_end = 7 + int.from_bytes(file.read(8), "little")
            if one.path in seen and not one.range.endswith(f"-{header_end}"):
                found.append(one)
            seen.add(one.path)
    return found


def data_served(hub: HubServer) -> int:
    return sum(one.sent for one in data_requests(hub) if one.status < 400)


def test_a_failed_run_is_taken_up(hub: HubServer, client: Client, big_cut: dict[str, bytes], tmp_path: Path) -> None:
    target = tmp_path / "cut"
    client.cut("org/big", tmp_path / "clean", BIG_DROP)
    clean, victim = data_served(hub), max(one.path.rpartition("/")[2] for one in weights(hub.log))

    hub.reset()
    hub.fail_after(0, victim, times=10**6, prefix="/cdn/", least=50_000)  # but let its header through
    failed = client.cut("org/big", target, BIG_DROP)
    first = data_served(hub)
    assert failed["kind"] == "BrokenDownloadError"
    assert victim in failed["error"]
    assert "run the same command again, and it goes on where it stopped" in failed["error"]
    assert not target.exists()
    assert len(leftovers(target)) == 1

    hub.reset()
    assert "error" not in client.cut("org/big", target, BIG_DROP)
    assert content(target) == big_cut
    assert leftovers(target) == []
    slack = 8 * (1 << 18)  # what was on its way to other workers when the run gave up
    assert clean <= first + data_served(hub) <= clean + slack
    assert {one.path.rpartition("/")[2] for one in data_requests(hub)} == {victim}


KILLED = """
import os, signal, sys
from hf_layerprune.cut.disk import cut_checkpoint, download
download.CHUNK = 1 << 16
left, record = int(sys.argv[3]), download.Download._record
def killing(*args):
    global left
    record(*args)
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
download.Download._record = killing
cut_checkpoint("org/big", sys.argv[1], range(21, 29), cache_dir=sys.argv[2], progress=False)
"""


def test_a_killed_run_is_taken_up(hub: HubServer, client: Client, big_cut: dict[str, bytes], tmp_path: Path) -> None:
    target, cache = tmp_path / "cut", str(tmp_path / "cache")

    def kill_after(records: int) -> Path:
        command = [sys.executable, "-c", KILLED, str(target), cache, str(records)]
        done = subprocess.run(command, env=client_env(hub, tmp_path / "home"), check=False)
        assert done.returncode == -signal.SIGKILL
        assert not target.exists()
        (left,) = tmp_path.glob(".cut.download-*")
        return left

    client.cut("org/big", tmp_path / "clean", BIG_DROP, cache)
    clean = data_served(hub)
    left = kill_after(150)
    _, *lines = (left / "journal").read_text().splitlines()
    ranges = [tuple(map(int, line.split()[1:])) for line in lines]
    done = sum(end - start for start, end in ranges if end >= 1 << 16)  # the others are headers
    assert 0.2 * clean < done < 0.9 * clean
    with (left / "journal").open("a") as journal:
        journal.write("0 5 99")  # a line that was torn by the end
    time.sleep(0.5)  # what the killed process still had asked for is answered to nobody, and counted
    hub.reset()
    client.cut("org/big", target, BIG_DROP)
    assert content(target) == big_cut
    assert data_served(hub) == clean - done
    assert leftovers(target) == []

    # Another cut does not build upon what this one left, but clears it away.
    shutil.rmtree(target)
    kill_after(100)
    client.cut("org/big", target, [0])
    assert leftovers(target) == []
    assert json.loads((target / "config.json").read_text())["num_hidden_layers"] == 31


@pytest.mark.parametrize("late", [False, True], ids=["header", "tensors"])
@pytest.mark.parametrize(
    ("header", "value", "says"),
    [
        ("Content-Range", "bytes 0-4095/99", "with 'bytes 0-4095/99'"),
        ("Content-Range", "bytes 1-2", "with 'bytes 1-2'"),
        ("Range", "", "a request for a part with the whole file"),
        ("Range", "bytes=100-199", "with 'bytes 100-199/"),
        ("ETag", '"another"', "has changed the file meanwhile"),
        ("Content-Length", "7", "sends 7 bytes in place of"),
        ("Content-Encoding", "gzip", "in another encoding"),
        ("X-Repo-Commit", "0" * 40, "answered for commit 0000"),
    ],
)
def test_a_lying_server(
    hub: HubServer, client: Client, tmp_path: Path, header: str, value: str, says: str, late: bool
) -> None:
    if late or header == "ETag":  # the first answer's ETag is what the others are held against
        hub.lie(".safetensors", header, value, prefix="/cdn/", after=1)
    else:
        hub.lie(".safetensors", header, value, prefix="/cdn/")
    answer = client.cut("org/single", tmp_path / "cut", [3])
    assert says in answer["error"]
    assert "\n" not in answer["error"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


def test_a_file_that_is_shorter_than_listed(hub: HubServer, client: Client, tmp_path: Path) -> None:
    hub.truncate("model.safetensors", 50_000)
    assert "with 'bytes 0-4095/50000'" in client.cut("org/single", tmp_path / "cut", [3])["error"]
    hub.truncate("model.safetensors", 100)
    assert "/100'" in client.cut("org/single", tmp_path / "cut", [3])["error"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache"]


def run(hub: HubServer, home: Path, *words: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "import sys; from hf_layerprune.cli import main; sys.exit(main())", *words]
    return subprocess.run(command, env=client_env(hub, home) | env, capture_output=True, text=True, check=False)


def test_the_command(hub: HubServer, bases: dict[str, Path], tmp_path: Path) -> None:
    out, home = tmp_path / "out", tmp_path / "home"
    done = run(hub, home, "prune", "org/llama", str(out), "--drop", "2")
    assert (done.returncode, done.stdout) == (0, f"dropped layers 6-7 of 8: 6 left, in {out}\n"), done.stderr
    assert "holds only dropped layers" in done.stderr or "hold only dropped layers" in done.stderr
    assert "fetching" in done.stderr
    cut_checkpoint(bases["llama"], tmp_path / "near", [6, 7], progress=False)
    lineage = content(out)
    written = json.loads(lineage.pop("lineage.json"))
    assert lineage == content(tmp_path / "near")
    base = written["base"]
    assert base["id"] == "org/llama"
    assert base["commit"] == hub.repos["org/llama"].branches["main"]
    assert base["files"] == fingerprint(bases["llama"])

    # Without a way to the Hub, what the cache lacks is missed, and said so.
    again = run(hub, home, "prune", "org/llama", str(tmp_path / "again"), "--drop", "2", HF_HUB_OFFLINE="1")
    assert again.returncode == 1
    assert "is not in the cache, and the Hub can't be asked (HF_HUB_OFFLINE is set)" in again.stderr
    assert "Traceback" not in again.stderr
    blobs = home / "hub" / "models--org--llama" / "snapshots" / base["commit"]
    for path in bases["llama"].glob("*.safetensors"):
        shutil.copy(path, blobs)
    hub.reset()
    again = run(hub, home, "prune", "org/llama", str(tmp_path / "again"), "--drop", "2", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert not hub.log
    assert content(tmp_path / "again").keys() == content(out).keys()

    closed = run(hub, home, "prune", "org/gated", str(tmp_path / "closed"))
    assert closed.returncode == 1
    assert "org/gated is gated; ask for access" in closed.stderr
    assert "Traceback" not in closed.stderr
    assert not (tmp_path / "closed").exists()


def test_ranges() -> None:
    assert _joined([(5, 9), (0, 2), (2, 4), (6, 7)]) == [(0, 4), (5, 9)]
    assert _missing([(0, 4), (5, 9)], 2, 12) == [(4, 5), (9, 12)]
    assert _missing([(0, 4), (5, 9)], 6, 8) == []
    assert _missing([], 1, 3) == [(1, 3)]
