"""The stand-in Hub against the unmodified client, in fresh processes over real HTTP."""

import hashlib
import http.client
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from urllib.parse import urlsplit

import pytest

from hf_layerprune.versions import transport_error
from tests.hub_server import HubServer, Request, client_env

MIB = 1024 * 1024
TOKENS = {"hf_good": None, "hf_other": ["org/plain"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with small files and two of LFS kind, one beyond the client's 10 MiB download chunk."""
    folder = tmp_path_factory.mktemp("plain")
    (folder / "sub" / "deep").mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}\n')
    (folder / "README.md").write_text("# Ünïcode\n")
    (folder / "sub" / "deep" / "a b#c.txt").write_text("odd name\n")
    noise = random.Random(0)
    (folder / "sub" / "small.safetensors").write_bytes(noise.randbytes(300_000))
    (folder / "big.bin").write_bytes(noise.randbytes(12 * MIB))
    return folder


@pytest.fixture
def hub(folder: Path) -> Iterator[HubServer]:
    repos = {"org/plain": folder, "org/secret": folder, "org/gated": folder, "alone": folder}
    with HubServer(repos, private={"org/secret"}, gated={"org/gated"}, tokens=TOKENS) as server:
        yield server


def client(server: HubServer, home: Path, script: str, token: str | None = None) -> dict:
    """Run a script that leaves its findings in `out`, as a user's process would run it."""
    script = f"import json\nout = {{}}\n{dedent(script)}\nprint(json.dumps(out))"
    env = client_env(server, home, token)
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def asked(server: HubServer, suffix: str, method: str = "GET") -> list[Request]:
    return [one for one in server.log if one.method == method and one.path.endswith(suffix)]


def raw(endpoint: str, method: str, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
    """One request as it is written, which a tidy client would clean up first."""
    connection = http.client.HTTPConnection(urlsplit(endpoint).netloc, timeout=10)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    answer = response.status, dict(response.getheaders()), response.read()
    connection.close()
    return answer


def test_reading(hub: HubServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # nothing of the developer's own settings may reach the client
    out = client(
        hub,
        tmp_path,
        """
        from dataclasses import asdict
        from huggingface_hub import (
            HfApi, get_hf_file_metadata, hf_hub_download, hf_hub_url, resolve_revision, snapshot_download)

        api = HfApi()
        out["small"] = hf_hub_download("org/plain", "config.json")
        out["large"] = hf_hub_download("org/plain", "sub/small.safetensors")
        out["snapshot"] = snapshot_download("org/plain")
        out["alone"] = snapshot_download("alone", allow_patterns="*.json")
        out["sha"] = api.model_info("org/plain").sha
        info = api.model_info("org/plain", files_metadata=True)
        out["siblings"] = [asdict(one) for one in info.siblings]
        out["expand"] = api.model_info("org/plain", expand=["sha"]).siblings
        out["files"] = api.list_repo_files("org/plain")
        tree = lambda *path, **kwargs: [one.path for one in api.list_repo_tree("org/plain", *path, **kwargs)]
        out["top"], out["sub"], out["all"] = tree(), tree("sub"), tree("sub", recursive=True, expand=True)
        out["exists"] = [api.file_exists("org/plain", name) for name in ("README.md", "nope", "sub/deep/a b#c.txt")]
        out["exists"] += [api.repo_exists("org/plain"), api.repo_exists("org/nope"), api.repo_exists("org/gated")]
        out["exists"] += [api.revision_exists("org/plain", one) for one in ("main", out["sha"], "a/b")]
        seen = [get_hf_file_metadata(hf_hub_url("org/plain", name)) for name in ("config.json", "big.bin")]
        out["seen"] = [(one.etag, one.size, one.commit_hash, one.location) for one in seen]
        out["resolved"] = resolve_revision("org/plain").resolved
        """,
        token="hf_good",
    )
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    for name in names:
        assert Path(out["snapshot"], name).read_bytes() == (folder / name).read_bytes()
    assert Path(out["small"]).read_bytes() == (folder / "config.json").read_bytes()
    assert Path(out["large"]).read_bytes() == (folder / "sub/small.safetensors").read_bytes()
    assert [path.name for path in Path(out["alone"]).iterdir()] == ["config.json"]

    assert len(out["sha"]) == 40
    assert Path(out["snapshot"]).name == out["resolved"] == out["sha"]
    assert [one["rfilename"] for one in out["siblings"]] == out["files"] == names
    assert out["expand"] is None
    assert out["top"] == ["README.md", "big.bin", "config.json", "sub"]
    assert out["sub"] == ["sub/deep", "sub/small.safetensors"]
    assert out["all"] == ["sub/deep", "sub/deep/a b#c.txt", "sub/small.safetensors"]
    assert out["exists"] == [True, False, True, True, False, True, True, True, False]

    # The digests are git's own: this one is what `git hash-object` prints.
    git = "9eddb62b076f586b2186445e7872e5a05f0dfe06"
    sha256 = hashlib.sha256((folder / "big.bin").read_bytes()).hexdigest()
    (small, large), siblings = out["seen"], {one["rfilename"]: one for one in out["siblings"]}
    assert small[:3] == [git, (folder / "config.json").stat().st_size, out["sha"]]
    assert large[:3] == [sha256, 12 * MIB, out["sha"]]
    assert large[3].startswith(hub.cdn_endpoint + "/cdn/")
    assert siblings["config.json"] | {"blob_id": small[0], "lfs": None} == siblings["config.json"]
    assert siblings["big.bin"]["lfs"] == {"size": 12 * MIB, "sha256": sha256, "pointer_size": 133}

    # Every byte once, although each file was wanted twice; and the token went to the Hub alone.
    assert hub.bytes_served("small.safetensors") == 300_000
    assert hub.bytes_served("big.bin") == 12 * MIB
    assert hub.bytes_served("plain/resolve/main/config.json") == small[1]
    assert {one.authorized for one in hub.log if one.path.startswith("/cdn/")} == {False}
    assert {one.authorized for one in hub.log if not one.path.startswith("/cdn/")} == {True}
    assert [(one.status, one.sent) for one in asked(hub, "small.safetensors", "HEAD")] == [(302, 0)]


def test_refusals(hub: HubServer, tmp_path: Path) -> None:
    out = client(
        hub,
        tmp_path,
        """
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download

        def kinds(call, *args, **kwargs):
            try:
                call(*args, **kwargs)
            except Exception as error:
                return [*(kind.__name__ for kind in type(error).__mro__), error.response.status_code]
            return []

        get, info = hf_hub_download, HfApi().model_info
        out["entry"] = kinds(get, "org/plain", "nope.json")
        out["dots"] = kinds(get, "org/plain", "sub/nope/nope.json")
        out["folder"] = kinds(lambda: list(HfApi().list_repo_tree("org/plain", "nope")))
        out["revision"] = [kinds(one, revision="nope") for one in (lambda **kw: info("org/plain", **kw),
            lambda **kw: get("org/plain", "config.json", **kw), lambda **kw: snapshot_download("org/plain", **kw))]
        out["missing"] = [kinds(get, "org/nope", "config.json", token=one) for one in (None, "hf_good")]
        out["private"] = [kinds(get, "org/secret", "config.json", token=one) for one in (None, "hf_bad", "hf_other")]
        out["private"] += [kinds(info, "org/secret"), kinds(snapshot_download, "org/secret")]
        out["gated"] = [kinds(get, "org/gated", "config.json", token=one) for one in (None, "hf_bad", "hf_other")]
        out["open"] = [kinds(info, "org/gated"), kinds(lambda: HfApi().list_repo_files("org/gated"))]
        for repo in ("org/secret", "org/gated"):
            out["open"] += [kinds(call, repo, "big.bin", token="hf_good") for call in (get, HfApi().file_exists)]
            out["open"] += [kinds(info, repo, token="hf_good")]
        """,
    )
    for case in (out["entry"], out["dots"], out["folder"]):
        assert "EntryNotFoundError" in case
        assert case[-1] == 404
    for case in out["revision"]:
        assert "RevisionNotFoundError" in case
        assert case[-1] == 404
    refused = [*out["missing"], *out["private"]]
    assert ["RepositoryNotFoundError" in case for case in refused] == [True] * len(refused)
    assert [case[-1] for case in refused] == [401, 404, 401, 401, 404, 401, 401]
    for case in out["gated"]:
        assert "GatedRepoError" in case
        assert case[-1] == 403
    assert out["open"] == [[]] * len(out["open"])
    # A missing file of a known commit is remembered, so the client must have been told the commit.
    assert list(tmp_path.glob("hub/models--org--plain/.no_exist/*/nope.json"))


def test_ranges(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    wanted = ["bytes=10-19", "bytes=299990-", "bytes=-7", "bytes=5-999999999", "bytes=300000-", "bytes=-0"]
    ignored = ["bytes=1-2,5-6", "bytes=9-3", "bytes=-", "lines=1-2"]
    out = client(
        hub,
        tmp_path,
        f"""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session

        session, url = get_session(), hf_hub_url("org/plain", "sub/small.safetensors")
        out["library"] = type(session).__module__.partition(".")[0]
        out["got"] = []
        for span in {wanted + ignored}:
            answer = session.get(url, headers=build_hf_headers(token="hf_good") | {{"Range": span}})
            body = answer.content if answer.status_code < 400 else b""
            out["got"].append((answer.status_code, answer.headers.get("Content-Range"), body.hex()))
        """,
    )
    data = (folder / "sub/small.safetensors").read_bytes()
    got = [(status, span, bytes.fromhex(body)) for status, span, body in out["got"]]
    assert out["library"] == transport_error().__module__.partition(".")[0]
    assert got[:6] == [
        (206, "bytes 10-19/300000", data[10:20]),
        (206, "bytes 299990-299999/300000", data[299990:]),
        (206, "bytes 299993-299999/300000", data[-7:]),
        (206, "bytes 5-299999/300000", data[5:]),
        (416, "bytes */300000", b""),
        (416, "bytes */300000", b""),
    ]
    assert got[6:] == [(200, None, data)] * 4
    served = [one for one in asked(hub, "small.safetensors") if one.path.startswith("/cdn/")]
    assert [one.range for one in served] == wanted + ignored
    assert [one.sent for one in served if one.status < 400] == [10, 10, 7, 299995] + [300_000] * 4
    assert not any(one.authorized for one in served)
    assert all(one.status == 302 and one.sent == 0 and one.authorized for one in asked(hub, "small.safetensors")[::2])


def test_faults(hub: HubServer, folder: Path, tmp_path: Path) -> None:
    hub.fail_after(11 * MIB, "big.bin")
    hub.fail_after(4, "README.md", times=2)
    hub.status("config.json", 500, 2, method="HEAD")
    hub.status("config.json", 429, method="GET")
    hub.truncate("small.safetensors", 1000)
    out = client(
        hub,
        tmp_path,
        """
        from huggingface_hub import HfApi, hf_hub_download

        out["paths"] = {name: hf_hub_download("org/plain", name) for name in ("big.bin", "README.md", "config.json")}
        try:
            hf_hub_download("org/plain", "sub/small.safetensors")
        except OSError as error:
            out["short"] = str(error)
        """,
    )
    for name, path in out["paths"].items():
        assert Path(path).read_bytes() == (folder / name).read_bytes()
    # The client keeps whole chunks of 10 MiB, so that is where it takes up again, and a small file starts afresh.
    big, readme = asked(hub, "big.bin"), (folder / "README.md").stat().st_size
    assert [(one.range, one.status, one.sent) for one in big] == [
        (None, 200, 11 * MIB),
        (f"bytes={10 * MIB}-", 206, 2 * MIB),
    ]
    assert [one.sent for one in asked(hub, "README.md")] == [4, 4, readme]
    assert [one.status for one in asked(hub, "config.json", "HEAD")] == [500, 500, 200]
    assert [one.status for one in asked(hub, "config.json")] == [429, 200]
    assert "should be of size 300000 but has size 1000" in out["short"]
    assert hub.bytes_served("small.safetensors") == 1000

    hub.status("", 503, 9, prefix="/api/")
    assert raw(hub.endpoint, "GET", "/api/models/org/plain")[0] == 503
    hub.reset()
    assert (hub.log, hub.bytes_served()) == ([], 0)
    status, _, body = raw(hub.endpoint, "GET", "/api/models/org/plain")
    assert (status, hub.bytes_served()) == (200, len(body))


def test_wire(hub: HubServer, folder: Path) -> None:
    files = "/org/plain/resolve/main/"
    for path in ("../../x", "..%2f..%2fx", "%2e%2e/%2e%2e/etc/passwd", "sub/../config.json", "/etc/passwd", "%00"):
        assert raw(hub.endpoint, "GET", files + path)[0] == 404
    assert raw(hub.endpoint, "GET", "/api/nothing")[0] == 404

    for path in (files + "config.json", files + "big.bin", files + "nope", "/api/models/alone", "/api/models/no/no"):
        (status, head, nothing), (same, headers, _) = (raw(hub.endpoint, way, path) for way in ("HEAD", "GET"))
        assert (status, nothing) == (same, b"")
        assert head | {"Date": ""} == headers | {"Date": ""}

    _, headers, _ = raw(hub.endpoint, "HEAD", files + "sub/small.safetensors")
    signed = headers["Location"].removeprefix(hub.cdn_endpoint)
    assert (headers["X-Linked-Size"], headers["X-Linked-Etag"][0]) == ("300000", '"')
    assert raw(hub.cdn_endpoint, "HEAD", signed)[0] == 200
    assert raw(hub.cdn_endpoint, "GET", signed, Authorization="Bearer hf_good")[0] == 400
    for unsigned in (signed[:-1], signed.partition("?")[0], signed.replace("org/plain", "org/secret")):
        assert raw(hub.cdn_endpoint, "GET", unsigned)[0] == 403

    with HubServer({"org/plain": folder}, redirect_lfs=False) as straight:
        status, headers, body = raw(straight.endpoint, "GET", files + "sub/small.safetensors", Range="bytes=0-9")
        assert (status, len(body), headers["X-Linked-Size"]) == (206, 10, "300000")
        assert headers["ETag"] == headers["X-Linked-Etag"]


def test_commit_follows_the_contents(tmp_path: Path) -> None:
    def sha() -> str:
        return json.loads(raw(server.endpoint, "GET", "/api/models/a/b")[2])["sha"]

    (tmp_path / "x.txt").write_text("1")
    with HubServer({"a/b": tmp_path}) as server:
        before = sha()
        assert sha() == before
        (tmp_path / "x.txt").write_text("22")
        after = sha()
        assert after != before
        assert raw(server.endpoint, "GET", f"/a/b/resolve/{before}/x.txt")[1]["X-Error-Code"] == "RevisionNotFound"
        assert raw(server.endpoint, "GET", f"/a/b/resolve/{after}/x.txt")[2] == b"22"
    (tmp_path / "x.txt").write_text("1")
    with HubServer({"c/d": tmp_path}) as server:
        assert json.loads(raw(server.endpoint, "GET", "/api/models/c/d")[2])["sha"] == before


def test_clients_that_leave(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with HubServer({"org/plain": folder}, redirect_lfs=False) as server:
        address = ("127.0.0.1", urlsplit(server.endpoint).port)
        for _ in range(3):
            with socket.create_connection(address) as hasty:
                hasty.sendall(b"GET /org/plain/resolve/main/big.bin HTTP/1.1\r\nHost: x\r\n\r\n")
                hasty.recv(10)
        kept = http.client.HTTPConnection(*address, timeout=10)
        kept.request("GET", "/org/plain/resolve/main/config.json")
        assert kept.getresponse().read() == (folder / "config.json").read_bytes()
        time.sleep(0.3)
        assert all(one.sent < 12 * MIB for one in asked(server, "big.bin"))
        leaving = time.monotonic()
    assert time.monotonic() - leaving < 1
    assert kept.sock.recv(1) == b""
    kept.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)
    assert capfd.readouterr().err == ""


def test_transformers_loads_by_id(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    local = tmp_path / "local"
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(local, max_shard_size="8KB")
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(64)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(local)
    shards = sorted(local.glob("*.safetensors"))
    assert len(shards) > 1

    with HubServer({"org/tiny": local}) as server:
        out = client(
            server,
            tmp_path / "home",
            f"""
            import torch
            from huggingface_hub import HfApi
            from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

            torch.set_num_threads(1)
            out["layers"] = AutoConfig.from_pretrained("org/tiny").num_hidden_layers
            out["words"] = AutoTokenizer.from_pretrained("org/tiny").get_vocab()
            ids = torch.arange(12)[None]
            with torch.no_grad():
                far = AutoModelForCausalLM.from_pretrained("org/tiny")(ids).logits
                near = AutoModelForCausalLM.from_pretrained({str(local)!r})(ids).logits
            out["equal"] = torch.equal(far, near)
            out["finite"] = bool(torch.isfinite(far).all()) and far.std().item() > 0
            out["tensors"] = len(HfApi().get_safetensors_metadata("org/tiny").weight_map)
            """,
        )
        assert out["layers"] == 2
        assert len(out["words"]) == 64
        assert out["equal"]
        assert out["finite"]
        assert out["tensors"] == 21
        for shard in shards:
            whole = [one for one in asked(server, shard.name) if one.status == 200]
            assert [one.sent for one in whole] == [shard.stat().st_size]
        # Whatever it looks for in vain, the client is told so in the Hub's own words: no route is missing.
        missed = [one.path for one in server.log if one.status == 404]
        assert all("/resolve/" in path or path.endswith("/additional_chat_templates") for path in missed)
