"""The server: its answers, and what it does about strangers and crowds."""

from __future__ import annotations

import io
import itertools
import sys
import tempfile
import threading
from collections import Counter

import httpx
import numpy as np
import pytest
from PIL import Image

from pipelines.utils.errors import UsageError
from rsnet.__main__ import main
from rsnet.inference.classifier import Prediction
from rsnet.inference.runner import CudaGraphRunner
from rsnet.serving import server as serve
from rsnet.serving import upload
from rsnet.serving.config import ServerConfig
from rsnet.serving.service import Service
from rsnet.serving.size_controller import SizeController
from tests.helpers.cuda_graphs import FakeCuda
from tests.helpers.fuzzed import jpeg_with_scans
from tests.helpers.releases import SIZES
from tests.helpers.servers import (
    PHOTO,
    colours,
    encoded,
    photo,
    plain,
    running,
    serving,
    until,
)
from tests.inference.test_classifier import png_of
from tests.serving.conftest import ACCURACY, TABLE


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
        ("", jpeg_with_scans(101), 400, "more than 100 scans; save it anew"),
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


def test_a_form_of_an_unknown_charset_is_refused(client, caplog):
    """A codec of Python's that raises UnicodeError whatever it is given."""
    head = b'--x\r\nContent-Disposition: form-data; name="\xff"; filename="a"\r\n\r\n'
    kind = {"content-type": "multipart/form-data; boundary=x; charset=undefined"}
    found = client.post("/classify", content=head + PHOTO + b"\r\n--x--\r\n", headers=kind)
    assert (found.status_code, "charset" in found.json()["detail"]) == (400, True)
    assert caplog.messages == []


def test_a_form_that_is_too_large_is_refused(client):
    found = client.post("/classify", files={"image": ("a.jpg", bytes(100_001))})
    assert found.status_code == 413


def test_a_page_of_another_name_or_site_gets_nothing(classifier, client):
    for host in ("evil.example", "127.0.0.1.evil.example", "", "[::1"):
        found = client.post("/classify", content=PHOTO, headers={"Host": host})
        assert (found.status_code, found.text) == (400, "Invalid host header")
    foreign = {"Sec-Fetch-Site": "cross-site"}
    assert client.post("/compare", content=PHOTO, headers=foreign).status_code == 403
    for site, status in (("cross-site", 403), ("same-site", 403), ("same-origin", 200)):
        found = client.post("/classify", content=PHOTO, headers={"Sec-Fetch-Site": site})
        assert found.status_code == status
    for host in ("localhost:1", "[::1]:1", "127.0.0.1"):
        assert client.get("/health", headers={"Host": host}).status_code == 200
    with serving(classifier, allow_host=("photos.example",)) as other:
        assert other.get("/health", headers={"Host": "photos.example"}).status_code == 200
    with serving(classifier, is_loopback=False) as other:
        assert other.get("/health", headers={"Host": "any.example"}).status_code == 200
    with serving(classifier, is_loopback=False, allow_host=("photos.example",)) as other:
        for host, status in (("photos.example", 200), ("any.example", 400)):
            assert other.get("/health", headers={"Host": host}).status_code == status


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("http://10.0.0.5:8000", 200), ("http://evil.example", 403), ("null", 403),
        ("http://10.0.0.5", 403), ("http://10.0.0.5:8000.evil.example", 403),
    ],
)  # fmt: skip
def test_by_http_a_page_of_another_origin_gets_nothing(classifier, origin, status):
    """Browsers say where a request comes from by Sec-Fetch-Site to loopback and by https alone."""
    with serving(classifier, is_loopback=False) as other:
        headers = {"Host": "10.0.0.5:8000", "Origin": origin}
        found = other.post("/classify", content=PHOTO, headers=headers)
        assert found.status_code == status


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
        until(lambda: len(client.service.batches._jobs) == 7)
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
        until(lambda: client.service._under_way == 3)
        refused = client.post("/classify", content=bytes(1_000_000))
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert refused.json() == {"detail": "the server is busy: 3 requests are under way"}
        assert client.get("/health").status_code == 200
        gate.is_open.set()
        assert [f.result().status_code for f in held] == [200] * 3
        assert client.post("/classify", content=PHOTO).status_code == 200


def test_a_request_that_timed_out_is_not_computed(classifier, gate, pool):
    with serving(classifier, batch_size=1, timeout=1.0) as client:
        late = [pool.submit(client.post, "/classify", content=plain(10))]
        gate.entered.wait(30)
        late += [pool.submit(client.post, "/classify", content=plain(20)) for _ in range(3)]
        for found in (f.result() for f in late):
            assert found.status_code == 504
            assert found.json() == {"detail": "there was no answer within 1 s"}
        gate.is_open.set()
        assert client.post("/classify", content=plain(30)).status_code == 200
        assert client.service._under_way == 0
    assert colours(gate) == [10, 30]


def test_images_of_requests_that_were_given_up_do_not_wait_for_a_decoder(
    classifier, monkeypatch, pool
):
    opened, decoding = threading.Event(), upload.decode

    def slow(data, sizes, most):
        opened.wait(30)
        return decoding(data, sizes, most)

    monkeypatch.setattr(upload, "decode", slow)
    with serving(classifier, timeout=0.2) as client:
        late = [pool.submit(client.post, "/classify", content=PHOTO) for _ in range(8)]
        assert [f.result().status_code for f in late] == [504] * 8
        assert client.service._under_way == 0
        assert client.service._decoders._work_queue.qsize() == 0
        opened.set()
    with serving(classifier) as client:  # for as long as it takes
        assert client.post("/classify", content=PHOTO).status_code == 200


def test_a_form_needs_no_disk(classifier, monkeypatch, tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (900, 900, 3), np.uint8))
    data = io.BytesIO()
    noise.save(data, "PNG")
    assert len(data.getvalue()) > 2**21
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
    with serving(classifier, max_megabytes=5.0) as client:
        found = client.post("/classify", files={"any": ("a.png", data.getvalue())})
    assert found.status_code == 200


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


def test_a_deadline_chooses_for_those_requests_alone_that_do_not(classifier, monkeypatch):
    with serving(classifier, deadline_ms=60_000.0) as client:
        assert client.post("/classify", content=PHOTO).json()["size"] == 64
    with serving(classifier, deadline_ms=60_000.0) as client:
        monkeypatch.setattr(SizeController, "choose", lambda *_: None)
        found = client.post("/classify", content=PHOTO)
        assert (found.status_code, found.headers["retry-after"]) == (503, "1")
        assert found.json()["detail"].endswith("no size is fast enough for the deadline now")
        assert client.post("/classify?size=64", content=PHOTO).status_code == 200


def test_a_deadline_that_no_size_can_keep_is_refused_at_the_start(classifier):
    with (
        pytest.raises(UsageError, match=r"^--deadline-ms 0.001: one image takes [0-9.]+ ms at the"),
        serving(classifier, deadline_ms=0.001),
    ):
        pass


def test_cuda_graphs_are_captured_before_the_first_request(classifier, monkeypatch):
    FakeCuda(monkeypatch)
    graphs = CudaGraphRunner(classifier._forward._eager, classifier.batch_size)
    monkeypatch.setattr(classifier._forward, "_graphs", graphs)
    with serving(classifier) as client:
        assert set(graphs._captured) == {(size, n) for size in SIZES for n in (1, 2, 4)}
        client.post("/classify", content=PHOTO)
    assert len(graphs._captured) == 9


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
        until(lambda: len(service.batches._jobs) == 1)
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


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "there is no run, checkpoint or release nowhere"),
        (["x", "--port", "70000"], "--port 70000: a number from 0 to 65535 is needed"),
        (["x", "--deadline-ms", "0"], "--deadline-ms 0.0: a positive number is needed"),
        (["x", "--timeout", "nan"], "--timeout nan: a positive number is needed"),
        (
            ["x", "--timeout", "1e300"],
            "--timeout 1e+300: a positive number is needed, 1e+06 at most",
        ),
        (
            ["x", "--batch-wait-ms", "1e300"],
            "--batch-wait-ms 1e+300: a positive number is needed, ",
        ),
        (
            ["x", "--max-megabytes", "1e308"],
            "--max-megabytes 1e+308: a positive number is needed, ",
        ),
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


def test_a_full_batch_does_not_wait_for_an_image_of_another_size(classifier, pool):
    sizes = []
    predict = classifier.predict
    classifier.predict = lambda pixels, size: (
        sizes.append((size, len(pixels))) or predict(pixels, size)
    )
    with serving(classifier, batch_size=4, batch_wait_ms=20_000.0) as client:
        lone = pool.submit(client.post, "/classify?size=64", content=PHOTO)
        until(lambda: client.service.batches._jobs)
        full = [pool.submit(client.post, "/classify?size=32", content=PHOTO) for _ in range(4)]
        assert [f.result().status_code for f in full] == [200] * 4
        assert sizes == [(32, 4)]
        rest = [pool.submit(client.post, "/classify?size=64", content=PHOTO) for _ in range(3)]
        assert [f.result().status_code for f in (lone, *rest)] == [200] * 4
