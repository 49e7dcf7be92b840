"""The Hub, as two servers on the loopback: one for lists and small files, one for large files. They fail when told to."""

import hashlib
import json
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
from huggingface_hub import constants

ROOT = Path(__file__).parents[1]
NAME = "me/model"
Fault = dict[str, Any]


def is_lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".parquet"))


def digest(content: bytes, lfs: bool) -> str:
    """The sha256 of the content, or what `git hash-object` says."""
    if lfs:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content), usedforsecurity=False).hexdigest()


@dataclass
class FakeHub:
    """A Hub with one repository, of a model or a data set.

    Attributes:
        names: of the repository; the first is the one that the Hub itself calls it.
        commits: its files at each commit; `refs` say which commit a branch is at.
        faults: what goes wrong at the next requests for a file, or for "api"; `always`, at all of them.
        asked: method, path and headers of each request; those to the server of large files have `/cdn/` in their path.
        after: called when a file was sent.
        go_on: what a stalled answer waits for.
    sent: bytes that were taken of an endless answer.
    pauses: what the client would have waited.
    """

    names: tuple[str, ...] = (NAME, "openai-community/gpt2")
    url: str = ""
    cdn: str = ""
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    always: dict[str, Fault] = field(default_factory=dict)
    asked: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)
    after: Callable[[str], None] = lambda name: None
    go_on: threading.Event = field(default_factory=threading.Event)
    sent: int = 0
    pauses: list[float] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], *, branch: str = "main") -> str:
        commit = digest(repr(files).encode(), lfs=False)
        self.commits[commit], self.refs[branch] = files, commit
        return commit

    def fault(self, name: str) -> Fault:
        waiting = self.faults.get(name)
        return waiting.pop(0) if waiting else self.always.get(name, {})

    def got(self) -> list[str]:
        """The names of the files that were asked for, at the place that has them."""
        paths = [path for method, path, _ in self.asked if method == "GET"]
        return [
            name
            for path in paths
            for name in [path.rpartition("/")[2]]
            if ("/cdn/" if is_lfs(name) else "/resolve/") in path
        ]


class Handler(BaseHTTPRequestHandler):
    """Speaks what huggingface_hub understands: the list of a revision, and files behind /resolve/, large ones elsewhere."""

    server: "Server"

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        fake, path = self.server.hub, unquote(urlsplit(self.path).path)
        fake.asked.append((self.command, path, {key.lower(): value for key, value in self.headers.items()}))
        listed, _, revision = path.partition("/revision/")
        match listed.removeprefix("/datasets").strip("/").split("/"):
            case ["api", "models" | "datasets", *name] if "/".join(name) in fake.names:
                fault = fake.fault("api")
                revision = revision or "main"
                commit = fake.refs.get(revision, revision)
                if commit not in fake.commits:
                    return self.answer({}, 404, b"no such revision")
                self.answer(fault, 200, json.dumps(self.listing(commit) | fault.get("listing", {})).encode())
            case [owner, name, "resolve", revision, *inside] if f"{owner}/{name}" in fake.names:
                file = "/".join(inside)
                commit = fake.refs.get(revision, revision)
                content = fake.commits[commit].get(file)
                if content is None:
                    return self.answer({}, 404, b"no such file")
                lfs, mark = is_lfs(file), digest(content, is_lfs(file))
                headers = {"X-Repo-Commit": commit, "ETag": f'"{mark}"'}
                if lfs:
                    headers |= {"X-Linked-Etag": f'"{mark}"', "X-Linked-Size": str(len(content))}
                    headers |= {"Location": f"{fake.cdn}/cdn/{commit}/{file}"}
                self.answer({} if lfs else fake.fault(file), 302 if lfs else 200, b"" if lfs else content, headers)
                fake.after(file)
            case ["cdn", commit, *inside]:
                file = "/".join(inside)
                self.answer(fake.fault(file), 200, fake.commits[commit][file])
                fake.after(file)
            case _:
                self.answer({}, 401, b"who are you?")

    def listing(self, commit: str) -> dict[str, Any]:
        def entry(name: str, content: bytes) -> dict[str, Any]:
            pointer = {"lfs": {"sha256": digest(content, True), "size": len(content), "pointerSize": 130}}
            found = {"rfilename": name, "size": len(content), "blobId": digest(content, False)}
            return found | (pointer | {"blobId": "0" * 40} if is_lfs(name) else {})

        files = [entry(name, content) for name, content in self.server.hub.commits[commit].items()]
        return {
            "_id": "1",
            "id": self.server.hub.names[0],
            "sha": commit,
            "private": False,
            "siblings": files,
            "tags": [],
        }

    def answer(self, fault: Fault, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        fake, headers = self.server.hub, headers or {}
        if "drop" in fault:
            self.close_connection = True
            return
        if "status" in fault:
            status, content, headers = fault["status"], b"no", fault.get("headers", {})
        content = fault.get("content", lambda content: content)(content)
        start = 0
        if status == 200 and "Range" in self.headers and "no ranges" not in fault:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            headers = headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
            status, content = (206, content[start:]) if start < len(content) else (416, b"")
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(fault.get("length", len(content))))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: fault.get("cut", len(content))])
        self.wfile.flush()
        for _ in range(0, fault.get("length", 0), 2**20):
            self.wfile.write(bytes(2**20))
            fake.sent += 2**20
        if "stall" in fault:
            fake.go_on.wait()

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class Server(ThreadingHTTPServer):
    hub: FakeHub

    def handle_error(self, *_: Any) -> None:
        """Nothing: the clients here go away in the middle."""


def child_environment(fake: FakeHub, home: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
    ours = {"HF_ENDPOINT": fake.url, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_XET": "1"}
    ours |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), *sys.path])}
    return kept | ours


@contextmanager
def serving(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[FakeHub]:
    """A Hub that this process takes for the real one; `cache`: where the library keeps what it downloads."""
    fake, servers = FakeHub(), [Server(("127.0.0.1", 0), Handler) for _ in range(2)]
    for server in servers:
        server.hub = fake
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    fake.url, fake.cdn = f"http://127.0.0.1:{servers[0].server_port}", f"http://localhost:{servers[1].server_port}"
    changes = {
        "ENDPOINT": fake.url,
        "HF_HUB_CACHE": str(cache),
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_TELEMETRY": True,
    }
    changes |= {"HF_HUB_DISABLE_PROGRESS_BARS": True, "HF_TOKEN_PATH": str(cache / "none"), "HF_HUB_DISABLE_XET": True}
    for name, value in changes.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield fake
    fake.go_on.set()
    for server in servers:
        server.shutdown()
        server.server_close()
