"""The server's connections: clients that stop or leave, too many of them, and the end under way."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import socket
import threading
import time
from contextlib import ExitStack, suppress

import httpx
import pytest

from pipelines.utils.errors import DataError
from rsnet.__main__ import main
from rsnet.inference.classifier import SwitchableClassifier
from rsnet.serving import server as serve
from rsnet.serving.config import ServerConfig
from tests.helpers.servers import (
    PHOTO,
    colours,
    connect,
    plain,
    request_head,
    serving,
    until,
)


def test_a_client_that_still_sends_gets_its_refusal(classifier, gate, pool):
    """Also one that wants the connection closed: at once, that would reset it, answer and all."""
    closing = request_head(200).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    with serving(classifier, queue=1) as client, connect(client) as slow:
        held = pool.submit(client.post, "/classify", content=PHOTO)
        until(lambda: client.service._under_way == 1)
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


def test_a_client_that_left_is_not_computed_for(classifier, gate, pool):
    with serving(classifier, batch_size=1) as client:
        first = pool.submit(client.post, "/classify", content=plain(10))
        gate.entered.wait(30)
        with connect(client) as leaving:
            leaving.sendall(request_head(len(plain(20))) + plain(20))
            until(lambda: len(client.service.batches._jobs) == 1)
        until(lambda: client.service._under_way == 1)
        gate.is_open.set()
        assert first.result().status_code == 200
        assert client.post("/classify", content=plain(30)).status_code == 200
    assert colours(gate) == [10, 30]


def test_a_body_that_does_not_come_gives_its_place_back(classifier):
    with serving(classifier, queue=1, timeout=1.0) as client, connect(client) as slow:
        slow.sendall(request_head(100) + b"begin")
        answer = b""
        while b"}" not in answer:
            answer += slow.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"the image did not come within 1 s" in answer
        assert client.post("/classify", content=PHOTO).status_code == 200


def test_what_is_no_http_leaves_no_line_in_the_log(classifier, caplog):
    with serving(classifier) as client, connect(client) as stray:
        stray.sendall(b"no HTTP\r\n\r\n")
        assert _received(stray).startswith(b"HTTP/1.1 400 ")
        assert not caplog.records


def test_a_client_that_leaves_within_its_body_gives_its_place_back(classifier, caplog):
    with serving(classifier, queue=1) as client:
        with connect(client) as leaving:
            leaving.sendall(request_head(100) + b"begin")
            until(lambda: client.service._under_way == 1)
        until(lambda: client.service._under_way == 0)
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
        busy.sendall(request_head(len(PHOTO)) + PHOTO)
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
    form = request_head(100).replace(
        b"\r\n\r\n", b"\r\nContent-Type: multipart/form-data; boundary=x\r\n\r\n"
    )
    with ExitStack() as stack, serving(classifier) as client:
        for head in (request_head(100), form):
            stack.enter_context(connect(client)).sendall(head + b"--x\r\n")
        until(lambda: client.service._under_way == 2)
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
        waiting.sendall(request_head(len(PHOTO)) + PHOTO)
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


@pytest.fixture
def stuck(monkeypatch) -> threading.Event:
    """Set once a connection has more answers than are sent to a client that reads none of them."""
    found, pause = threading.Event(), serve.Protocol.pause_writing

    def noted(protocol: serve.Protocol) -> None:
        pause(protocol)
        found.set()

    monkeypatch.setattr(serve.Protocol, "pause_writing", noted)
    return found


def _ask_and_read_nothing(connection: socket.socket) -> None:
    connection.settimeout(0.2)
    with suppress(OSError):  # the server reads no further requests
        for _ in range(20_000):
            connection.sendall(b"GET /page.js HTTP/1.1\r\nHost: localhost\r\n\r\n")


def test_a_client_that_does_not_read_its_answers_gives_its_place_back(
    classifier, monkeypatch, stuck
):
    monkeypatch.setattr(serve, "IDLE_S", 0.1)
    monkeypatch.setattr(serve, "most_connections", lambda: 1)
    with serving(classifier) as client, connect(client) as unread:
        _ask_and_read_nothing(unread)
        assert stuck.wait(30)
        time.sleep(0.5)
        assert client.get("/health").status_code == 200


def test_nor_does_it_hold_the_end(classifier, monkeypatch, caplog, stuck):
    monkeypatch.setattr(serve, "LAST_BODY_S", 0.05)
    with ExitStack() as stack, serving(classifier) as client:
        _ask_and_read_nothing(stack.enter_context(connect(client)))
        assert stuck.wait(30)
    assert caplog.messages == []


def test_an_address_that_another_server_took_meanwhile_is_one_line(classifier, caplog):
    """While one measures, another can bind the same address, and is the first to listen."""
    first = serve.bind("127.0.0.1", 0)
    second = serve.bind(*first.getsockname())
    first.listen()
    options = ServerConfig(batch_size=4)
    app = serve.make_app(serve.make_service(classifier, options), options, True)
    host, port = first.getsockname()
    with first, second, pytest.raises(DataError) as end:
        serve.serve_forever(app, second)
    assert str(end.value) == f"--host {host} --port {port}: Address already in use"
    assert caplog.messages == []


@pytest.fixture
def signals_restored():
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("signals_restored")
@pytest.mark.parametrize(
    ("number", "times"), [(signal.SIGINT, 1), (signal.SIGINT, 2), (signal.SIGTERM, 1)]
)
def test_a_signal_ends_it_with_exit_code_0_after_the_answers_under_way(
    folder, classifier, gate, pool, monkeypatch, capfd, number, times
):
    def load(given, _device, dtype, batch_size, top, **_):
        assert (given.folder, dtype, batch_size, top) == (folder, None, 8, 5)
        return classifier

    monkeypatch.setattr(SwitchableClassifier, "load", load)
    found = []

    def visit() -> None:
        until(lambda: out.append(capfd.readouterr().out) or "/ (Ctrl-C ends)\n" in "".join(out))
        url = "".join(out).split()[-3]
        with httpx.Client(trust_env=False, timeout=30) as client:
            answer = pool.submit(client.post, f"{url}classify", content=PHOTO)
            gate.entered.wait(30)
            for _ in range(times):
                os.kill(os.getpid(), number)
                time.sleep(0.2)  # two at once are one
            gate.is_open.set()
            found.append(answer.result().status_code)

    out: list[str] = []
    visitor = threading.Thread(target=visit, daemon=True)  # a failure must not wait for it
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


def test_small_answers_are_not_held_back_by_nagles_algorithm():
    """asyncio sets TCP_NODELAY on sockets that name their protocol alone: 40 ms an answer otherwise."""
    with serve.bind("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
