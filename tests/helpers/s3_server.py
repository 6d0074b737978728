"""An S3 server on localhost (moto's), with faults in between that a test asks for."""

from __future__ import annotations

import functools
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable
from typing import Any

import boto3
import botocore.session
from botocore.config import Config
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import WSGIRequestHandler, make_server

from tests.helpers.storage_server import Fault as Fault
from tests.helpers.storage_server import Faults

BUCKET = "bucket"
_Start = Callable[..., Any]

# Each file system that a test opens would read botocore's description of S3 anew, for 0.15 s.
botocore.session.create_loader = functools.cache(botocore.session.create_loader)


class _Silent(WSGIRequestHandler):
    def log(self, *_: object) -> None: ...


class S3Server:
    """A bucket of its own, one server at a time in a process.

    requests: (method, path with the query) of all, in their order.
    """

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server(
            "127.0.0.1", 0, self._answer, threaded=True, request_handler=_Silent
        )
        self.faults = Faults()
        self.requests: list[tuple[str, str]] = []
        self.url = f"http://127.0.0.1:{self._server.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.client = boto3.client(
            "s3",
            endpoint_url=self.url,
            region_name="us-east-1",
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
            config=Config(retries={"max_attempts": 1}),
        )

    def reset(self) -> None:
        """Begin anew, with an empty bucket."""
        self.faults.clear()
        reset = urllib.request.Request(f"{self.url}/moto-api/reset", method="POST")
        urllib.request.urlopen(reset, timeout=30).close()  # what moto keeps belongs to the process
        self.client.create_bucket(Bucket=BUCKET)
        self.requests.clear()

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find it: nothing but the usual variables."""
        return {
            "AWS_ENDPOINT_URL": self.url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }

    def put(self, key: str, data: bytes) -> str:
        """Store an object; return its URL."""
        self.client.put_object(Bucket=BUCKET, Key=key, Body=data)
        return f"s3://{BUCKET}/{key}"

    def get(self, key: str) -> bytes:
        """Return an object's bytes."""
        data: bytes = self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        return data

    def keys(self) -> list[str]:
        """Return the keys of all objects, sorted."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET)
        return sorted(item["Key"] for page in pages for item in page.get("Contents", []))

    def stop(self) -> None:
        """End the server; an answer that waits is not waited for."""
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, environ: dict[str, Any], start_response: _Start) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        query = environ.get("QUERY_STRING")
        self.requests.append((method, f"{path}?{query}" if query else path))
        fault = self.faults.take(method, path)
        if fault is None:
            answer: Iterable[bytes] = self._app(environ, start_response)
            return answer
        time.sleep(fault.delay)
        if fault.status is not None:
            start_response(f"{fault.status} Fault", [("Content-Length", "0")])
            return []
        body = b"".join(self._app(environ, start_response))
        return [body if fault.cut is None else body[: fault.cut]]
