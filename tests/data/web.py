"""A web server on the loopback that has one file, and fails when it is told to: next time, or each time."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = dict[str, Any]
"""``status`` and ``headers`` in place of the file; ``cut``: bytes after which the line breaks; ``stall``: it is silent then;
``short``: it sends so many bytes less, and says so; ``no ranges``, ``no length``, ``from``: what it does not do, and where
its part begins instead; ``drop``: it says nothing at all."""


@dataclass
class Web:
    """What the server has, and what it was asked.

    Attributes:
        faults: of the next answers; `always`, of all others.
        versions: headers that say which content it is.
        asked: the headers of each request.
        sent: bytes that were taken of it.
    """

    content: bytes = b""
    url: str = ""
    faults: list[Fault] = field(default_factory=list)
    always: Fault = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=lambda: {"ETag": '"one"'})
    asked: list[dict[str, str]] = field(default_factory=list)
    sent: int = 0
    go_on: threading.Event = field(default_factory=threading.Event)


class Handler(BaseHTTPRequestHandler):
    server: "Server"
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        web = self.server.web
        web.asked.append({key.lower(): value for key, value in self.headers.items()})
        fault = web.faults.pop(0) if web.faults else web.always
        self.close_connection = True
        if "drop" in fault:
            return
        if "status" in fault:
            return self.answer(fault["status"], fault.get("headers", {}), b"no", {})
        start, headers = 0, dict(web.versions)
        same = self.headers.get("If-Range", "") in ("", *web.versions.values())
        if "Range" in self.headers and same and "no ranges" not in fault:
            start = fault.get("from", int(self.headers["Range"].removeprefix("bytes=").removesuffix("-")))
            if start >= len(web.content):
                return self.answer(416, {"Content-Range": f"bytes */{len(web.content)}"}, b"", {})
            headers["Content-Range"] = f"bytes {start}-{len(web.content) - 1}/{len(web.content)}"
        self.answer(206 if "Content-Range" in headers else 200, headers, web.content[start:], fault)

    def answer(self, status: int, headers: dict[str, str], content: bytes, fault: Fault) -> None:
        web, in_chunks = self.server.web, "no length" in fault
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        if in_chunks:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(len(content) - fault.get("short", 0)))
        self.end_headers()
        size = min(fault.get("cut", len(content)), len(content) - fault.get("short", 0))
        for at in range(0, size, 2**16):
            part = content[at : min(size, at + 2**16)]
            self.wfile.write(b"%x\r\n%s\r\n" % (len(part), part) if in_chunks else part)
            web.sent += len(part)
        self.wfile.write(b"0\r\n\r\n" if in_chunks and "cut" not in fault else b"")
        self.wfile.flush()
        if "stall" in fault:
            web.go_on.wait()

    def log_message(self, *_: Any) -> None:
        """Nothing."""


class Server(ThreadingHTTPServer):
    web: Web
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Nothing: the clients here go away in the middle."""


@contextmanager
def serving(content: bytes, path: str = "/books/text.txt") -> Iterator[Web]:
    """A server with a file at `path`; it has it at any other path, too."""
    web, server = Web(content), Server(("127.0.0.1", 0), Handler)
    server.web, web.url = web, f"http://127.0.0.1:{server.server_port}{path}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield web
    finally:
        web.go_on.set()
        server.shutdown()
        server.server_close()
