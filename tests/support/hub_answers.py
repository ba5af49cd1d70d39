"""What the Hub on the loopback answers: the endpoints that the real clients ask."""

import base64
import hashlib
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any
from urllib.parse import parse_qs

from support.hub_connection import Answered, Connection
from support.hub_repos import LARGE, Commit, Repo, card_data, entry, etag

_REPO = r"(?P<repo>[^/]+/[^/]+?)"
_API = rf"/api/(?P<kind>models|datasets)/{_REPO}"


class HubAnswers(Connection):
    """The endpoints, one method each."""

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
            raise Answered
        return repo

    def _at(self, repo: Repo, revision: str) -> Commit:
        commit = repo.find(revision)
        if commit is None:
            self._fail(404, "Invalid rev id", code="RevisionNotFound")
            raise Answered
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
            "cardData": card_data(commit.files.get("README.md", b"")),
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
                "uploadMode": "lfs" if LARGE.fullmatch(file["path"]) else "regular",
                "shouldIgnore": False,
                "oid": etag(file["path"], there[file["path"]]) if file["path"] in there else None,
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
            upload_of: dict[str, Any] = {"oid": oid, "size": size}
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
                upload_of["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/lfs/{oid}/verify"}}
            objects.append(upload_of)
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
        self._json([entry(path, commit.files[path]) for path in wanted if path in commit.files])

    def tree(self, kind: str, repo: str, revision: str, folder: str | None = None) -> None:
        commit = self._at(self._repo(kind, repo), revision)
        prefix = f"{folder}/" if folder else ""
        self._json([entry(path, content) for path, content in commit.files.items() if path.startswith(prefix)])

    def commits(self, kind: str, repo: str, revision: str) -> None:
        found = self._repo(kind, repo)
        self._at(found, revision)
        date = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
        shown = [{"id": c.sha, "title": c.title, "message": c.message, "authors": [{"user": "ada"}], "date": date}
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
        headers = {"ETag": f'"{etag(path, content)}"', "X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        headers["X-Linked-Size"] = str(len(content))
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None:
            self._answer(content, headers=headers)
            return
        first, last = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        self._answer(content[first : last + 1], 206, headers)


ROUTES: tuple[tuple[str, tuple[str, ...], Callable[..., None]], ...] = (
    (r"/api/whoami-v2", ("GET",), HubAnswers.whoami),
    (r"/api/repos/create", ("POST",), HubAnswers.create),
    (r"/api/validate-yaml", ("POST",), HubAnswers.validate),
    (rf"{_API}/auth-check(?P<write>/write)?", ("GET",), HubAnswers.auth_check),
    (rf"{_API}/preupload/(?P<revision>.+)", ("POST",), HubAnswers.preupload),
    (rf"{_API}/commit/(?P<revision>.+)", ("POST",), HubAnswers.commit),
    (rf"{_API}/commits/(?P<revision>.+)", ("GET",), HubAnswers.commits),
    (rf"{_API}/paths-info/(?P<revision>.+)", ("POST",), HubAnswers.paths_info),
    (rf"{_API}/tree/(?P<revision>refs/pr/\d+|[^/]+)(?:/(?P<folder>.*))?", ("GET",), HubAnswers.tree),
    (rf"{_API}/refs", ("GET",), HubAnswers.refs),
    (rf"{_API}/branch/(?P<branch>.+)", ("POST",), HubAnswers.branch),
    (rf"{_API}/revision/(?P<revision>.+)", ("GET",), HubAnswers.info),
    (_API, ("GET",), HubAnswers.info),
    (rf"/{_REPO}\.git/info/lfs/objects/batch", ("POST",), HubAnswers.lfs_batch),
    (r"/lfs/(?P<oid>[0-9a-f]{64})", ("PUT",), HubAnswers.lfs_put),
    (r"/lfs/(?P<oid>[0-9a-f]{64})/part/(?P<number>\d+)", ("PUT",), HubAnswers.lfs_part),
    (r"/lfs/(?P<oid>[0-9a-f]{64})/complete", ("POST",), HubAnswers.lfs_complete),
    (r"/lfs/(?P<oid>[0-9a-f]{64})/verify", ("POST",), HubAnswers.lfs_verify),
    (
        rf"/(?:(?P<kind>datasets)/)?{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)",
        ("GET", "HEAD"),
        HubAnswers.resolve,
    ),
)
HubAnswers.routes = ROUTES
