"""The kinds of object storage: S3, Google Cloud Storage, the Hugging Face hub, and web servers."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import importlib
import os
from collections.abc import AsyncGenerator
from typing import Any, ClassVar

from pipelines.storage import errors
from pipelines.storage.errors import Changed, status_of
from pipelines.storage.hub import Hub
from pipelines.storage.remote import CHUNK, CONNECTIONS, Remote, RemoteObject
from pipelines.utils.errors import UsageError
from pipelines.utils.location import SCHEMES, Url


def remote_of(url: str) -> Remote:
    """Return what reads a URL. Raises ModuleNotFoundError for a library that is not installed."""
    scheme = Url(url).scheme
    importlib.import_module(SCHEMES[scheme])
    known = ("AWS_", "FSSPEC_", "GOOGLE_", "HF_", "STORAGE_")
    return _opened(scheme, frozenset(one for one in os.environ.items() if one[0].startswith(known)))


@functools.lru_cache(maxsize=4)  # a client of S3 takes 0.3 s to make
def _opened(scheme: str, _environment: frozenset[tuple[str, str]]) -> Remote:
    kinds: dict[str, type[Remote]] = {"s3": S3, "gs": Gcs, "hf": Hub, "http": Http, "https": Http}
    return kinds[scheme](scheme)


class S3(Remote):
    """S3, by s3fs: each request says which ETag it expects."""

    sending: ClassVar = {"max_concurrency": 4}

    def _open(self) -> Any:
        import s3fs

        # Tries are counted by `retried`, so that they are bounded, and each is one request.
        config = {
            "retries": {"total_max_attempts": 1},
            "connect_timeout": errors.STALL / 3,
            "read_timeout": errors.STALL,
            "max_pool_connections": 2 * CONNECTIONS,
        }
        found = s3fs.S3FileSystem(
            config_kwargs=config, use_listings_cache=False, skip_instance_cache=True
        )
        found.retries = 1
        return found

    async def chunks(self, item: RemoteObject, start: int, stop: int) -> AsyncGenerator[bytes]:
        part = {"Range": f"bytes={start}-{stop - 1}"} if item.by_range else {}
        if item.tag:
            part["IfMatch"] = item.tag
        bucket, key, _ = self.fs.split_path(item.url)
        answer = await self.fs._call_s3(
            "get_object", Bucket=bucket, Key=key, **part, **self.fs.req_kw
        )
        with contextlib.closing(answer["Body"]) as body:
            while chunk := await asyncio.wait_for(body.read(CHUNK), errors.STALL):
                yield chunk


class Gcs(Remote):
    """Google Cloud Storage, by gcsfs: each request says which generation it expects."""

    tag = "generation"

    def _open(self) -> Any:
        import aiohttp
        from gcsfs.core import GCSFileSystem  # its heir asks by gRPC what kind of bucket it is

        class Once(GCSFileSystem):  # type: ignore[misc]
            """Makes a request once: tries are counted by `retried`."""

            _request = GCSFileSystem._request.__wrapped__

        limits = aiohttp.ClientTimeout(
            total=None, sock_connect=errors.STALL / 3, sock_read=errors.STALL
        )
        return Once(requests_timeout=limits, use_listings_cache=False, skip_instance_cache=True)

    async def chunks(self, item: RemoteObject, start: int, stop: int) -> AsyncGenerator[bytes]:
        from gcsfs.retry import validate_response

        fs, headers = self.fs, {}
        if item.by_range:
            headers["Range"] = f"bytes={start}-{stop - 1}"
        wanted = {"ifGenerationMatch": item.tag} if item.tag else {}
        session = await fs._set_session()
        url = fs.url(self._path(item.url))
        async with session.get(
            url,
            params=fs._get_params(wanted),
            headers=fs._get_headers(headers),
            timeout=fs.requests_timeout,
        ) as answer:
            if answer.status == 412:
                raise Changed
            if answer.status >= 400:
                validate_response(answer.status, await answer.read(), url)
            async for chunk in answer.content.iter_chunked(CHUNK):
                yield chunk

    def _is_final(self, error: Exception) -> bool:
        return super()._is_final(error) or _is_forbidden(error)

    def _explained(self, url: str, error: Exception) -> Exception:
        return super()._explained(url, PermissionError(error) if _is_forbidden(error) else error)


def _is_forbidden(error: Exception) -> bool:
    """Return whether it is gcsfs's error for the status 403."""
    return type(error) is OSError and str(error).startswith("Forbidden")


class Http(Remote):
    """A web server, which cannot list; by aiohttp's session of fsspec's."""

    def _open(self) -> Any:
        import fsspec

        # trust_env: proxies by the usual variables, passwords by ~/.netrc.
        return fsspec.filesystem(
            "http", client_kwargs={"trust_env": True}, skip_instance_cache=True
        )

    @contextlib.asynccontextmanager
    async def _get(self, url: str, **headers: str) -> AsyncGenerator[Any]:
        import aiohttp

        session = await self.fs.set_session()
        limits = aiohttp.ClientTimeout(
            total=None, sock_connect=errors.STALL / 3, sock_read=errors.STALL
        )
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

    def _is_missing(self, error: Exception) -> bool:
        # What is not there may be told as what may not be seen.
        return super()._is_missing(error) or status_of(error) == 403

    async def chunks(self, item: RemoteObject, start: int, stop: int) -> AsyncGenerator[bytes]:
        headers = {"Range": f"bytes={start}-{stop - 1}"} if item.by_range else {}
        async with self._get(item.url, **headers) as answer:
            if item.tag and _tag(answer) != item.tag:
                raise Changed
            if item.by_range and answer.status != 206:
                raise ConnectionError("the server answered with another range")
            async for chunk in answer.content.iter_chunked(CHUNK):
                yield chunk


def _tag(answer: Any) -> str:
    found: str = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
    return found
