"""A small HTTP proxy in front of an S3 server that fails in the ways in which object stores fail. On loopback."""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_ANSWERS = {
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "403": (403, "InvalidAccessKeyId"),
    "no bucket": (404, "NoSuchBucket"),
    "skewed clock": (403, "RequestTimeTooSkewed"),
}
FAULTS = (*_ANSWERS, "reset", "refused", "hang", "wrong bytes", "cut")


class FaultyS3:
    """The proxy. `fault` names what the next requests meet; None: they pass.

    Args:
        endpoint: URL of the server behind it.
    """

    def __init__(self, endpoint: str) -> None:
        parts = urlsplit(endpoint)
        self.behind = (parts.hostname or "", parts.port or 80)
        self.fault: str | None = None
        self.trigger: tuple[str, str] | None = None
        """What a request's path has to contain for a fault to begin with it, and the fault."""
        self.failed = threading.Semaphore(0)
        """Released at each request that has met the fault; a refused one cannot be seen."""
        self.healed = threading.Event()
        self._server: _Server | None = None
        self.port = 0
        self._listen()

    @property
    def url(self) -> str:
        """The endpoint that clients use."""
        return f"http://127.0.0.1:{self.port}"

    def fail(self, fault: str) -> None:
        """From now on, requests fail in this way."""
        self.healed.clear()
        self.fault = fault
        if fault == "refused":
            self.close()

    def heal(self) -> None:
        """From now on, requests pass."""
        refused = self.fault == "refused"
        self.fault = None
        self.healed.set()
        if refused:
            self._listen()

    def close(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._server = None

    def _listen(self) -> None:
        proxy = self

        class Handler(_Handler):
            owner = proxy

        self._server = _Server(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: clients that are killed hang up."""


class _Handler(BaseHTTPRequestHandler):
    owner: FaultyS3
    protocol_version = "HTTP/1.1"

    def _serve(self) -> None:
        owner = self.owner
        if self.headers.get("Expect"):
            self.send_response_only(100)
            self.end_headers()
        body = self._body()
        if owner.trigger and owner.trigger[0] in self.path:
            owner.fault = owner.trigger[1]
        fault = owner.fault
        if fault in _ANSWERS:
            self._refuse(*_ANSWERS[fault])
        elif fault == "hang":
            owner.failed.release()
            owner.healed.wait(60)
            self.close_connection = True
        elif fault in ("reset", "refused"):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            owner.failed.release()
        else:
            self._forward(body, fault)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = _serve

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _refuse(self, status: int, code: str) -> None:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>by the test</Message></Error>".encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(text)
        self.owner.failed.release()

    def _forward(self, body: bytes, fault: str | None) -> None:
        connection = http.client.HTTPConnection(*self.owner.behind, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
        headers["Content-Length"] = str(len(body))
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        self.send_response_only(answer.status)
        hidden = {"transfer-encoding", "connection", "content-length"}
        for name, value in answer.getheaders():
            # Damage on the way is what a digest of the store's own would tell.
            if name.lower() not in hidden and not (fault and name.lower().startswith("x-amz-checksum")):
                self.send_header(name, value)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
        self.send_header("Content-Length", length or "0")
        self.end_headers()
        connection.close()
        self._answer(content, fault)

    def _answer(self, content: bytes, fault: str | None) -> None:
        if fault == "wrong bytes" and content:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 0x20]) + content[middle + 1 :]
        if fault == "cut" and content:
            content, self.close_connection = content[: len(content) // 2], True
        self.wfile.write(content)
        if fault:
            self.owner.failed.release()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: tests read their own output."""


@contextmanager
def faulty_s3(endpoint: str) -> Iterator[FaultyS3]:
    """A proxy in front of an endpoint, while the block lasts."""
    proxy = FaultyS3(endpoint)
    try:
        yield proxy
    finally:
        proxy.healed.set()
        proxy.close()
