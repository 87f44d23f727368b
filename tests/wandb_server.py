"""A stand-in for W&B's server on loopback: it keeps what `wandb` sends of each run, and says how far a run is."""

from __future__ import annotations

import gzip
import json
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

_PROJECT = {"id": "p", "name": "llemma-pretrain", "entity": {"id": "e", "name": "lab"}}


class WandbServer(ThreadingHTTPServer):
    """What arrived: by run its rows, group and kind."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.rows: dict[str, list[dict[str, Any]]] = defaultdict(list)
        self.described: dict[str, tuple[str, str]] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Connections end without farewell."""

    def answer(self, query: str, values: dict[str, Any]) -> dict[str, Any]:
        """The data of a GraphQL answer."""
        run = values.get("name") or values.get("run") or ""
        if "upsertBucket" in query:
            if values.get("groupName"):
                self.described[run] = (values["groupName"], values["jobType"])
            bucket = {"id": run, "name": run, "displayName": run, "historyLineCount": 0, "project": _PROJECT}
            return {"upsertBucket": {"bucket": bucket, "inserted": not self.rows[run]}}
        if "RunResumeStatus" in query:
            return {"model": {**_PROJECT, "bucket": self._progress(run) if run in self.rows else None}}
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/file"} for name in values["files"]]
            return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}
        if "viewer" in query:
            return {"viewer": {"id": "u", "entity": "lab", "username": "u", "flags": "{}", "teams": {"edges": []}}}
        return {"serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None, "features": []}}

    def _progress(self, run: str) -> dict[str, Any]:
        rows = self.rows[run]
        tail = json.dumps([json.dumps(row) for row in rows[-1:]])
        counts = {"historyLineCount": len(rows), "eventsLineCount": 0, "logLineCount": 0}
        empty = {"summaryMetrics": "{}", "eventsTail": "[]", "config": "{}", "tags": [], "wandbConfig": '{"t": 1}'}
        return {"id": run, "name": run, "displayName": run, "historyTail": tail, **counts, **empty}

    def stream(self, run: str, files: dict[str, Any]) -> None:
        """Take rows that begin at their offset."""
        if part := files.get("wandb-history.jsonl"):
            self.rows[run][part["offset"] :] = [json.loads(line) for line in part["content"]]


class _Handler(BaseHTTPRequestHandler):
    server: WandbServer

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/graphql":
            self._reply({"data": self.server.answer(body["query"], body["variables"] or {})})
        else:
            if self.path.endswith("/file_stream"):
                self.server.stream(self.path.split("/")[-2], body.get("files") or {})
            self._reply({"exitcode": None})

    def do_PUT(self) -> None:
        self._body()
        self._reply({})

    def _body(self) -> dict[str, Any]:
        content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            content = gzip.decompress(content)
        with suppress(ValueError):
            parsed: dict[str, Any] = json.loads(content)
            return parsed
        return {}

    def _reply(self, answer: dict[str, Any]) -> None:
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


@contextmanager
def wandb_server() -> Iterator[WandbServer]:
    """A running server."""
    with WandbServer() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
