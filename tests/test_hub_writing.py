"""Writing to the stand-in Hub: with the unmodified client, and over bare HTTP where a client would not go."""

import base64
import hashlib
import http.client
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.hub_server import HubServer
from tests.test_hub_server import asked, client

MIB = 1024 * 1024
PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    served = tmp_path / "served"
    served.mkdir()
    (served / "config.json").write_text("{}")
    writers = {"hf_write": None, "hf_team": ["team"]}
    with HubServer({"org/served": served}, tokens={"hf_read": None}, writers=writers) as server:
        yield server


def call(endpoint: str, method: str, path: str, body: bytes | dict = b"", token: str | None = "hf_write") -> tuple:
    """One request: its status, and its body's JSON if it is that."""
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection = http.client.HTTPConnection(urlsplit(endpoint).netloc, timeout=10)
    connection.request(method, path, body, {"Authorization": f"Bearer {token}"} if token else {})
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, json.loads(text) if text.startswith((b"{", b"[")) else text


def contents(hub: HubServer, repo: str, revision: str = "main") -> dict[str, bytes]:
    return {name: file.path.read_bytes() for name, file in hub.repos[repo].at(revision).files.items()}


def test_round_trip(hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "assets").mkdir(parents=True)
    noise = random.Random(0)
    files = {
        "README.md": b"---\nlicense: mit\n---\n# \xc3\x9cn\xc3\xafcode\n",
        "config.json": b'{"model_type": "llama"}\n',
        "empty.txt": b"",
        "assets/plot.png": PNG + noise.randbytes(1000),
        "model.safetensors": noise.randbytes(300_000),
        "long.txt": b"words and words\n" * (12 * MIB // 16),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    hub.status("", 500, prefix="/upload/")  # storage stumbles once, and the client tries again
    out = client(
        hub,
        tmp_path / "home",
        f"""
        from pathlib import Path
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
        from huggingface_hub.errors import HfHubHTTPError

        api, folder = HfApi(), Path({str(folder)!r})
        out["who"] = api.whoami()
        made = api.create_repo("org/mine")
        out["made"] = [str(made), made.repo_id, api.create_repo("org/mine", exist_ok=True).repo_id]
        try:
            api.create_repo("org/mine")
        except HfHubHTTPError as error:
            out["twice"] = error.response.status_code
        out["short"] = api.create_repo("short").repo_id

        first = api.upload_folder(repo_id="org/mine", folder_path=folder, commit_message="first")
        out["first"] = [first.oid, str(first), first.repo_url.repo_id]
        out["again"] = api.upload_folder(repo_id="org/mine", folder_path=folder).oid
        (folder / "config.json").write_text("changed")
        (folder / "assets/plot.png").unlink()
        out["second"] = api.upload_folder(repo_id="org/mine", folder_path=folder, delete_patterns="*.png").oid
        out["third"] = api.upload_file(repo_id="org/mine", path_or_fileobj=b"x", path_in_repo="sub/x.bin").oid
        out["fourth"] = api.create_commit("org/mine", commit_message="fourth", commit_description="why", operations=[
            CommitOperationAdd("y.txt", b"y"), CommitOperationDelete("sub/"), CommitOperationDelete("empty.txt"),
        ], parent_commit=out["third"]).oid
        try:
            api.create_commit("org/mine", commit_message="late", parent_commit=out["third"],
                operations=[CommitOperationAdd("z.txt", b"z")])
        except HfHubHTTPError as error:
            out["late"] = error.response.status_code

        out["sha"] = api.model_info("org/mine").sha
        out["files"] = api.list_repo_files("org/mine")
        for key, revision in (("old", first.oid), ("new", "main")):
            out[key] = snapshot_download("org/mine", revision=revision)
        out["config"] = [Path(hf_hub_download("org/mine", "config.json", revision=one)).read_text()
            for one in (first.oid, out["second"])]
        out["commits"] = [(one.commit_id, one.title, one.message) for one in api.list_repo_commits("org/mine")]

        api.create_branch("org/mine", branch="a/b", revision=first.oid)
        api.create_branch("org/mine", branch="a/b", exist_ok=True)
        out["branch"] = api.upload_file(
            repo_id="org/mine", path_or_fileobj=b"b", path_in_repo="b.txt", revision="a/b").oid
        api.create_tag("org/mine", tag="v1", revision=out["second"])
        refs = api.list_repo_refs("org/mine")
        out["refs"] = {{one.ref: one.target_commit for one in refs.branches + refs.tags}}
        out["tagged"] = Path(hf_hub_download("org/mine", "config.json", revision="v1")).parent.name
        api.delete_branch("org/mine", branch="a/b")
        api.delete_tag("org/mine", tag="v1")
        out["left"] = [api.revision_exists("org/mine", one) for one in ("main", "a/b", "v1", out["branch"])]
        """,
        token="hf_write",
    )
    url = f"{hub.endpoint}/org/mine"
    assert (out["who"]["name"], out["who"]["auth"]["accessToken"]["role"]) == ("somebody", "write")
    assert out["made"] == [url, "org/mine", "org/mine"]
    assert (out["twice"], out["short"]) == (409, "somebody/short")
    assert out["first"][1:] == [f"{url}/commit/{out['first'][0]}", "org/mine"]

    shas = [out["first"][0], out["second"], out["third"], out["fourth"]]
    assert len(set(shas)) == 4
    assert out["again"] == shas[0]  # nothing changed, so nothing was committed
    assert (out["sha"], out["late"]) == (shas[-1], 412)
    titles = ["fourth", "Upload sub/x.bin with huggingface_hub", "Upload folder using huggingface_hub", "first"]
    assert [one[:2] for one in out["commits"][:4]] == [list(one) for one in zip(shas[::-1], titles, strict=True)]
    assert out["commits"][0][2] == "why"
    assert out["commits"][4][1] == "initial commit"

    old, new = ({path.relative_to(out[key]).as_posix(): path.read_bytes()
                 for path in Path(out[key]).rglob("*") if path.is_file()} for key in ("old", "new"))  # fmt: skip
    assert Path(out["old"]).name == shas[0]
    assert old.pop(".gitattributes") == new.pop(".gitattributes")
    assert old == files
    gone = {"empty.txt", "assets/plot.png"}
    assert new == {name: files[name] for name in files if name not in gone} | {
        "config.json": b"changed",
        "y.txt": b"y",
    }
    assert sorted(out["files"]) == sorted([*new, ".gitattributes"])
    assert out["config"] == [files["config.json"].decode(), "changed"]

    assert out["refs"] == {"refs/heads/main": shas[3], "refs/heads/a/b": out["branch"], "refs/tags/v1": shas[1]}
    assert out["tagged"] == shas[1]
    assert out["left"] == [True, False, False, True]

    # What is large or no text went to storage: once, whole, without the token, and verified.
    kept = hub.repos["org/mine"].at(shas[0]).files
    large = ["assets/plot.png", "long.txt", "model.safetensors"]
    assert [name for name, file in kept.items() if file.sha256] == large
    puts = [one for one in hub.log if one.method == "PUT"]
    assert [one.status for one in puts].count(500) == 1
    stored = sorted(one.path.split("/")[-2] for one in puts if one.status == 200)
    assert stored == sorted(hashlib.sha256(one).hexdigest() for one in [*map(files.get, large), b"x"])
    assert not any(one.authorized for one in puts)
    assert len(asked(hub, "/verify", "POST")) == 4
    assert all(one.status < 400 or one.status in (404, 409, 412, 500) for one in hub.log)


def test_kinds_and_rights(hub: HubServer, tmp_path: Path) -> None:
    out = client(
        hub,
        tmp_path / "home",
        """
        import warnings
        from pathlib import Path
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download

        def kinds(call, *args, **kwargs):
            try:
                call(*args, **kwargs)
            except Exception as error:
                return [type(error).__name__, getattr(getattr(error, "response", None), "status_code", None)]
            return []

        api = HfApi()
        put = dict(path_or_fileobj=b"x", path_in_repo="x.txt")
        card = b"---\\nsdk: gradio\\ncolorFrom: red\\n---\\n"
        for kind, more in (("dataset", {}), ("space", {"space_sdk": "gradio"})):
            out[kind] = [str(api.create_repo("org/both", repo_type=kind, token="hf_write", **more))]
            api.upload_file(repo_id="org/both", repo_type=kind, token="hf_write", path_or_fileobj=card,
                path_in_repo="README.md")
            api.upload_file(repo_id="org/both", repo_type=kind, token="hf_write", path_or_fileobj=b"\\0",
                path_in_repo="a.bin")
            out[kind] += [Path(hf_hub_download("org/both", name, repo_type=kind)).read_bytes().decode()
                for name in ("README.md", "a.bin")]
            out[kind].append(sorted(api.list_repo_files("org/both", repo_type=kind)))
        out["sdk"] = api.repo_info("org/both", repo_type="space").sdk
        out["model"] = kinds(api.repo_info, "org/both")
        out["card"] = [kinds(api.upload_file, repo_id="org/both", repo_type="space", token="hf_write",
            path_or_fileobj=text, path_in_repo="README.md") for text in (b"---\\nsdk: [\\n---\\n", b"---\\nsdk: x\\n---\\n")]
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            api.upload_file(repo_id="org/both", repo_type="dataset", token="hf_write", path_or_fileobj=b"# No card",
                path_in_repo="README.md")
        out["warned"] = [str(one.message) for one in caught]

        api.create_repo("team/secret", private=True, token="hf_team")
        api.upload_file(repo_id="team/secret", token="hf_team", **put)
        out["secret"] = [kinds(api.model_info, "team/secret", token=one) for one in (False, "hf_read", "hf_team")]
        tokens = (False, "hf_bad", "hf_read", "hf_team", "hf_write")
        for name, call in (
            ("create", lambda token: api.create_repo("org/new", token=token)),
            ("upload", lambda token: api.upload_file(repo_id="org/new", token=token, **put)),
            ("lost", lambda token: api.upload_file(repo_id="org/nope", token=token, **put)),
            ("served", lambda token: api.upload_file(repo_id="org/served", token=token, **put)),
            ("branch", lambda token: api.create_branch("org/new", branch="b", token=token)),
            ("delete", lambda token: api.delete_repo("org/new", token=token)),
        ):
            out[name] = [kinds(call, token) for token in tokens]
        out["after"] = [kinds(api.model_info, "org/new", token="hf_write"),
            kinds(api.delete_repo, "org/new", token="hf_write"),
            kinds(api.delete_repo, "org/new", token="hf_write", missing_ok=True)]
        # Who may not create a repository may still find that it exists.
        api.create_repo("org/new", token="hf_write")
        out["there"] = api.create_repo("org/new", exist_ok=True, token="hf_read").repo_id
        out["who"] = [kinds(api.whoami, token="hf_bad"), api.whoami(token="hf_team")["orgs"][0]["name"]]
        """,
    )
    card = "---\nsdk: gradio\ncolorFrom: red\n---\n"
    for kind in ("dataset", "space"):
        url = f"{hub.endpoint}/{kind}s/org/both"
        assert out[kind] == [url, card, "\0", [".gitattributes", "README.md", "a.bin"]]
    assert (out["sdk"], out["model"]) == ("gradio", ["RepositoryNotFoundError", 401])
    assert out["card"] == [["ValueError", None]] * 2
    assert ["empty or missing yaml metadata" in one for one in out["warned"]] == [True]

    missing, refused = "RepositoryNotFoundError", "HfHubHTTPError"
    assert out["secret"] == [[missing, 401], [], []]
    assert out["create"] == [[refused, 401], [refused, 401], [refused, 403], [refused, 403], []]
    for key in ("upload", "branch"):
        assert out[key] == [[missing, 401], [refused, 401], [refused, 403], [refused, 403], []]
    assert out["delete"] == [[refused, 401], [refused, 401], [refused, 403], [refused, 403], []]
    assert out["lost"] == [[missing, 401], [refused, 401], [missing, 404], [missing, 404], [missing, 404]]
    assert out["served"] == [[missing, 401], [refused, 401]] + [[refused, 403]] * 3
    assert out["after"] == [[missing, 404], [missing, 404], []]
    assert (out["there"], out["who"]) == ("org/new", [[refused, 401], "team"])


def test_large_contents_are_checked(hub: HubServer) -> None:
    call(hub.endpoint, "POST", "/api/repos/create", {"organization": "org", "name": "raw"})
    content = b"announced"
    oid, size = hashlib.sha256(content).hexdigest(), len(content)
    batch = {"operation": "upload", "objects": [{"oid": oid, "size": size}]}
    _, answer = call(hub.endpoint, "POST", "/org/raw.git/info/lfs/objects/batch", batch)
    path = answer["objects"][0]["actions"]["upload"]["href"].removeprefix(hub.cdn_endpoint)
    verify = answer["objects"][0]["actions"]["verify"]["href"].removeprefix(hub.endpoint)
    pointer = {"key": "lfsFile", "value": {"path": "a.bin", "algo": "sha256", "oid": oid, "size": size}}
    lines = [{"key": "header", "value": {"summary": "add", "description": ""}}, pointer]

    def commit() -> tuple:
        body = "\n".join(map(json.dumps, lines)).encode()
        return call(hub.endpoint, "POST", "/api/models/org/raw/commit/main", body)

    for wrong in (b"announceD", content[:-1], content + b"!", b""):
        assert call(hub.cdn_endpoint, "PUT", path, wrong, None)[0] == 400
    assert call(hub.cdn_endpoint, "PUT", path, content)[0] == 400  # the token was for the Hub
    assert call(hub.cdn_endpoint, "PUT", path.replace(f"/{size}?", "/10?"), content, None)[0] == 403
    assert call(hub.endpoint, "POST", verify, batch["objects"][0])[0] == 404
    assert commit()[0] == 400
    # A client that leaves within its upload.
    connection = http.client.HTTPConnection(urlsplit(hub.cdn_endpoint).netloc, timeout=10)
    connection.putrequest("PUT", path)
    connection.putheader("Content-Length", str(size))
    connection.endheaders(content[:4])
    connection.close()

    assert call(hub.cdn_endpoint, "PUT", path, content, None)[0] == 200
    assert call(hub.endpoint, "POST", verify, {"oid": oid, "size": 8})[0] == 400
    assert call(hub.endpoint, "POST", verify, batch["objects"][0])[0] == 200
    pointer["value"]["size"] = 8
    assert commit()[0] == 400
    pointer["value"]["size"] = size
    assert commit()[0] == 200
    assert contents(hub, "org/raw")["a.bin"] == content
    _, answer = call(hub.endpoint, "POST", "/org/raw.git/info/lfs/objects/batch", batch)
    assert "actions" not in answer["objects"][0]


def test_a_commit_is_all_or_nothing(hub: HubServer) -> None:
    call(hub.endpoint, "POST", "/api/repos/create", {"organization": "org", "name": "raw"})
    header = {"key": "header", "value": {"summary": "one"}}

    def file(path: str, content: str = base64.b64encode(b"new").decode(), encoding: str = "base64") -> dict:
        return {"key": "file", "value": {"path": path, "content": content, "encoding": encoding}}

    def commit(*lines: dict, branch: str = "main") -> tuple:
        body = "\n".join(map(json.dumps, lines)).encode()
        return call(hub.endpoint, "POST", f"/api/models/org/raw/commit/{branch}", body)

    assert commit(header, file("a.txt"), file("b.txt"), file("sub/c.txt"))[0] == 200
    before, state = hub.repos["org/raw"].at("main").id, contents(hub, "org/raw")
    big = base64.b64encode(bytes(10 * MIB + 1)).decode()
    for bad in (
        *map(file, ("../x", "/x", "x//y", "", ".git/config", "a.txt/x", "sub")),
        file("x", "no base64!"),
        file("x", encoding="utf-8"),
        file("x", big),
        {"key": "file", "value": {}},
        {"key": "rename", "value": {"path": "a.txt"}},
        {"key": "deletedFile", "value": {"path": "nope"}},
        {"key": "deletedFile", "value": {"path": "sub"}},
        {"key": "deletedFolder", "value": {"path": "a.txt/"}},
        {"no": "key"},
    ):
        status, answer = commit(header, file("a.txt", ""), {"key": "deletedFile", "value": {"path": "b.txt"}}, bad)
        assert status == (404 if "deleted" in bad.get("key", "") else 400), answer
        assert hub.repos["org/raw"].at("main").id == before
    for lines in ([], [file("a.txt")], [{"key": "header", "value": {}}]):
        assert commit(*lines)[0] == 400
    assert commit(header, file("x"), branch="nope")[0] == 404
    assert commit({"key": "header", "value": {"summary": "x", "parentCommit": "0" * 40}}, file("x"))[0] == 412
    assert call(hub.endpoint, "POST", "/api/models/org/raw/commit/main", b'{"key": ')[0] == 400
    assert call(hub.endpoint, "POST", "/api/models/org/raw/commit/main?create_pr=1", b"")[0] == 400  # says nothing
    assert contents(hub, "org/raw") == state


def test_refused_bodies_do_not_spoil_the_connection(hub: HubServer) -> None:
    connection = http.client.HTTPConnection(urlsplit(hub.endpoint).netloc, timeout=10)
    for path in ("/api/models/org/served/commit/main", "/api/nothing", "/api/repos/create"):
        connection.request("POST", path, b"GET /x HTTP/1.1\r\n\r\n" * 9000)
        assert connection.getresponse().read().startswith(b"{")
    connection.request("GET", "/org/served/resolve/main/config.json")
    assert connection.getresponse().read() == b"{}"
    assert [one.method for one in hub.log] == ["POST"] * 3 + ["GET"]

    # The head alone: the server answers and hangs up without reading a body.
    connection.putrequest("POST", "/api/repos/create")
    connection.putheader("Transfer-Encoding", "chunked")
    connection.endheaders()
    assert connection.getresponse().status == 411
    connection.close()


def test_commits_at_once_follow_each_other(hub: HubServer) -> None:
    call(hub.endpoint, "POST", "/api/repos/create", {"organization": "org", "name": "raw"})

    def commit(index: int) -> str:
        lines = [{"key": "header", "value": {"summary": str(index)}}]
        lines.append({"key": "file", "value": {"path": f"{index}.txt", "content": "", "encoding": "base64"}})
        body = "\n".join(map(json.dumps, lines)).encode()
        return call(hub.endpoint, "POST", "/api/models/org/raw/commit/main", body)[1]["commitOid"]

    with ThreadPoolExecutor(8) as pool:
        made = set(pool.map(commit, range(24)))
    _, history = call(hub.endpoint, "GET", "/api/models/org/raw/commits/main")
    assert {one["id"] for one in history[:-1]} == made
    assert len(history) == 25
    assert len(contents(hub, "org/raw")) == 25


def test_what_was_written_goes_with_the_server() -> None:
    with HubServer(writers={"hf_write": None}) as server:
        call(server.endpoint, "POST", "/api/repos/create", {"organization": "org", "name": "raw"})
        path = server.repos["org/raw"].at("main").files[".gitattributes"].path
        assert path.exists()
    assert not path.exists()
