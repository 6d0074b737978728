"""The server: its answers, and what it does about strangers, crowds and stragglers."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image

from rsnet.__main__ import main
from rsnet.inference.classifier import Prediction, SwitchableClassifier
from rsnet.serving import server as serve
from rsnet.serving.config import ServerConfig
from rsnet.serving.service import Service
from tests.helpers import releases
from tests.helpers.releases import SIZES
from tests.helpers.servers import Gate, connect, encoded, photo, running, serving
from tests.inference.test_classifier import png_of

ACCURACY = {
    name: {"top1": top1, "top5": 90.0}
    for name, top1 in (("64", 60.0), ("48", 55.0), ("32", 50.0), ("ensemble", 80.0))
}
TABLE = {
    64: {"median": 8.0, "p95": 9.0},
    48: {"median": 4.0, "p95": 5.0},
    32: {"median": 2.0, "p95": 3.0},
}
PHOTO = encoded(photo(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return releases.write(tmp_path_factory.mktemp("serve") / "release", ACCURACY)


@pytest.fixture(scope="module")
def loaded(folder) -> SwitchableClassifier:
    classifier = SwitchableClassifier.load(folder, batch_size=4)
    classifier._latencies = TABLE
    return classifier


@pytest.fixture
def classifier(loaded, monkeypatch) -> SwitchableClassifier:
    """A test may replace what it predicts with."""
    monkeypatch.setattr(loaded, "predict", loaded.predict)
    return loaded


@pytest.fixture(scope="module")
def client(loaded):
    with serving(loaded, batch_size=4, max_megabytes=0.1, max_megapixels=1.0) as client:
        yield client


@pytest.fixture
def gate(classifier) -> Gate:
    classifier.predict = Gate(classifier)
    yield classifier.predict
    classifier.predict.is_open.set()


@pytest.fixture
def pool():
    with ThreadPoolExecutor(16) as pool:
        yield pool


def _until(holds) -> None:
    while not holds():
        time.sleep(0.005)


def _json(prediction: Prediction) -> dict:
    pairs = zip(prediction.classes, prediction.probabilities, strict=True)
    return {"size": prediction.size, "top": [{"class": c, "probability": p} for c, p in pairs]}


def _without_ms(response: httpx.Response) -> dict:
    assert response.status_code == 200, response.text
    content = response.json()
    assert content.pop("ms") > 0
    return content


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "GIF"])
@pytest.mark.parametrize("as_form", [False, True], ids=["body", "form"])
def test_the_answer_is_the_classifiers(client, loaded, tmp_path, kind, as_form):
    data = encoded(photo(1), kind)
    (tmp_path / "image").write_bytes(data)
    sent = {"files": {"any": ("name.txt", data)}} if as_form else {"content": data}
    for size in SIZES:
        found = client.post("/classify", params={"size": size}, **sent)
        (expected,) = loaded.classify(tmp_path / "image", size)
        assert _without_ms(found) == _json(expected)


def test_each_way_to_choose_gives_the_classifiers_answer(client, loaded):
    image = photo(2)
    best = {size: loaded.classify(image, size)[0].probabilities[0] for size in SIZES}
    choices = [{}, {"budget_ms": 5.5}, {"confidence": best[32]}, {"confidence": 1.0}]
    choices.append({"confidence": best[32] + 1e-4})
    sizes = []
    for choice in choices:
        found = _without_ms(client.post("/classify", params=choice, content=encoded(image)))
        (expected,) = loaded.classify(image, **choice)
        assert found == _json(expected)
        sizes.append(found["size"])
    assert sizes[:4] == [64, 48, 32, 64]
    assert sizes[4] > 32


def test_compare_gives_all_sizes_the_largest_first(client, loaded):
    found = client.post("/compare", content=encoded(photo(3))).json()
    assert all(one.pop("ms") > 0 for one in found)
    assert found == [_json(loaded.classify(photo(3), size)[0]) for size in SIZES]


def test_a_cascades_milliseconds_are_those_of_all_its_sizes(classifier):
    predict = classifier.predict

    def slow(pixels, size):
        return [Prediction(p.classes, p.probabilities, size, size) for p in predict(pixels, size)]

    classifier.predict = slow
    with serving(classifier, batch_size=4) as client:
        found = client.post("/classify", params={"confidence": 1.0}, content=PHOTO).json()
    assert found["ms"] == 64 + 48 + 32


@pytest.mark.parametrize("batch_size", [1, 4])
def test_many_clients_at_once_get_what_each_would_get_alone(classifier, pool, batch_size):
    """The same bits where an image is computed alone; in batches a convolution may add up otherwise."""
    images = [photo(i) for i in range(40)]
    sizes = [SIZES[i % 3] for i in range(40)]
    alone = [_json(classifier.classify(i, s)[0]) for i, s in zip(images, sizes, strict=True)]
    with serving(classifier, batch_size=batch_size) as client:

        def ask(number: int) -> dict:
            data = encoded(images[number])
            return _without_ms(
                client.post("/classify", params={"size": sizes[number]}, content=data)
            )

        found = list(pool.map(ask, range(40)))
    if batch_size == 1:
        assert found == alone
    for one, other in zip(found, alone, strict=True):
        assert one["size"] == other["size"]
        assert [t["class"] for t in one["top"]] == [t["class"] for t in other["top"]]
        p, q = ([t["probability"] for t in each["top"]] for each in (one, other))
        np.testing.assert_allclose(p, q, rtol=1e-4)


def test_a_name_that_is_no_text_is_escaped(classifier, monkeypatch):
    monkeypatch.setattr(classifier, "_names", ["\ud800x"] * 8)
    with serving(classifier) as client:
        found = client.post("/classify", content=PHOTO).json()
    assert found["top"][0]["class"] == "\\ud800x"


def test_the_pages_data_are_those_of_the_release(client):
    info = client.get("/info").json()
    assert info["sizes"] == list(SIZES)
    assert info["classes"] == 8
    assert info["accuracy"] == ACCURACY
    assert info["latency"]["ms"]["48"] == TABLE[48]
    assert info["choices"] == [
        {"size": 64, "from_ms": 9.0},
        {"size": 48, "from_ms": 5.0},
        {"size": 32, "from_ms": 3.0},
    ]
    assert client.get("/health").json() == {"status": "ok"}


BMP_HEADER = encoded(photo(0), "BMP")[:54]


@pytest.mark.parametrize(
    ("query", "content", "status", "message"),
    [
        ("size=40", PHOTO, 422, "size 40: this network has 64 48 32"),
        ("size=large", PHOTO, 422, "size: Input should be a valid integer"),
        ("siez=64", PHOTO, 422, "siez: Extra inputs are not permitted"),
        ("size=64&confidence=0.5", PHOTO, 422, "give one of size, confidence and budget_ms"),
        ("confidence=nan", PHOTO, 422, "confidence nan: must be above 0"),
        ("confidence=2", PHOTO, 422, "confidence 2.0: must be above 0"),
        ("budget_ms=2", PHOTO, 422, "no size fits into 2.0 ms: size 32 takes 3.00 ms"),
        ("", b"", 400, "there is no image: send one as the body, or as a form's file"),
        ("", b"GIF, they say", 415, "this is no image; send JPEG, PNG, WEBP, BMP, GIF"),
        ("", encoded(photo(0), "TIFF"), 415, "this is no image"),
        ("", encoded(photo(0), "JPEG")[:-300], 400, "the image: image file is truncated"),
        ("", PHOTO[:-300], 400, "the image: "),
        ("", BMP_HEADER, 400, "the image: "),
        ("", png_of(1001, 1000), 413, "the image is too large: 1 million pixels are allowed"),
        ("", png_of(9_500, 9_500), 413, "the image is too large: 1 million pixels"),
        ("", png_of(60_000, 60_000), 413, "the image is too large: 1 million pixels"),
        ("", png_of(1, 2_000), 413, "the image is too large: 1 million pixels"),
        ("", png_of(0, 5), 415, "this is no image"),
        ("", encoded(photo(0), "JPEG")[:200], 400, "the image is damaged: "),
        ("", bytes(100_001), 413, "the image is too large: 0.1 MB are allowed"),
        ("", 40 * [bytes(10_000)], 413, "the image is too large: 0.1 MB are allowed"),
    ],
    ids=itertools.count(),
)
def test_what_cannot_be_answered_is_refused_in_one_line(client, query, content, status, message):
    found = client.post(f"/classify?{query}", content=content)
    assert (found.status_code, found.headers["content-type"]) == (status, "application/json")
    assert found.json()["detail"].startswith(message)
    assert "\n" not in found.json()["detail"]
    assert client.post("/classify", content=PHOTO).status_code == 200


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        ({"files": {"image": ("a.jpg", b"")}}, "there is no image"),
        ({"files": {"a": ("a", PHOTO), "b": ("b", PHOTO)}}, "Too many files"),
        ({"data": {"image": "text"}, "files": {"a": ("a", PHOTO)}}, "Too many fields"),
        ({"content": b"x", "headers": {"content-type": "multipart/form-data"}}, "Missing boundary"),
        (
            {
                "content": b"--x\r\nno form",
                "headers": {"content-type": "multipart/form-data; boundary=x"},
            },
            "",
        ),
    ],
)
def test_a_form_without_one_image_is_refused(client, sent, message):
    found = client.post("/classify", **sent)
    assert found.status_code == 400
    assert found.json()["detail"].startswith(message)


def test_a_form_that_is_too_large_is_refused(client):
    found = client.post("/classify", files={"image": ("a.jpg", bytes(100_001))})
    assert found.status_code == 413


def test_a_page_of_another_name_or_site_gets_nothing(classifier, client):
    for host in ("evil.example", "127.0.0.1.evil.example", "", "[::1"):
        found = client.post("/classify", content=PHOTO, headers={"Host": host})
        assert (found.status_code, found.text) == (400, "Invalid host header")
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200)):
        found = client.post("/classify", content=PHOTO, headers={"Sec-Fetch-Site": site})
        assert found.status_code == status
    for host in ("localhost:1", "[::1]:1", "127.0.0.1"):
        assert client.get("/health", headers={"Host": host}).status_code == 200
    with serving(classifier, allow_host=("photos.example",)) as other:
        assert other.get("/health", headers={"Host": "photos.example"}).status_code == 200
    with serving(classifier, is_loopback=False) as other:
        assert other.get("/health", headers={"Host": "any.example"}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/page.js", "/info", "/nowhere", "/..%2fapp.py"])
def test_every_answer_forbids_foreign_content_and_no_other_origin_may_read_it(client, path):
    found = client.get(path, headers={"Origin": "https://evil.example"})
    assert found.status_code == (404 if path in ("/nowhere", "/..%2fapp.py") else 200)
    policy = found.headers["content-security-policy"].split("; ")
    assert "default-src 'none'" in policy
    assert "script-src 'self'" in policy
    assert found.headers["x-content-type-options"] == "nosniff"
    assert not [name for name in found.headers if name.startswith("access-control")]


def test_images_that_came_while_one_was_computed_make_a_batch(classifier, gate, pool):
    with serving(classifier, batch_size=4, batch_wait_ms=0.0) as client:
        first = pool.submit(client.post, "/classify?size=32", content=PHOTO)
        gate.entered.wait(30)
        others = [pool.submit(client.post, "/classify?size=32", content=PHOTO) for _ in range(6)]
        others.append(pool.submit(client.post, "/classify?size=64", content=PHOTO))
        _until(lambda: len(client.service.batches._jobs) == 7)
        gate.is_open.set()
        assert {f.result().status_code for f in [first, *others]} == {200}
    first, *others = [(size, len(pixels)) for size, pixels in gate.batches]
    assert first == (32, 1)
    assert sorted(others) == [(32, 2), (32, 4), (64, 1)]


def test_more_requests_than_the_queue_holds_are_refused_and_told_to_come_again(
    classifier, gate, pool
):
    with serving(classifier, queue=3) as client:
        held = [pool.submit(client.post, "/classify", content=PHOTO) for _ in range(3)]
        _until(lambda: client.service._under_way == 3)
        refused = client.post("/classify", content=bytes(1_000_000))
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json() == {"detail": "the server is busy: 3 requests are under way"}
        assert client.get("/health").status_code == 200
        gate.is_open.set()
        assert [f.result().status_code for f in held] == [200] * 3
        assert client.post("/classify", content=PHOTO).status_code == 200


def test_a_client_that_still_sends_gets_its_refusal(classifier, gate, pool):
    """Also one that wants the connection closed: at once, that would reset it, answer and all."""
    closing = _head(200).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    with serving(classifier, queue=1) as client, connect(client) as slow:
        held = pool.submit(client.post, "/classify", content=PHOTO)
        _until(lambda: client.service._under_way == 1)
        slow.sendall(closing + bytes(100))
        time.sleep(0.2)
        slow.sendall(bytes(50))
        slow.sendall(bytes(50))
        answer = b""
        while more := slow.recv(10_000):
            answer += more
        gate.is_open.set()
        assert answer.startswith(b"HTTP/1.1 503 ")
        assert held.result().status_code == 200


def _colours(gate: Gate) -> list[int]:
    """Of what was computed; images of one colour have only this value."""
    return [int(pixels.max()) for _, images in gate.batches for pixels in images]


def _plain(colour: int) -> bytes:
    return encoded(Image.new("RGB", (40, 40), (colour,) * 3))


def test_a_request_that_timed_out_is_not_computed(classifier, gate, pool):
    with serving(classifier, batch_size=1, timeout=1.0) as client:
        late = [pool.submit(client.post, "/classify", content=_plain(10))]
        gate.entered.wait(30)
        late += [pool.submit(client.post, "/classify", content=_plain(20)) for _ in range(3)]
        for found in (f.result() for f in late):
            assert found.status_code == 504
            assert found.json() == {"detail": "there was no answer within 1 s"}
        gate.is_open.set()
        assert client.post("/classify", content=_plain(30)).status_code == 200
        assert client.service._under_way == 0
    assert _colours(gate) == [10, 30]


def _head(length: int) -> bytes:
    return (
        f"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()
    )


def test_a_client_that_left_is_not_computed_for(classifier, gate, pool):
    with serving(classifier, batch_size=1) as client:
        first = pool.submit(client.post, "/classify", content=_plain(10))
        gate.entered.wait(30)
        with connect(client) as leaving:
            leaving.sendall(_head(len(_plain(20))) + _plain(20))
            _until(lambda: len(client.service.batches._jobs) == 1)
        _until(lambda: client.service._under_way == 1)
        gate.is_open.set()
        assert first.result().status_code == 200
        assert client.post("/classify", content=_plain(30)).status_code == 200
    assert _colours(gate) == [10, 30]


def test_a_body_that_does_not_come_gives_its_place_back(classifier):
    with serving(classifier, queue=1, timeout=1.0) as client, connect(client) as slow:
        slow.sendall(_head(100) + b"begin")
        answer = b""
        while b"}" not in answer:
            answer += slow.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"the image did not come within 1 s" in answer
        assert client.post("/classify", content=PHOTO).status_code == 200


def test_a_client_that_leaves_within_its_body_gives_its_place_back(classifier, caplog):
    with serving(classifier, queue=1) as client:
        with connect(client) as leaving:
            leaving.sendall(_head(100) + b"begin")
            _until(lambda: client.service._under_way == 1)
        _until(lambda: client.service._under_way == 0)
        assert client.post("/classify", content=PHOTO).status_code == 200
    assert caplog.messages == []


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: local"])
def test_a_connection_without_a_request_is_closed(classifier, monkeypatch, sent):
    monkeypatch.setattr(serve, "IDLE_S", 0.1)
    with serving(classifier) as client, connect(client) as idle:
        idle.sendall(sent)
        assert idle.recv(100) == b""


def test_a_connection_more_than_may_be_open_takes_the_place_of_the_one_that_is_idle_the_longest(
    classifier, monkeypatch
):
    monkeypatch.setattr(serve, "most_connections", lambda: 3)
    with serving(classifier) as client, ExitStack() as stack:
        idle = [stack.enter_context(connect(client)) for _ in range(6)]
        assert client.get("/health").status_code == 200  # the fourth that may be open
        assert [one.recv(1) for one in idle[:4]] == [b""] * 4
        idle[-1].sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert idle[-1].recv(100).startswith(b"HTTP/1.1 200 ")


def test_a_connection_more_than_may_be_open_is_refused_where_all_have_requests(
    classifier, gate, monkeypatch
):
    monkeypatch.setattr(serve, "most_connections", lambda: 1)
    with serving(classifier) as client, connect(client) as busy:
        busy.sendall(_head(len(PHOTO)) + PHOTO)
        gate.entered.wait(30)
        with connect(client) as refused:
            assert refused.recv(100).startswith(
                b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 1"
            )
        gate.is_open.set()
        assert busy.recv(100).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize(("soft", "most"), [(256, 128), (4096, 1000), (-1, 1000)])
def test_connections_leave_half_of_the_descriptors_to_all_else(monkeypatch, soft, most):
    monkeypatch.setattr(serve.resource, "getrlimit", lambda _: (soft, soft))
    assert serve.most_connections() == most


def test_descriptors_that_run_out_are_one_line_and_connections_are_refused_meanwhile(
    classifier, monkeypatch, capsys, caplog
):
    """As open files have, each second call of accept: the one in between is to refuse."""
    accept, fails = socket.socket.accept, [True, False] * 3

    def accept_at_last(self):
        if fails and fails.pop(0):
            raise OSError(errno.EMFILE, "Too many open files")
        return accept(self)

    with serving(classifier) as client:
        monkeypatch.setattr(socket.socket, "accept", accept_at_last)
        for _ in range(3):
            with connect(client) as refused:
                assert refused.recv(1) == b""
        assert client.get("/health").status_code == 200
    assert capsys.readouterr().err == "connections are refused: Too many open files\n"
    assert caplog.messages == []


def test_the_address_is_told_once_clients_can_connect(classifier):
    options = ServerConfig(batch_size=4)
    app = serve.make_app(serve.make_service(classifier, options), options, True)
    listener, found = serve.bind("127.0.0.1", 0), []

    def visit() -> None:
        with socket.create_connection(listener.getsockname(), timeout=30):
            found.append("connected")
        server.should_exit = True

    server = serve.make_server(app, visit)
    server.run([listener])
    assert found == ["connected"]


def test_a_body_that_its_client_stops_sending_does_not_hold_the_end(
    classifier, monkeypatch, caplog
):
    monkeypatch.setattr(serve, "LAST_BODY_S", 0.05)
    form = _head(100).replace(
        b"\r\n\r\n", b"\r\nContent-Type: multipart/form-data; boundary=x\r\n\r\n"
    )
    with ExitStack() as stack, serving(classifier) as client:
        for head in (_head(100), form):
            stack.enter_context(connect(client)).sendall(head + b"--x\r\n")
        _until(lambda: client.service._under_way == 2)
    assert caplog.messages == []  # such as tasks that are cancelled, with their tracebacks


def _received(connection: socket.socket) -> bytes:
    """All that comes until the connection is closed."""
    parts = []
    while part := connection.recv(10_000):
        parts.append(part)
    return b"".join(parts)


def test_an_answer_that_takes_too_long_for_the_end_is_a_refusal_without_a_traceback(
    classifier, gate, pool, monkeypatch, caplog
):
    monkeypatch.setattr(serve, "LAST_ANSWER_S", 0.05)
    with ExitStack() as stack, serving(classifier) as client:
        waiting = stack.enter_context(connect(client))
        waiting.sendall(_head(len(PHOTO)) + PHOTO)
        gate.entered.wait(30)
        answer = pool.submit(_received, waiting)
        answer.add_done_callback(lambda _: gate.is_open.set())
    assert answer.result().startswith(b"HTTP/1.1 503 ")
    assert b"it shuts down" in answer.result()
    assert [record.exc_info for record in caplog.records] == [None]  # that it is cancelled


def test_a_body_without_an_end_is_not_read_for_ever(classifier, monkeypatch):
    monkeypatch.setattr(serve, "IDLE_S", 0.1)
    head = b"POST /classify HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with serving(classifier, max_megabytes=0.1) as client, connect(client) as endless:
        endless.sendall(head)
        chunk = b"10000\r\n" + bytes(0x10000) + b"\r\n"
        with pytest.raises(OSError, match=r"reset|Broken pipe"):
            all(endless.sendall(chunk) is None for _ in itertools.count())


def test_an_answer_that_takes_longer_than_an_idle_connection_may_is_not_cut_off(
    classifier, gate, pool, monkeypatch
):
    monkeypatch.setattr(serve, "IDLE_S", 0.05)
    with serving(classifier) as client:
        assert client.get("/health").status_code == 200
        found = pool.submit(client.post, "/classify", content=PHOTO)
        gate.entered.wait(30)
        time.sleep(0.2)
        gate.is_open.set()
        assert found.result().status_code == 200


def test_a_batch_that_fails_is_said_and_the_next_one_is_computed(classifier, capfd):
    predict, fails = classifier.predict, [True]

    def failing(pixels, size):
        if fails.pop():
            raise RuntimeError("out of memory\nTried to allocate")
        return predict(pixels, size)

    classifier.predict = failing
    with serving(classifier) as client:
        found = client.post("/classify", content=PHOTO)
        assert (found.status_code, found.json()) == (
            500, {"detail": "computing failed: out of memory"},
        )  # fmt: skip
        fails.append(False)
        assert client.post("/classify", content=PHOTO).status_code == 200
    assert capfd.readouterr().err == "a batch at size 64 failed: out of memory\n"


def test_a_deadline_chooses_for_those_requests_alone_that_do_not(classifier):
    with serving(classifier, deadline_ms=60_000.0) as client:
        assert client.post("/classify", content=PHOTO).json()["size"] == 64
    with serving(classifier, deadline_ms=0.001) as client:
        found = client.post("/classify", content=PHOTO)
        assert (found.status_code, found.headers["retry-after"]) == (503, "1")
        assert found.json()["detail"].endswith("no size is fast enough for the deadline now")
        assert client.post("/classify?size=64", content=PHOTO).status_code == 200


class _Controller:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.waiting, self.batches, self.answers = [], [], []

    def choose(self, _now, waiting):
        self.waiting.append(+Counter(waiting))
        return 48

    def computed(self, *batch):
        self.batches.append(batch)

    def answered(self, size, ms):
        self.answers.append((size, ms))


def test_the_controller_hears_of_what_waits_of_all_batches_and_of_its_answers(
    classifier, gate, pool
):
    controller, options = _Controller(), ServerConfig(batch_size=4)
    service = serve.make_service(classifier, options)
    service = Service(classifier, service._settings, controller)
    with running(serve.make_app(service, options, True)) as client:
        first = pool.submit(client.post, "/compare", content=PHOTO)
        gate.entered.wait(30)
        second = pool.submit(client.post, "/classify", content=PHOTO)
        _until(lambda: len(service.batches._jobs) == 1)
        gate.is_open.set()
        assert len(first.result().json()) == 3
        assert second.result().json()["size"] == 48
        assert client.post("/classify", content=PHOTO).json()["size"] == 48
    assert controller.waiting == [{64: 1, 48: 1, 32: 1}, {}]
    assert [(size, images) for size, images, _ in controller.batches] == [
        (size, len(images)) for size, images in gate.batches
    ]
    assert [size for size, _ in controller.answers] == [48, 48]
    assert all(ms > 0 for _, ms in controller.answers)


@pytest.fixture
def signals_restored():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals_restored")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_with_exit_code_0_after_the_answers_under_way(
    folder, classifier, gate, pool, monkeypatch, capfd, number
):
    def load(given, _device, dtype, batch_size, *, top):
        assert (given, dtype, batch_size, top) == (folder, None, 8, 5)
        return classifier

    monkeypatch.setattr(SwitchableClassifier, "load", load)
    found = []

    def visit() -> None:
        _until(lambda: out.append(capfd.readouterr().out) or "/ (Ctrl-C ends)\n" in "".join(out))
        url = "".join(out).split()[-3]
        with httpx.Client(trust_env=False, timeout=30) as client:
            answer = pool.submit(client.post, f"{url}classify", content=PHOTO)
            gate.entered.wait(30)
            os.kill(os.getpid(), number)
            gate.is_open.set()
            found.append(answer.result().status_code)

    out: list[str] = []
    visitor = threading.Thread(target=visit)
    visitor.start()
    assert main(["serve", str(folder), "--port", "0"]) == 0
    visitor.join()
    assert found == [200]
    assert "".join(out).startswith(f"{folder}, sizes 64 48 32: http://127.0.0.1:")


def test_a_port_that_is_taken_is_one_line_and_exit_code_1(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(folder), "--port", str(port)]) == 1
    message = f"rsnet serve: error: --host 127.0.0.1 --port {port}: Address already in use\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "there is no folder nowhere"),
        (["x", "--port", "70000"], "--port 70000: a number from 0 to 65535 is needed"),
        (["x", "--deadline-ms", "0"], "--deadline-ms 0.0: a positive number is needed"),
        (["x", "--timeout", "nan"], "--timeout nan: a positive number is needed"),
        (["x", "--max-megapixels", "90"], "--max-megapixels 90.0: PIL takes 89 at most"),
        (["x", "--allow-host", "a.b:80"], "--allow-host a.b:80: give a name alone"),
        (["x", "--allow-host", "a.*"], "--allow-host a.*: give a name alone"),
        (["x", "--queue", "0"], "--queue 0: at least 1 is needed"),
        (["x", "--host", "::x"], "--host ::x: "),
        (["x", "--host", "a..b"], "--host 'a..b': is no name of a host"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    assert main(["serve", *words, *(() if "--port" in words else ("--port", "0"))]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"rsnet serve: error: {message}")
    assert err.count("\n") == 1


def test_what_is_not_installed_is_named_with_what_to_do(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", str(folder)]) == 2
    expected = 'rsnet serve: error: uvicorn is not installed: pip install "rsnet-trainer[serve]"\n'
    assert capsys.readouterr().err == expected


def test_small_answers_are_not_held_back_by_nagles_algorithm():
    """asyncio sets TCP_NODELAY on sockets that name their protocol alone: 40 ms an answer otherwise."""
    with serve.bind("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
