"""A local HTTP server that keeps what it is sent, as JSON."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Receiver:
    """What came to a path, and how it answers."""

    port: int
    received: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    refusing: bool = False

    def url(self, path: str) -> str:
        """As Apprise has it."""
        return f"json://user:secret@127.0.0.1:{self.port}/{path}"

    def messages(self, path: str) -> list[str]:
        """The lines that were sent to a path."""
        return [content["message"] for place, content in self.received if place == f"/{path}"]


@contextmanager
def receiving() -> Iterator[Receiver]:
    """A receiver on loopback while the context lasts."""
    receiver = Receiver(0)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not receiver.refusing:
                receiver.received.append((self.path.rstrip("/"), content))
            self.send_response(500 if receiver.refusing else 200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        receiver.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            thread.join()
