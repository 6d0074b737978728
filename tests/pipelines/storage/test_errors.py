"""What another try may mend, and when it is made."""

from __future__ import annotations

from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp.http_exceptions import ContentLengthError
from botocore.exceptions import ClientError

from pipelines.storage.errors import LONGEST_ASKED, asked_wait, is_final, status_of


def error_of(**attributes: object) -> Exception:
    error = Exception("x")
    for name, value in attributes.items():
        setattr(error, name, value)
    return error


def of_s3(status: int, headers: dict[str, str]) -> Exception:
    metadata = {"HTTPStatusCode": status, "HTTPHeaders": headers}
    return ClientError({"Error": {}, "ResponseMetadata": metadata}, "GetObject")


def test_a_body_that_is_cut_off_is_asked_for_again_though_aiohttp_calls_it_a_bad_request():
    error = aiohttp.ClientPayloadError("cut")
    error.__cause__ = ContentLengthError("received 2 of 3 bytes")
    assert status_of(error) is None
    assert not is_final(error)


def test_the_status_of_a_web_servers_answer_is_read_without_a_warning():
    assert (
        status_of(aiohttp.ClientResponseError(SimpleNamespace(real_url=""), (), status=404)) == 404
    )


@pytest.mark.parametrize(
    ("status", "final"), [(400, True), (404, True), (408, False), (429, False), (503, False)]
)
def test_a_clients_error_is_final_but_for_those_of_time_and_rate(status, final):
    for error in (of_s3(status, {}), error_of(status=status), error_of(code=status)):
        assert status_of(error) == status
        assert is_final(error) is final


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, 0),
        ({"retry-after": "7"}, 7),
        ({"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"}, 0),
        ({"ratelimit": '"resolvers";r=0;t=55'}, 55),
        ({"ratelimit": '"resolvers";r=12;t=55'}, 0),
        ({"retry-after": "99999"}, LONGEST_ASKED),
    ],
)
def test_a_storage_is_asked_again_when_it_says(headers, seconds):
    of_hub = error_of(response=SimpleNamespace(status_code=429, headers=headers))
    for error in (of_hub, of_s3(503, headers), error_of(headers=headers)):
        assert asked_wait(error) == seconds
