"""A W&B server on localhost: as much of its interface as a run needs, seen from W&B's own client.

What it assumes of the real one: the lines of a run's history are written at the offset that the client gives,
which a run that is not resumed counts from 0, and replace all that was there from that offset on.
"""

from __future__ import annotations

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class WandbServer(ThreadingHTTPServer):
    """`mode`: "answers", "refuses" metrics, "closes" each connection, or "is silent"."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.mode = "answers"
        self.history: dict[str, list[dict[str, Any]]] = {}  # by run id
        self.config: dict[str, dict[str, Any]] = {}
        self.exit_codes: dict[str, int] = {}
        self.files: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self.shutdown()
        self.server_close()

    def metrics(self, run_id: str) -> list[dict[str, Any]]:
        """What was logged, without what W&B adds and the final table."""
        rows = [
            {k: v for k, v in row.items() if not k.startswith("_")} for row in self.history[run_id]
        ]
        return [row for row in rows if "step" in row]

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        run_id = variables.get("name")
        if "upsertBucket" in query:
            assert run_id
            self.history.setdefault(run_id, [])
            if variables["config"]:
                self.config[run_id] = json.loads(variables["config"])
            project = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "r", "name": run_id, "displayName": run_id, "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createRunFiles" in query:
            files = [{"name": n, "uploadUrl": f"{self.url}/upload/{n}"} for n in variables["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        if "historyTail" in query and run_id in self.history:
            lines = self.history[run_id]
            bucket = {"id": "r", "name": run_id, "wandbConfig": '{"t": 1}', "config": "{}"}
            bucket |= {"historyTail": json.dumps([json.dumps(line) for line in lines[-1:]])}
            bucket |= {"eventsTail": "[]", "summaryMetrics": "{}"}
            counts = {"historyLineCount": len(lines), "eventsLineCount": 0, "logLineCount": 0}
            return {"model": {"id": "p", "name": "p", "bucket": bucket | counts}}
        if "viewer" in query:
            return {"viewer": {"id": "u", "entity": "me", "username": "me", "teams": {"edges": []}}}
        if "artifactType" in query:
            return {"project": {"artifact": None}}
        if "createArtifact" in query:  # a table; one that is there already is not asked for
            self.files.add(variables["input"]["artifactCollectionName"])
            artifact = {
                "id": "a",
                "state": "COMMITTED",
                "artifactSequence": {"latestArtifact": None},
            }
            return {"createArtifact": {"artifact": artifact}}
        return {}

    def stream(self, run_id: str, content: dict[str, Any]) -> None:
        history = content.get("files", {}).get("wandb-history.jsonl")
        if history:
            lines = [json.loads(line) for line in history["content"]]
            self.history[run_id][history["offset"] :] = lines
        if content.get("complete"):
            self.exit_codes[run_id] = content["exitcode"]

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: WandbServer

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.server.mode == "is silent":
            time.sleep(300)
        if self.server.mode in ("is silent", "closes"):
            self.close_connection = True
            return
        status, answer = 200, {}
        if self.path == "/graphql":
            asked = json.loads(body)
            answer = {"data": self.server.graphql(asked["query"], asked.get("variables") or {})}
        elif self.path.endswith("/file_stream"):
            if self.server.mode == "refuses":
                status = 403
            else:
                self.server.stream(self.path.split("/")[-2], json.loads(body))
        elif self.path.startswith("/upload/"):
            self.server.files.add(self.path.removeprefix("/upload/"))
        else:
            status = 404
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_PUT = do_POST = _answer  # noqa: N815
