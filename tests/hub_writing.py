"""The write routes of `hub_server`, and those that a client calls on the way."""

import hmac
import json
import re
from base64 import b64decode
from urllib.parse import parse_qs, quote

import yaml

from tests.hub_repo import EPOCH, Refusal, tracked_by_lfs
from tests.hub_routes import API, PAGE, Handler, Route

_COLORS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


class WritingHandler(Handler):
    """A handler that also knows how to write."""

    # Repositories

    def whoami(self) -> None:
        self.send_json(self.server.hub.whoami(self.token))

    def create_repo(self) -> None:
        asked = self.read_json()
        kind = asked.get("type") or "model"
        if kind not in ("model", "dataset", "space") or not re.fullmatch(r"[\w.-]{1,96}", asked.get("name") or ""):
            raise Refusal(400, f"Invalid repository type or name: {kind} {asked.get('name')}")
        if kind == "space" and asked.get("sdk") not in ("gradio", "docker", "static"):
            raise Refusal(400, f"Invalid Space SDK: {asked.get('sdk')}")
        default = "private" if asked.get("organization") in self.server.hub.closed else "public"
        private = asked.get("private") or asked.get("visibility", default) == "private"
        repo = self.server.hub.create(
            self.token, kind, asked.get("organization"), asked["name"], private, asked.get("sdk")
        )
        self.send_json({"url": f"{self.server.hub.endpoint}/{repo}", "name": repo, "private": bool(private)})

    def auth_check(self, repo: str) -> None:
        self.server.hub.writable(repo, self.token)
        self.send_json({})

    def validate_yaml(self) -> None:
        asked = self.read_json()
        errors, warnings = check_card(asked["content"], asked.get("repoType") or "model")
        body = {
            key: [{"message": text} for text in texts] for key, texts in (("errors", errors), ("warnings", warnings))
        }
        if errors:
            raise Refusal(400, "Invalid metadata in README.md", body=body)
        self.send_json(body)

    def add_secret(self, repo: str) -> None:
        asked = self.read_json()
        written = self.server.hub.writable(repo, self.token)
        if not repo.startswith("spaces/"):
            raise Refusal(404, "Only a Space has secrets")
        written.secrets[asked["key"]] = asked["value"]  # as on the Hub, it can't be read back
        self.send_json({})

    # Branches

    def create_branch(self, repo: str, name: str) -> None:
        start = self.read_json().get("startingPoint") or "main"
        self.server.hub.writable(repo, self.token).create_branch(name, start)
        self.send_json({})

    # Commits

    def preupload(self, repo: str, revision: str) -> None:
        commit = self.server.hub.writable(repo, self.token, self.flag("create_pr")).at(revision)
        if commit is None:
            raise Refusal(404, "Invalid rev id", "RevisionNotFound")
        answers = []
        for asked in self.read_json()["files"]:
            path, size, known = asked["path"], asked["size"], commit.files.get(asked["path"])
            lfs = tracked_by_lfs(path, size) or b"\0" in b64decode(asked["sample"])
            answers.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False})
            if known:
                # With it, the client leaves unchanged files out of the commit.
                answers[-1]["oid"] = known.etag
        self.send_json({"files": answers})

    def lfs_batch(self, repo: str) -> None:
        hub, asked = self.server.hub, self.read_json()
        # Uploading needs only the right to propose a change; the content is invisible until a commit refers to it.
        written = hub.writable(repo, self.token, propose=True)
        if asked.get("operation") != "upload" or "basic" not in asked.get("transfers", ["basic"]):
            raise Refusal(422, "Only uploads by the basic transfer are served")
        objects = []
        for one in asked["objects"]:
            objects.append({"oid": one["oid"], "size": one["size"], "authenticated": True})
            if written.large(one["oid"]) is None:
                path = f"/upload/{repo}/{one['oid']}/{one['size']}"
                href = f"{hub.cdn_endpoint}{quote(path)}?signature={hub.signature(path)}"
                verify = f"{hub.endpoint}/api/lfs/{quote(repo)}/verify"
                objects[-1]["actions"] = {"upload": {"href": href}, "verify": {"href": verify}}
        self.send_json({"transfer": "basic", "objects": objects})

    def upload(self, repo: str, sha256: str, size: str) -> None:
        if self.headers.get("Authorization"):
            raise Refusal(400, "Only one auth mechanism allowed")
        given = parse_qs(self.query).get("signature", [""])[0]
        if not hmac.compare_digest(given.encode(), self.server.hub.signature(self.decoded).encode()):
            raise Refusal(403, "SignatureDoesNotMatch")
        if (found := self.server.hub.repos.get(repo)) is None:
            raise Refusal(404, "NoSuchKey")
        body = self.body()
        if self.server.hub.take("garble", self.command, self.decoded):
            body = (bytes([chunk[0] ^ 1]) + chunk[1:] for chunk in body)
        found.receive(body, sha256, int(size))
        self.send(200, {"ETag": f'"{sha256}"'}, 0, iter(()))

    def verify(self, repo: str) -> None:
        asked = self.read_json()
        file = self.server.hub.writable(repo, self.token, propose=True).large(asked["oid"])
        if file is None:
            raise Refusal(404, f"There is no object {asked['oid']}")
        if file.size != asked["size"]:
            raise Refusal(400, f"Object {asked['oid']} has {file.size} bytes, not {asked['size']}")
        self.send_json({})

    def commit(self, repo: str, revision: str) -> None:
        propose = self.flag("create_pr")
        written = self.server.hub.writable(repo, self.token, propose)
        lines = [json.loads(line) for line in b"".join(self.body()).splitlines() if line]
        made = written.commit(revision, lines, propose=propose)
        page = f"{self.server.hub.endpoint}/{repo}"
        answer = {"success": True, "commitOid": made.id, "commitUrl": f"{page}/commit/{made.id}", "hookOutput": ""}
        if propose:
            answer["pullRequestUrl"] = f"{page}/discussions/{len(written.titles)}"
        self.send_json(answer)

    def discussions(self, repo: str) -> None:
        found = self.server.hub.repo(repo, self.token)
        kind, name = ("model", repo) if repo.count("/") < 2 else (repo.split("s/")[0], repo.split("/", 1)[1])
        titles, merged = getattr(found, "titles", []), getattr(found, "merged", set())
        status = {number: "merged" if number in merged else "open" for number in range(1, len(titles) + 1)}
        asked = parse_qs(self.query).get("status", ["all"])[0]
        listed = [
            {
                "num": number,
                "title": title,
                "author": {"name": self.server.hub.user},
                "createdAt": EPOCH,
                "status": status[number],
                "repo": {"name": name, "type": kind},
                "isPullRequest": True,
            }
            for number, title in enumerate(titles, 1)
            if asked in ("all", status[number])
        ]
        self.send_json({"discussions": listed, "count": len(listed), "start": 0})


def check_card(content: str, kind: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about the metadata of a README, similar to those of the Hub."""
    block = re.match(r"\ufeff?\s*---[ \t]*\r?\n(.*?)^---[ \t]*\r?$", content, re.DOTALL | re.MULTILINE)
    try:
        data = yaml.safe_load(block[1]) if block else None
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"], []
    if data is None:
        return [], ["empty or missing yaml metadata in repo card"]
    if not isinstance(data, dict):
        return ["The YAML metadata must be a mapping"], []
    errors = []
    if kind == "space":
        if data.get("sdk") not in ("gradio", "docker", "static"):
            errors.append('"sdk" must be one of [gradio, docker, static]')
        for key in ("colorFrom", "colorTo"):
            if data.get(key, "red") not in _COLORS:
                errors.append(f'"{key}" must be one of {sorted(_COLORS)}')
        if len(data.get("short_description") or "") > 60:
            errors.append('"short_description" length must be less than or equal to 60 characters long')
    return errors, []


WRITING_ROUTES: list[Route] = [
    ("GET", re.compile("/api/whoami-v2"), WritingHandler.whoami),
    ("GET", re.compile(f"{API}/auth-check/write"), WritingHandler.auth_check),
    ("POST", re.compile("/api/repos/create"), WritingHandler.create_repo),
    ("POST", re.compile("/api/validate-yaml"), WritingHandler.validate_yaml),
    ("POST", re.compile(f"{API}/secrets"), WritingHandler.add_secret),
    ("GET", re.compile(f"{API}/discussions"), WritingHandler.discussions),
    ("POST", re.compile(f"{API}/branch/(?P<name>[^/]+)"), WritingHandler.create_branch),
    ("POST", re.compile(f"{API}/preupload/(?P<revision>[^/]+)"), WritingHandler.preupload),
    ("POST", re.compile(f"{API}/commit/(?P<revision>[^/]+)"), WritingHandler.commit),
    ("POST", re.compile(rf"{PAGE}\.git/info/lfs/objects/batch"), WritingHandler.lfs_batch),
    ("POST", re.compile(f"/api/lfs{PAGE}/verify"), WritingHandler.verify),
]
STORAGE_ROUTES: list[Route] = [
    ("PUT", re.compile(rf"/upload{PAGE}/(?P<sha256>[0-9a-f]{{64}})/(?P<size>\d+)"), WritingHandler.upload)
]
