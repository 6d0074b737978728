"""GET /metrics: what is counted, as Prometheus' own parser reads it."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rsnet.serving import upload
from tests.helpers.servers import connect, encoded, photo, request_head, serving, until

PHOTO = encoded(photo(1))


def _samples(client) -> dict[tuple[str, ...], float]:
    """By name and labels, in the order of their names, but for buckets and times of creation."""
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
        if not sample.name.endswith(("_bucket", "_created"))
    }


@pytest.fixture
def counted(loaded):
    """A client of a server that has answered nothing yet."""
    with serving(loaded, batch_size=1) as client:
        yield client


def test_requests_are_counted_by_path_and_status(counted):
    for query in ("?size=48", "?size=48", "?size=1"):
        counted.post(f"/classify{query}", content=PHOTO)
    counted.post("/classify", content=b"no image")
    for path in ("/health", "/", "/app.js", "/nothing/of/ours"):
        counted.get(path)
    found = _samples(counted)
    requests = {key[1:]: n for key, n in found.items() if key[0] == "rsnet_requests_total"}
    assert requests == {
        ("200", "/classify"): 2, ("422", "/classify"): 1, ("415", "/classify"): 1,
        ("200", "/health"): 1, ("200", "page"): requests["200", "page"],
        ("404", "page"): requests["404", "page"],
    }  # fmt: skip
    assert requests["200", "page"] + requests["404", "page"] == 3
    assert found["rsnet_request_seconds_count", "/classify"] == 4
    assert 0 < found["rsnet_request_seconds_sum", "/classify"] < 60


def test_the_sizes_that_decide_and_those_that_are_computed_are_counted(counted):
    counted.post("/classify?size=48", content=PHOTO)
    counted.post("/classify?confidence=1", content=PHOTO)  # through all sizes, up to the largest
    counted.post("/compare", content=PHOTO)
    found = _samples(counted)
    decided, images, batches = (
        {size: found[name, size] for size in ("64", "48", "32")}
        for name in ("rsnet_decided_total", "rsnet_images_total", "rsnet_batch_seconds_count")
    )
    assert decided == {"64": 1, "48": 1, "32": 0}
    assert images == batches == {"64": 2, "48": 3, "32": 2}
    assert found["rsnet_batch_seconds_sum", "64"] > 0


def test_the_requests_under_way_are_those_that_wait(classifier, gate, pool):
    with serving(classifier, batch_size=1) as client:
        waits = [pool.submit(client.post, "/classify", content=PHOTO) for _ in range(3)]
        assert gate.entered.wait(30)
        while _samples(client)["rsnet_requests_under_way",] < 3:
            pass
        gate.is_open.set()
        assert [one.result().status_code for one in waits] == [200] * 3
        assert _samples(client)["rsnet_requests_under_way",] == 0


def test_another_hosts_page_is_refused_and_counted(counted):
    assert counted.get("/metrics", headers={"host": "evil.example"}).status_code == 400
    assert _samples(counted)["rsnet_requests_total", "400", "/metrics"] == 1


def test_what_its_client_has_left_is_counted_as_that(classifier, gate, pool):
    with serving(classifier, batch_size=1) as client:
        first = pool.submit(client.post, "/classify", content=PHOTO)
        assert gate.entered.wait(30)
        with connect(client) as computing, connect(client) as sending:
            computing.sendall(request_head(len(PHOTO)) + PHOTO)
            sending.sendall(request_head(100) + b"begin")
            until(lambda: client.service._under_way == 3)
        until(lambda: client.service._under_way == 1)
        gate.is_open.set()
        assert first.result().status_code == 200
        counts = {k[1]: n for k, n in _samples(client).items() if k[0] == "rsnet_requests_total"}
        assert counts == {"200": 1, "499": 2}


def test_an_error_of_the_servers_own_is_counted_as_that(classifier, monkeypatch):
    def fail(*_, **__):
        raise OSError("no decoder")

    monkeypatch.setattr(upload, "decode", fail)
    with serving(classifier, batch_size=1) as client:
        closing = {"Connection": "close"}  # as the server does then
        assert client.post("/classify", content=PHOTO, headers=closing).status_code == 500
        assert _samples(client)["rsnet_requests_total", "500", "/classify"] == 1
