"""A Hub of one process on loopback, as far as huggingface_hub's client needs it to create, upload and download model repositories.

    with HubServer() as hub: ...      hub.url, hub.token, hub.repos; HF_ENDPOINT or `hub_client` lead the client to it

It speaks the HTTP upload (LFS batch); the client must not take the xet protocol (HF_HUB_DISABLE_XET). Switches make it fail:
`answers` by status, `drops` by closing connections, `drop_uploads` within a file, `die_at` by going away for good.
"""

import hashlib
import json
import re
import socket
import threading
from base64 import b64decode
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlsplit

import huggingface_hub
import transformers.utils.hub
from huggingface_hub import constants
from huggingface_hub.utils import _http

import lemo_hf.hub.push

READ_TOKEN = "hf_of_a_reader"
_LARGE = (".safetensors", ".bin", ".pt", ".pth", ".png")
_REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
_ROUTES = {
    "whoami": ("GET", r"/api/whoami-v2"),
    "create": ("POST", r"/api/repos/create"),
    "validate": ("POST", r"/api/validate-yaml"),
    "preupload": ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)"),
    "batch": ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch"),
    "upload": ("PUT", r"/lfs/(?P<oid>\w+)"),
    "commit": ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)"),
    "tree": ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?"),
    "info": ("GET", rf"/api/models/{_REPO}(?:/revision/(?P<revision>[^/]+))?"),
    "resolve": ("GET", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)"),
}


@dataclass
class Repo:
    """A model repository: its last commit alone can be read."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)

    @property
    def sha(self) -> str:
        return hashlib.sha1(json.dumps([*self.files, *self.commits]).encode()).hexdigest()


class HubServer:
    """The server, running inside `with`.

    Args:
        token: What the user "me" logs in with.
    """

    def __init__(self, token: str = "hf_secret_of_me") -> None:
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: Counter[str] = Counter()
        self.unknown: list[str] = []
        self.answers: dict[str, int] = {}
        self.drops: Counter[str] = Counter()
        self.drop_uploads: list[int] = []
        self.die_at: str | None = None
        self.lock = threading.Lock()
        hub = self

        class Handler(_Handler):
            server_of = hub

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.http.shutdown()
        self.http.server_close()


class _Drop(Exception):
    """Close the connection without an answer."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: HubServer

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_HEAD(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PUT(self) -> None:
        self._serve("PUT")

    def _serve(self, method: str) -> None:
        hub, path = self.server_of, unquote(urlsplit(self.path).path)
        matches = ((name, re.fullmatch(pattern, path)) for name, (verb, pattern) in _ROUTES.items() if verb == method)
        name, found = next(((name, match) for name, match in matches if match), (None, None))
        try:
            if name is None or found is None:
                hub.unknown.append(f"{method} {path}")
                self._answer(404, {"error": "no such route"})
                return
            with hub.lock:
                hub.requests[name] += 1
                if hub.die_at == name:
                    hub.http.socket.close()
                    hub.drops[name] += 1
                if hub.drops[name] > 0:
                    hub.drops[name] -= 1
                    raise _Drop
            body = self._body(name)
            if name in hub.answers:
                # As some servers do, it quotes what it was sent.
                self._answer(hub.answers[name], {"error": f"refused: {self.headers.get('Authorization')}"})
                return
            with hub.lock:
                getattr(self, f"_{name}")(body, **found.groupdict())
        except _Drop:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)

    def _body(self, name: str) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        if name == "upload" and self.server_of.drop_uploads:
            self.rfile.read(min(length, self.server_of.drop_uploads.pop(0)))
            raise _Drop
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(length)

    def _answer(self, status: int, content: Any, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for header, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(header.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # Who may do what.

    def _role(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return {self.server_of.token: "write", READ_TOKEN: "read"}.get(token)

    def _writes(self, repo: str) -> bool:
        role = self._role()
        if role is None:
            self._answer(401, {"error": "Invalid username or password."})
        elif role == "read" or not repo.startswith("me/"):
            self._answer(403, {"error": "You don't have the rights"})
        else:
            return True
        return False

    def _readable(self, repo: str) -> Repo | None:
        found = self.server_of.repos.get(repo)
        if found is None or (found.private and self._role() is None):
            self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        return found

    # Routes.

    def _whoami(self, body: bytes) -> None:
        role = self._role()
        if role is None:
            self._answer(401, {"error": "Invalid user token"})
        else:
            self._answer(200, {"name": "me", "orgs": [], "auth": {"type": "access_token", "accessToken": {"role": role}}})

    def _create(self, body: bytes) -> None:
        wanted = json.loads(body)
        repo = f"{wanted['organization'] or 'me'}/{wanted['name']}"
        if not self._writes(repo):
            return
        if repo in self.server_of.repos:
            self._answer(409, {"error": "You already created this model repo", "url": f"{self.server_of.url}/{repo}"})
            return
        self.server_of.repos[repo] = Repo(wanted.get("visibility") == "private" or wanted.get("private") is True)
        self._answer(200, {"url": f"{self.server_of.url}/{repo}", "name": repo})

    def _validate(self, body: bytes) -> None:
        content = json.loads(body)["content"]
        faults = [] if content.startswith("---\n") else [{"message": "no metadata"}]
        self._answer(400 if faults else 200, {"errors": faults, "warnings": []})

    def _preupload(self, body: bytes, repo: str, revision: str) -> None:
        if not self._writes(repo) or (found := self._readable(repo)) is None:
            return
        files = []
        for each in json.loads(body)["files"]:
            path, mode = each["path"], "lfs" if each["path"].endswith(_LARGE) else "regular"
            oid = _oid(found.files[path], mode) if path in found.files else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self._answer(200, {"files": files})

    def _batch(self, body: bytes, repo: str) -> None:
        if not self._writes(repo):
            return
        objects = []
        for each in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.server_of.url}/lfs/{each['oid']}"}}
            objects.append({**each, **({} if each["oid"] in self.server_of.objects else {"actions": upload})})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def _upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self._answer(400, {"error": "content is not what was announced"})
            return
        self.server_of.objects[oid] = body
        self._answer(200, {})

    def _commit(self, body: bytes, repo: str, revision: str) -> None:
        if not self._writes(repo) or (found := self._readable(repo)) is None:
            return
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                found.commits.append(value["summary"])
            elif entry["key"] == "file":
                found.files[value["path"]] = b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                found.files[value["path"]] = self.server_of.objects[value["oid"]]
            elif entry["key"] == "deletedFile":
                del found.files[value["path"]]
        self._answer(200, {"commitUrl": f"{self.server_of.url}/{repo}/commit/{found.sha}", "commitOid": found.sha})

    def _tree(self, body: bytes, repo: str, revision: str, folder: str | None = None) -> None:
        if (found := self._readable(repo)) is None:
            return
        files = [
            {"type": "file", "path": path, "size": len(data), "oid": _oid(data, "regular")}
            for path, data in found.files.items()
            if folder is None or path.startswith(f"{folder}/")
        ]
        if folder is not None and not files:
            self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return
        self._answer(200, files)

    def _info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        if (found := self._readable(repo)) is not None:
            siblings = [{"rfilename": path} for path in found.files]
            self._answer(200, {"id": repo, "sha": found.sha, "private": found.private, "siblings": siblings, "tags": []})

    def _resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        if (found := self._readable(repo)) is None:
            return
        if path not in found.files:
            self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", X_Repo_Commit=found.sha)
            return
        data = found.files[path]
        self._answer(200, data, X_Repo_Commit=found.sha, ETag=f'"{_oid(data, "lfs")}"')


def _oid(data: bytes, mode: str) -> str:
    # As the client compares them: the content's sha256 for a large file, git's blob hash for others.
    return hashlib.sha256(data).hexdigest() if mode == "lfs" else hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def hub_client(monkeypatch: Any, hub: HubServer, token: str | None) -> None:
    """Leads the client of this process to `hub`, logged in by `token`, without waiting between its retries.

    The client reads its settings when it is imported, so their values are replaced and not the environment.
    """
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    if token is None:
        monkeypatch.delenv("HF_TOKEN", raising=False)
    else:
        monkeypatch.setenv("HF_TOKEN", token)
    at_once = SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr(_http, "time", at_once)
    monkeypatch.setattr(lemo_hf.hub.push, "time", at_once)
    _http.close_session()


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path in it."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def require_no_token(hub: HubServer, caplog: Any, capfd: Any, *folders: Path) -> None:
    """The token is in no log, no output, no local file and no file on the Hub; logs are those of every logger at every level."""
    shown = capfd.readouterr()
    for text in (shown.out, shown.err, caplog.text):
        assert hub.token not in text
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if hub.token.encode() in path.read_bytes()]
    assert not [name for repo in hub.repos.values() for name, data in repo.files.items() if hub.token.encode() in data]
