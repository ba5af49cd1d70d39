"""A Hub on the loopback: a real HTTP server that speaks what the real clients ask, with faults on request.

Owns repositories with commits and branches in memory, tokens with roles, and faults. Large files go the way of LFS,
in one part or in several; the Xet protocol is not spoken: clients run with HF_HUB_DISABLE_XET=1.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

WRITER, READER, STRANGER = "hf_writerwriterwriterwriterwriterwr", "hf_readerreaderreaderreaderreaderre", "hf_none"
USER = "ada"
_LARGE = re.compile(r".*\.(safetensors|parquet|bin)")
_REPO = r"(?P<repo>[^/]+/[^/]+?)"
_API = rf"/api/(?P<kind>models|datasets)/{_REPO}"


@dataclass(frozen=True)
class Commit:
    """One state of a repository."""

    sha: str
    title: str
    message: str
    files: dict[str, bytes]
    parent: str | None


@dataclass
class Repo:
    """A repository: its commits, newest last, and where its branches are."""

    name: str
    kind: str
    private: bool = False
    gated: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def commit(self, title: str, files: Mapping[str, bytes], *, branch: str = "main", message: str = "") -> Commit:
        """Add a commit on top of a branch; `files` come to those that are there."""
        parent = self.branches.get(branch)
        content = {**(self.commits[parent].files if parent else {}), **files}
        sha = hashlib.sha1(f"{self.name}{len(self.commits)}{title}".encode()).hexdigest()
        self.commits[sha] = Commit(sha, title, message, content, parent)
        self.branches[branch] = sha
        return self.commits[sha]

    def find(self, revision: str) -> Commit | None:
        """Return the commit of a branch or hash."""
        return self.commits.get(self.branches.get(revision, revision))

    @property
    def head(self) -> Commit:
        """The newest commit of the default branch."""
        return self.commits[self.branches["main"]]

    def history(self, revision: str) -> list[Commit]:
        """Return the commits of a branch, newest first."""
        found, commit = [], self.find(revision)
        while commit is not None:
            found.append(commit)
            commit = self.commits.get(commit.parent) if commit.parent else None
        return found


@dataclass
class Fault:
    """What goes wrong, at which requests, how often.

    Attributes:
        request: pattern of `METHOD PATH`.
        status: answered in the place of the truth; 0 cuts the connection in the middle of the body.
        times: how often; then it works again.
        headers: of the answer.
        seconds: waited before the truth is answered, where `status` is None.
        then: called when it strikes.
    """

    request: str
    status: int | None = None
    times: int = 1
    headers: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    then: Callable[[], None] = lambda: None


class HubServer:
    """The server; use it as a context manager.

    Attributes:
        repos: by kind ("models", "datasets") and name.
        objects: large files by SHA-256.
        faults: armed ones.
        requests: what was asked, `METHOD PATH`.
        sent: headers of the requests, beside `requests`.
        part_bytes: size from which a large file goes up in parts, or None.
    """

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.part_bytes: int | None = None
        self.tokens = {WRITER: (USER, "write"), READER: (USER, "read")}
        self.lock = threading.RLock()
        self._server: ThreadingHTTPServer | None = None
        self.port = 0

    def __enter__(self) -> "HubServer":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def url(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen; on the port that it had before, if any."""
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self) -> None:
        """Listen no more; the repositories stay."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    @property
    def is_up(self) -> bool:
        """Whether it listens."""
        return self._server is not None

    def add(self, kind: str, name: str, files: Mapping[str, bytes], **facts: Any) -> Repo:
        """Make a repository with one commit."""
        repo = self.repos.setdefault((kind, name), Repo(name, kind, **facts))
        repo.commit("initial commit", files)
        return repo

    def add_folder(self, kind: str, name: str, folder: Path) -> Repo:
        """Make a repository of the files of a folder."""
        return self.add(kind, name, {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})

    def model(self, name: str) -> Repo:
        """Return a model's repository."""
        return self.repos[("models", name)]

    def arm(self, request: str, **what: Any) -> Fault:
        """Let something go wrong."""
        fault = Fault(request, **what)
        self.faults.append(fault)
        return fault

    def environment(self, home: Path, token: str | None = WRITER) -> dict[str, str]:
        """Return the variables under which a process talks to this server, with a cache of its own."""
        given = {} if token is None else {"HF_TOKEN": token}
        return {
            "HF_ENDPOINT": self.url,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
            **given,
        }


class _Answered(Exception):
    """The request was answered already."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: object) -> None:
        pass

    def _serve(self) -> None:
        parts = urlsplit(self.path)
        self.content: bytes | None = None
        self.query = parse_qs(parts.query)
        self.at = unquote(parts.path)
        request = f"{self.command} {self.at}"
        self.hub.requests.append(request)
        try:
            self._strike(request)
            for pattern, method, answer in _ROUTES:
                found = re.fullmatch(pattern, self.at)
                if found and self.command in method:
                    answer(self, **found.groupdict())
                    return
            self._fail(404, "no such page")
        except _Answered:
            pass
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    do_GET = do_POST = do_PUT = do_HEAD = _serve  # noqa: N815 - the names that http.server calls

    def _strike(self, request: str) -> None:
        with self.hub.lock:
            fault = next((f for f in self.hub.faults if f.times > 0 and re.search(f.request, request)), None)
            if fault is None:
                return
            fault.times -= 1
        fault.then()
        if fault.seconds:
            time.sleep(fault.seconds)
        if fault.status == 0 and self.command in ("PUT", "POST"):
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            self._hang_up()
        elif fault.status == 0:
            self.cut = True
        elif fault.status is not None:
            self._body()
            self._fail(fault.status, "armed", dict(fault.headers))

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.close()
        raise _Answered

    def _body(self) -> bytes:
        """Return the body of the request; it may be asked for again."""
        if self.content is None:
            self.content = self._read_body()
        return self.content

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, content: bytes, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if getattr(self, "cut", False):
            self.wfile.write(content[: len(content) // 2])
            self._hang_up()
        self.wfile.write(content)

    def _json(self, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        self._answer(json.dumps(value).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _fail(self, status: int, message: str, headers: Mapping[str, str] | None = None, code: str = "") -> None:
        shown = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self._json({"error": message}, status, shown)
        raise _Answered

    @property
    def _account(self) -> tuple[str, str] | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            self._body()
            self._fail(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def _repo(self, kind: str, name: str) -> Repo:
        repo, account = self.hub.repos.get((kind, name)), self._account
        if repo is None or (repo.private and (account is None or account[0] != name.partition("/")[0])):
            self._body()
            self._fail(404 if account else 401, "Repository not found", code="RepoNotFound")
            raise _Answered
        return repo

    def _at(self, repo: Repo, revision: str) -> Commit:
        commit = repo.find(revision)
        if commit is None:
            self._fail(404, "Invalid rev id", code="RevisionNotFound")
            raise _Answered
        return commit

    def _must_write(self, name: str) -> None:
        account = self._account
        if account is None or account[1] != "write" or account[0] != name.partition("/")[0]:
            self._body()
            self._fail(403, "you have no rights to write here")

    def whoami(self) -> None:
        account = self._account
        if account is None:
            self._fail(401, "Invalid username or password.")
            return
        auth = {"type": "access_token", "accessToken": {"displayName": "t", "role": account[1]}}
        self._json({"type": "user", "name": account[0], "orgs": [], "auth": auth})

    def create(self) -> None:
        wanted = json.loads(self._body())
        account = self._account
        owner = wanted.get("organization") or (account[0] if account else "")
        name, kind = f"{owner}/{wanted['name']}", f"{wanted.get('type') or 'model'}s"
        self._must_write(name)
        if (kind, name) in self.hub.repos:
            self._json({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
            return
        private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
        self.hub.add(kind, name, {".gitattributes": b"*.safetensors filter=lfs\n"}, private=private)
        self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def validate(self) -> None:
        self._body()
        self._json({"errors": [], "warnings": []})

    def info(self, kind: str, repo: str, revision: str = "main") -> None:
        found = self._repo(kind, repo)
        commit = self._at(found, revision)
        facts = {
            "id": repo,
            "modelId": repo,
            "sha": commit.sha,
            "private": found.private,
            "gated": "manual" if found.gated else False,
            "disabled": False,
            "tags": [],
            "lastModified": "2026-01-01T00:00:00.000Z",
            "createdAt": "2026-01-01T00:00:00.000Z",
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": path} for path in commit.files],
            "cardData": _card_data(commit.files.get("README.md", b"")),
        }
        self._json(facts)

    def auth_check(self, kind: str, repo: str, write: str | None = None) -> None:
        found = self._repo(kind, repo)
        if write:
            self._must_write(repo)
        if found.gated:
            self._fail(403, "gated", code="GatedRepo")
        self._json({})

    def preupload(self, kind: str, repo: str, revision: str) -> None:
        wanted = json.loads(self._body())["files"]
        found = self._repo(kind, repo)
        self._must_write(repo)
        there = self._at(found, revision).files
        answer = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if _LARGE.fullmatch(file["path"]) else "regular",
                "shouldIgnore": False,
                "oid": _etag(file["path"], there[file["path"]]) if file["path"] in there else None,
            }
            for file in wanted
        ]
        self._json({"files": answer})

    def lfs_batch(self, repo: str) -> None:
        wanted = json.loads(self._body())["objects"]
        self._repo("models", repo)
        self._must_write(repo)
        objects = []
        for each in wanted:
            oid, size = each["oid"], each["size"]
            entry: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.objects:
                upload: dict[str, Any] = {"href": f"{self.hub.url}/lfs/{oid}"}
                part = self.hub.part_bytes
                if part is not None and size > part:
                    numbers = range(1, -(-size // part) + 1)
                    parts = {f"{n:05}": f"{self.hub.url}/lfs/{oid}/part/{n}" for n in numbers}
                    upload = {
                        "href": f"{self.hub.url}/lfs/{oid}/complete",
                        "header": {"chunk_size": str(part), **parts},
                    }
                entry["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/{oid}/verify"}}
            objects.append(entry)
        self._json({"objects": objects, "transfer": "basic"})

    def lfs_put(self, oid: str) -> None:
        content = self._body()
        if hashlib.sha256(content).hexdigest() != oid:
            self._fail(400, "not the content of that hash")
        self.hub.objects[oid] = content
        self._json({})

    def lfs_part(self, oid: str, number: str) -> None:
        content = self._body()
        self.hub.parts.setdefault(oid, {})[int(number)] = content
        self._json({}, headers={"ETag": f'"{hashlib.md5(content).hexdigest()}"'})

    def lfs_complete(self, oid: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(self._body())["parts"]]
        content = b"".join(self.hub.parts[oid][number] for number in numbers)
        if hashlib.sha256(content).hexdigest() != oid:
            self._fail(400, "not the content of that hash")
        self.hub.objects[oid] = content
        self._json({"completed": True})

    def lfs_verify(self, oid: str) -> None:
        wanted = json.loads(self._body())
        if len(self.hub.objects.get(oid, b"")) != wanted["size"]:
            self._fail(404, "no such object")
        self._json({})

    def commit(self, kind: str, repo: str, revision: str) -> None:
        lines = [json.loads(line) for line in self._body().splitlines() if line]
        found = self._repo(kind, repo)
        self._must_write(repo)
        header = lines[0]["value"]
        files: dict[str, bytes] = {}
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    self._fail(400, "LFS object missing")
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        with self.hub.lock:
            branch = revision
            if "create_pr" in self.query:
                branch = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in found.branches)}"
                found.branches[branch] = self._at(found, revision).sha
            made = found.commit(header["summary"], files, branch=branch, message=header["description"])
        answer = {"success": True, "commitOid": made.sha, "commitUrl": f"{self.hub.url}/{repo}/commit/{made.sha}"}
        if "create_pr" in self.query:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo}/discussions/{branch.rpartition('/')[2]}"
        self._json(answer)

    def paths_info(self, kind: str, repo: str, revision: str) -> None:
        body = self._body()
        wanted = json.loads(body)["paths"] if body.startswith(b"{") else parse_qs(body.decode()).get("paths", [])
        commit = self._at(self._repo(kind, repo), revision)
        self._json([_entry(path, commit.files[path]) for path in wanted if path in commit.files])

    def tree(self, kind: str, repo: str, revision: str, folder: str | None = None) -> None:
        commit = self._at(self._repo(kind, repo), revision)
        prefix = f"{folder}/" if folder else ""
        self._json([_entry(path, content) for path, content in commit.files.items() if path.startswith(prefix)])

    def commits(self, kind: str, repo: str, revision: str) -> None:
        found = self._repo(kind, repo)
        self._at(found, revision)
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        shown = [{"id": c.sha, "title": c.title, "message": c.message, "authors": [{"user": USER}], "date": date}
                 for c in found.history(revision)]  # fmt: skip
        self._json(shown)

    def refs(self, kind: str, repo: str) -> None:
        found = self._repo(kind, repo)
        branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": sha} for n, sha in found.branches.items()]
        self._json({"branches": branches, "tags": [], "converts": []})

    def branch(self, kind: str, repo: str, branch: str) -> None:
        self._body()
        found = self._repo(kind, repo)
        self._must_write(repo)
        if branch in found.branches:
            self._fail(409, "exists")
        found.branches[branch] = found.branches["main"]
        self._json({})

    def resolve(self, repo: str, revision: str, path: str, kind: str | None = None) -> None:
        found = self._repo(kind or "models", repo)
        if found.gated:
            self._fail(403, "Access to this gated model is restricted", code="GatedRepo")
        commit = self._at(found, revision)
        content = commit.files.get(path)
        if content is None:
            self._fail(404, "Entry not found", {"X-Repo-Commit": commit.sha}, code="EntryNotFound")
            return
        headers = {"ETag": f'"{_etag(path, content)}"', "X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        headers["X-Linked-Size"] = str(len(content))
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._answer(content, headers=headers)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._answer(content[first : last + 1], 206, headers)


def _oid(path: str, content: bytes) -> str:
    if _LARGE.fullmatch(path):  # git knows the pointer, whose hash depends on the content alone
        pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:{}\nsize {}\n"
        content = pointer.format(hashlib.sha256(content).hexdigest(), len(content)).encode()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _etag(path: str, content: bytes) -> str:
    return hashlib.sha256(content).hexdigest() if _LARGE.fullmatch(path) else _oid(path, content)


def _entry(path: str, content: bytes) -> dict[str, Any]:
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": _oid(path, content)}
    if _LARGE.fullmatch(path):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
    return entry


def _card_data(readme: bytes) -> dict[str, str]:
    found = re.match(rb"---\n(.*?)---\n", readme, re.DOTALL)
    lines = found[1].decode().splitlines() if found else []
    return {key: value for key, _, value in (line.partition(": ") for line in lines) if value}


_ROUTES: tuple[tuple[str, tuple[str, ...], Callable[..., None]], ...] = (
    (r"/api/whoami-v2", ("GET",), _Handler.whoami),
    (r"/api/repos/create", ("POST",), _Handler.create),
    (r"/api/validate-yaml", ("POST",), _Handler.validate),
    (rf"{_API}/auth-check(?P<write>/write)?", ("GET",), _Handler.auth_check),
    (rf"{_API}/preupload/(?P<revision>.+)", ("POST",), _Handler.preupload),
    (rf"{_API}/commit/(?P<revision>.+)", ("POST",), _Handler.commit),
    (rf"{_API}/commits/(?P<revision>.+)", ("GET",), _Handler.commits),
    (rf"{_API}/paths-info/(?P<revision>.+)", ("POST",), _Handler.paths_info),
    (rf"{_API}/tree/(?P<revision>refs/pr/\d+|[^/]+)(?:/(?P<folder>.*))?", ("GET",), _Handler.tree),
    (rf"{_API}/refs", ("GET",), _Handler.refs),
    (rf"{_API}/branch/(?P<branch>.+)", ("POST",), _Handler.branch),
    (rf"{_API}/revision/(?P<revision>.+)", ("GET",), _Handler.info),
    (_API, ("GET",), _Handler.info),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", ("POST",), _Handler.lfs_batch),
    (r"/lfs/(?P<oid>[0-9a-f]{64})", ("PUT",), _Handler.lfs_put),
    (r"/lfs/(?P<oid>[0-9a-f]{64})/part/(?P<number>\d+)", ("PUT",), _Handler.lfs_part),
    (r"/lfs/(?P<oid>[0-9a-f]{64})/complete", ("POST",), _Handler.lfs_complete),
    (r"/lfs/(?P<oid>[0-9a-f]{64})/verify", ("POST",), _Handler.lfs_verify),
    (rf"/(?:(?P<kind>datasets)/)?{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", ("GET", "HEAD"), _Handler.resolve),
)
