"""What is taken for a URL, and what it becomes."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.utils.errors import UsageError
from pipelines.utils.location import Url, location, url_of


@pytest.mark.parametrize(
    "given",
    ["S3://Bucket/Data/", Path("S3://Bucket/Data"), "s3://Bucket/Data", "s3:/Bucket/Data"],
)
def test_a_scheme_may_be_written_in_capitals_or_with_one_slash(given):
    for found in (location(given), url_of(given)):
        assert isinstance(found, Url)
        assert (found, found.scheme) == ("s3://Bucket/Data", "s3")


@pytest.mark.parametrize(
    "given", ["s3://key:secret@buck[et/x", "https://key:secret@exa\u2100mple.com/x"]
)
def test_what_is_no_url_is_said_without_what_may_be_a_password(given):
    with pytest.raises(UsageError, match=r"^(s3|https)://\.\.\.: its host is not valid; ") as end:
        location(given)
    assert "secret" not in str(end.value)
