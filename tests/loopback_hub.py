"""A small Hugging Face Hub on 127.0.0.1 that the real client uploads to and downloads from.

It serves repos of models and of data sets with the one branch `main`, users with tokens, and faults
on demand; clients can make repos of models. They need HF_HUB_DISABLE_XET=1: with hf_xet installed
they upload large files to xet without asking.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import pytest


def use_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Give the client this cache, and let its retries not wait."""
    # Only here: the client reads the environment, which conftest sets, when it is imported.
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import _http

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=lambda seconds: None))
    return folder


LFS_SUFFIXES = (".safetensors", ".bin", ".pt")
LFS_SIZE = 10 * 2**20


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    """Whether a file of this size that begins with `sample` is kept in LFS, not in git."""
    return size > 0 and (path.endswith(LFS_SUFFIXES) or size > LFS_SIZE or b"\0" in sample)


def blob_info(path: str, data: bytes) -> dict[str, Any]:
    """Size and ids of a file; `etag` is what the client knows its contents by."""
    oid = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    info: dict[str, Any] = {"path": path, "size": len(data), "oid": oid, "etag": oid}
    if is_lfs(path, len(data), data[:512]):
        info["etag"] = hashlib.sha256(data).hexdigest()
        info["lfs"] = {"oid": info["etag"], "size": len(data), "pointerSize": 130}
    return info


class Reply(NamedTuple):
    status: int
    body: bytes
    headers: Mapping[str, str]
    sent: int | None = None  # break off after so many bytes of the body


class Refusal(Exception):
    """An error answer; the client chooses its exception by `code`, or else by `status`."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        named["X-Error-Message"] = ascii(message)[1:-1]  # headers are Latin-1
        if code:
            named["X-Error-Code"] = code
        self.reply = Reply(status, json.dumps({"error": message}).encode(), named)


@dataclass
class Repo:
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # the newest is the last
    blobs: dict[str, bytes] = field(default_factory=dict)  # LFS uploads, committed or not

    @property
    def sha(self) -> str:
        return next(reversed(self.commits), "")

    def commit(self, files: Mapping[str, bytes]) -> None:
        content = [blob_info(path, data)["etag"] + path for path, data in sorted(files.items())]
        sha = hashlib.sha1("\n".join([self.sha, *content]).encode()).hexdigest()
        self.commits[sha] = dict(files)


class LoopbackHub:
    """The Hub; `start` and `stop` it or use it as a context manager, and point clients at `url`."""

    def __init__(self) -> None:
        self._port = 0  # after the first start the same port is used again
        self._lock = threading.Lock()
        self._fault: tuple[str, Reply] | None = None
        self._cut: str | None = None
        self.reset()

    def reset(self) -> None:
        """Forgets all repos, users and requests."""
        with self._lock:
            self.repos: dict[str, Repo] = {}
            self.users: dict[str, str] = {}  # token -> name
            self.requests: list[tuple[str, str]] = []  # method, path without the query
            self.tickets: dict[str, tuple[Repo, str]] = {}  # upload address -> repo, SHA-256

    def start(self) -> LoopbackHub:
        self._server = _Server(("127.0.0.1", self._port), _Handler)
        self._server.hub = self
        self._port = self._server.server_port
        self.url = f"http://127.0.0.1:{self._port}"
        # The default poll of half a second is what stop() would wait for
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self._thread.start()
        return self

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> LoopbackHub:
        return self.start()

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def add(self, repo_id: str, files: Mapping[str, bytes], private: bool = False) -> None:
        """Makes a repo of these files, or commits them to the one that there is."""
        with self._lock:
            repo = self.repos.setdefault(repo_id, Repo(private))
            repo.private = private
            repo.commit({**repo.commits.get(repo.sha, {}), **files})

    def files(self, repo_id: str) -> dict[str, bytes]:
        """The files on `main`."""
        with self._lock:
            repo = self.repos[repo_id]
            return dict(repo.commits[repo.sha])

    def add_user(self, name: str) -> str:
        """Makes a user known, who may write to the repos `name/...`, and returns a token."""
        token = f"hf_{secrets.token_hex(17)}"
        self.users[token] = name
        return token

    @contextmanager
    def answer_with(self, status: int, code: str = "", only: str = "") -> Iterator[None]:
        """Answers requests (whose path contains `only`) with `status` and X-Error-Code `code`.

        `only` may be "/resolve/", "/preupload/", "/upload/" (of LFS files) or "/commit/".
        """
        # Without this message the client takes the 401 of an https hub for a missing repo
        message = "Invalid credentials in Authorization header" if status == 401 else "On demand"
        # A client that was told to wait 0 s waits 1 s before each retry, not 1, 2, 4, 8 and 8 s
        reply = Refusal(status, message, code, Retry_After="0").reply
        before, self._fault = self._fault, (only, reply)
        try:
            yield
        finally:
            self._fault = before

    @contextmanager
    def down(self) -> Iterator[None]:
        """Answers nothing, as a Hub that can't be reached."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    @contextmanager
    def cut_short(self, path_substring: str) -> Iterator[None]:
        """Breaks off downloads of matching files in mid-file, also when the client resumes them."""
        before, self._cut = self._cut, path_substring
        try:
            yield
        finally:
            self._cut = before


class _Server(ThreadingHTTPServer):
    hub: LoopbackHub
    request_queue_size = 64  # a client opens many connections at once

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Any  # a _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def serve(self) -> None:
        self.hub = self.server.hub
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = urlsplit(self.path)
        self.query = {name: values[-1] for name, values in parse_qs(url.query).items()}
        try:
            with self.hub._lock:
                self.hub.requests.append((self.command, unquote(url.path)))
                answer = self._answer(url.path)
        except Refusal as refusal:
            answer = refusal.reply
        except (KeyError, TypeError, ValueError) as error:
            answer = Refusal(400, f"Malformed request: {error!r}").reply
        if not isinstance(answer, Reply):
            answer = Reply(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})
        self.send_response(answer.status)
        # One request a connection: none is left open that would be answered after stop()
        headers = {**answer.headers, "Content-Length": len(answer.body), "Connection": "close"}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body[: answer.sent])

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def _answer(self, path: str) -> Any:
        if self.hub._fault and self.hub._fault[0] in unquote(path):
            return self.hub._fault[1]
        for method, pattern, endpoint in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command.replace("HEAD", "GET"):
                return endpoint(self, *(unquote(group or "") for group in match.groups()))
        raise Refusal(404, f"The loopback hub does not serve {self.command} {path}")

    def _user(self, required: bool = False) -> str:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.users:
            raise Refusal(401, "Invalid credentials in Authorization header")
        if required and not token:
            raise Refusal(401, "Invalid username or password.")
        return self.hub.users.get(token, "")

    def _repo(self, repo_id: str, write: bool = False) -> Repo:
        user, owner = self._user(), repo_id.split("/")[0]
        repo = self.hub.repos.get(repo_id)
        if repo is None or (repo.private and user != owner):
            raise Refusal(404 if user else 401, "Repository not found", "RepoNotFound")
        if write and not user:
            # The client gives this code itself to such a 401, but only of an https hub
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        if write and user != owner:
            raise Refusal(403, f"You have no write access to {repo_id}")
        return repo

    def _revision(self, repo_id: str, revision: str) -> tuple[Repo, str, dict[str, bytes]]:
        repo = self._repo(repo_id)
        sha = repo.sha if revision == "main" else revision
        if sha not in repo.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repo, sha, repo.commits[sha]

    def whoami(self) -> Any:
        return {"type": "user", "name": self._user(required=True), "orgs": [], "auth": {}}

    def create(self) -> Any:
        fields, user = json.loads(self.body), self._user(required=True)
        owner = fields.get("organization") or user
        repo_id = f"{owner}/{fields['name']}"
        reply = {"url": f"{self.hub.url}/{repo_id}", "name": repo_id}
        if fields.get("type", "model") != "model":
            raise Refusal(400, "The loopback hub has model repos only")
        if owner != user:
            raise Refusal(403, f"You cannot create a repo in the namespace {owner}")
        if repo_id in self.hub.repos:
            reply["error"] = "You already created this model repo"
            return Reply(409, json.dumps(reply).encode(), {})
        self.hub.repos[repo_id] = Repo(fields.get("visibility") == "private")
        self.hub.repos[repo_id].commit({})
        return reply

    def delete(self) -> Any:
        fields = json.loads(self.body)
        repo_id = f"{fields.get('organization') or self._user(required=True)}/{fields['name']}"
        self._repo(repo_id, write=True)
        del self.hub.repos[repo_id]
        return {}

    def info(self, repo_id: str, revision: str = "main") -> Any:
        repo, sha, files = self._revision(repo_id, revision)
        info = {"id": repo_id, "author": repo_id.split("/")[0], "sha": sha, "private": repo.private}
        siblings = [{"rfilename": path} for path in files]
        return {**info, "gated": False, "disabled": False, "tags": [], "siblings": siblings}

    def tree(self, repo_id: str, revision: str, folder: str) -> Any:
        prefix = f"{folder}/" if folder else ""
        files = sorted(self._revision(repo_id, revision)[2].items())
        entries = [{"type": "file", **blob_info(*file)} for file in files]
        folders = {str(parent) for path, _ in files for parent in PurePosixPath(path).parents}
        for name in sorted(folders - {"."}):
            entries += [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0}]
        entries = [entry for entry in entries if entry["path"].startswith(prefix)]
        if folder and not entries:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        if self.query.get("recursive") == "true":
            return entries
        return [entry for entry in entries if "/" not in entry["path"].removeprefix(prefix)]

    def paths_info(self, repo_id: str, revision: str) -> Any:
        files = self._revision(repo_id, revision)[2]
        form = parse_qs(self.body.decode())
        asked = form["paths"] if form else json.loads(self.body)["paths"]
        return [{"type": "file", **blob_info(path, files[path])} for path in asked if path in files]

    def resolve(self, repo_id: str, revision: str, path: str) -> Any:
        _, sha, files = self._revision(repo_id, revision)
        if path not in files:
            raise Refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=sha)
        data = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob_info(path, data)["etag"]}"'}
        headers["Accept-Ranges"] = "bytes"
        status, start, stop = 200, 0, len(data)
        if asked := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first, last = asked.groups()
            status, start = 206, int(first) if first else max(stop - int(last), 0)
            stop = min(stop, int(last) + 1) if first and last else stop
            if start >= stop:
                raise Refusal(416, "No such range", Content_Range=f"bytes */{len(data)}")
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        cut = self.hub._cut is not None and self.hub._cut in f"{repo_id}/{path}"
        sent = max(0, len(data) // 2 - start) if cut else None
        return Reply(status, data[start:stop], headers, sent)

    def preupload(self, repo_id: str, revision: str) -> Any:
        self._repo(repo_id, write=True)
        present = self._revision(repo_id, revision)[2]
        files = []
        for file in json.loads(self.body)["files"]:
            path, sample = file["path"], base64.b64decode(file["sample"])
            mode = "lfs" if is_lfs(path, file["size"], sample) else "regular"
            # By this the client leaves files that have not changed out of the commit
            oid = blob_info(path, present[path])["etag"] if path in present else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": files}

    def lfs_batch(self, repo_id: str) -> Any:
        repo = self._repo(repo_id, write=True)
        objects = json.loads(self.body)["objects"]
        for wanted in objects:
            if wanted["oid"] not in repo.blobs:
                # The client sends no token along with the file
                ticket = secrets.token_hex()
                self.hub.tickets[ticket] = (repo, wanted["oid"])
                wanted["actions"] = {"upload": {"href": f"{self.hub.url}/upload/{ticket}"}}
        return {"transfer": "basic", "objects": objects}

    def upload(self, ticket: str) -> Any:
        repo, oid = self.hub.tickets[ticket]
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "The content has not the SHA-256 that was announced")
        repo.blobs[oid] = self.body
        return {}

    def commit(self, repo_id: str, revision: str) -> Any:
        repo = self._repo(repo_id, write=True)
        if revision != "main" or "create_pr" in self.query:
            raise Refusal(404, "The loopback hub has the branch main only", "RevisionNotFound")
        files = dict(repo.commits[repo.sha])
        for line in self.body.splitlines():
            operation = json.loads(line)
            kind, value = operation["key"], operation["value"]
            path = value.get("path", "")
            if kind == "header":
                if not repo.sha.startswith(value.get("parentCommit", "")):
                    raise Refusal(412, "The parent commit is not the newest one")
            elif kind == "file":
                files[path] = base64.b64decode(value["content"])
            elif kind == "lfsFile" and value["oid"] in repo.blobs:
                files[path] = repo.blobs[value["oid"]]
            elif kind == "deletedFolder":
                prefix = path.rstrip("/") + "/"
                files = {name: files[name] for name in files if not name.startswith(prefix)}
            elif kind == "deletedFile":
                if files.pop(path, None) is None:
                    raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            else:
                raise Refusal(400, f"Cannot commit {kind} {path}")
        repo.commit(files)
        return {"commitOid": repo.sha, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{repo.sha}"}


_REPO, _NAME, _REST, _KIND = "([^/]+/[^/]+)", "([^/]+)", "(.+)", "(?:models|datasets)"
ROUTES = [
    ("GET", f"/(?:datasets/)?{_REPO}/resolve/{_NAME}/{_REST}", _Handler.resolve),
    ("GET", f"/api/{_KIND}/{_REPO}", _Handler.info),
    ("GET", f"/api/{_KIND}/{_REPO}/revision/{_NAME}", _Handler.info),
    ("GET", f"/api/{_KIND}/{_REPO}/tree/{_NAME}(?:/{_REST})?", _Handler.tree),
    ("POST", f"/api/{_KIND}/{_REPO}/paths-info/{_NAME}", _Handler.paths_info),
    ("POST", f"/api/models/{_REPO}/preupload/{_NAME}", _Handler.preupload),
    ("POST", f"/api/models/{_REPO}/commit/{_NAME}", _Handler.commit),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", f"/upload/{_NAME}", _Handler.upload),
    ("POST", "/api/repos/create", _Handler.create),
    ("DELETE", "/api/repos/delete", _Handler.delete),
    ("POST", "/api/validate-yaml", lambda handler: {"errors": [], "warnings": []}),
    ("GET", "/api/whoami-v2", _Handler.whoami),
]
