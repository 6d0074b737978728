"""The kinds of object storage: S3, web servers, and whatever else fsspec reads."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import os
from collections.abc import AsyncGenerator
from typing import Any

from pipelines.sources.location import SCHEMES, Url
from pipelines.sources.remote import CHUNK, CONNECTIONS, STALL, Changed, Remote, RemoteObject
from pipelines.utils.errors import UsageError


def remote_of(url: str) -> Remote:
    """Return what reads a URL. Raises ModuleNotFoundError for a library that is not installed."""
    scheme = Url(url).scheme
    importlib.import_module(SCHEMES[scheme])
    known = ("AWS_", "FSSPEC_", "GOOGLE_", "HF_")
    return _opened(scheme, frozenset(one for one in os.environ.items() if one[0].startswith(known)))


@functools.lru_cache(maxsize=4)  # a client of S3 takes 0.3 s to make
def _opened(scheme: str, _environment: frozenset[tuple[str, str]]) -> Remote:
    return {"s3": S3, "http": Http, "https": Http}.get(scheme, Remote)(scheme)


class S3(Remote):
    """S3, by s3fs: each request says which ETag it expects."""

    def _open(self) -> Any:
        import s3fs

        # Tries are counted here, so that they are bounded, and each is one request.
        config = {
            "retries": {"total_max_attempts": 1},
            "connect_timeout": STALL / 3,
            "read_timeout": STALL,
            "max_pool_connections": 2 * CONNECTIONS,
        }
        found = s3fs.S3FileSystem(
            config_kwargs=config, use_listings_cache=False, skip_instance_cache=True
        )
        found.retries = 1
        return found

    async def chunks(self, item: RemoteObject, start: int, stop: int) -> AsyncGenerator[bytes]:
        part = {"Range": f"bytes={start}-{stop - 1}", "IfMatch": item.tag}
        with contextlib.closing(await self._get(item.url, **part)) as body:
            while chunk := await asyncio.wait_for(body.read(CHUNK), STALL):
                yield chunk

    async def _whole(self, url: str) -> bytes | None:
        try:
            with contextlib.closing(await self._get(url)) as body:
                data: bytes = await asyncio.wait_for(body.read(), STALL)
                return data
        except FileNotFoundError:
            return None

    async def _get(self, url: str, **more: str) -> Any:
        bucket, key, _ = self.fs.split_path(url)
        answer = await self.fs._call_s3(
            "get_object", Bucket=bucket, Key=key, **more, **self.fs.req_kw
        )
        return answer["Body"]

    async def _require_same(self, item: RemoteObject) -> None:
        pass  # each request has asked for it


class Http(Remote):
    """A web server, which cannot list; by aiohttp's session of fsspec's."""

    def __init__(self, scheme: str) -> None:
        super().__init__(scheme)
        self.writes = False

    def _open(self) -> Any:
        import fsspec

        # trust_env: proxies by the usual variables, passwords by ~/.netrc.
        return fsspec.filesystem(
            "http", client_kwargs={"trust_env": True}, skip_instance_cache=True
        )

    def _path(self, url: str) -> Any:
        return url

    @contextlib.asynccontextmanager
    async def _get(self, url: str, **headers: str) -> AsyncGenerator[Any]:
        import aiohttp

        session = await self.fs.set_session()
        limits = aiohttp.ClientTimeout(total=None, sock_connect=STALL / 3, sock_read=STALL)
        headers["Accept-Encoding"] = "identity"
        async with session.get(url, headers=headers, timeout=limits) as answer:
            answer.raise_for_status()
            yield answer

    async def _listed(self, patterns: list[str]) -> list[list[RemoteObject]]:
        magic = next((one for one in patterns if set(one) & set("*[")), None)
        if magic is not None:
            raise UsageError(
                f"{magic}: a web server cannot list its files; give their numbers, as {{000000..000146}}"
            )
        return [*await asyncio.gather(*map(self._asked_for, patterns))]

    async def _asked_for(self, url: str) -> list[RemoteObject]:
        async def attempt() -> list[RemoteObject]:
            import aiohttp

            try:
                async with self._get(url, Range="bytes=0-0") as answer:
                    by_range = answer.status == 206
                    size = (
                        answer.headers["Content-Range"].rpartition("/")[2]
                        if by_range
                        else answer.headers["Content-Length"]
                    )
                    return [RemoteObject(url, int(size), _tag(answer), by_range)]
            except aiohttp.ClientResponseError as error:
                if error.status == 404:
                    return []
                raise
            except (KeyError, ValueError):
                raise UsageError(f"{url}: the server does not say how long it is") from None

        return await self.retried(url, attempt)

    async def _whole(self, url: str) -> bytes | None:
        import aiohttp

        try:
            async with self._get(url) as answer:
                data: bytes = await answer.read()
                return data
        except aiohttp.ClientResponseError as error:
            if error.status in (
                403,
                404,
                410,
            ):  # what is not there may be told as what may not be seen
                return None
            raise

    async def chunks(self, item: RemoteObject, start: int, stop: int) -> AsyncGenerator[bytes]:
        headers = {"Range": f"bytes={start}-{stop - 1}"} if item.by_range else {}
        async with self._get(item.url, **headers) as answer:
            if _tag(answer) != item.tag:
                raise Changed
            if item.by_range and answer.status != 206:
                raise ConnectionError("the server answered with another range")
            async for chunk in answer.content.iter_chunked(CHUNK):
                yield chunk

    async def _require_same(self, item: RemoteObject) -> None:
        pass  # each answer says which it is of


def _tag(answer: Any) -> str:
    found: str = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
    return found
