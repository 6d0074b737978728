"""Python commands in processes of their own that need not import: a fork of one that has.

Importing torch, DALI and the trainer takes seconds of CPU, a fork milliseconds. One server, which all of
pytest-xdist's processes share, imports all that starts no thread and runs nothing; each command is a fork of
it, in a session of its own, with the given streams, environment, folder and sys.argv. `ForkedPopen` is a
`subprocess.Popen`, signals and exit codes included. Tests of start-up itself (what is imported, what is
missing, signals before the program begins) use `subprocess`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.helpers.plots import leave_undrawn

ROOT = Path(__file__).parents[2]
# What commands use. FFCV is left out: it starts a thread, which no fork would have.
PRELOADED = (
    "torch", "torchvision", "torch.distributed.run", "matplotlib.pyplot", "wandb", "rsnet.train",
    "rsnet.training.loop", "pipelines.dali.loader", "pipelines.reference", "pipelines.synthetic",
)  # fmt: skip
_ADDRESS = "TESTS_FORK_SERVER"  # of the shared one, an abstract socket's; in the environment
_MESSAGE_BYTES = 200_000  # of a request: command line and environment


def start(
    words: Sequence[object], env: Mapping[str, str] | None = None, **popen: Any
) -> ForkedPopen:
    """Start a command that begins with `sys.executable`: a script, `-m` module or `-c` code.

    env: in addition to this process's environment. Streams are pipes of text by default.
    """
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    environ = os.environ | {"OMP_NUM_THREADS": "1"} | dict(env or {})
    return ForkedPopen([*map(str, words)], env=environ, text=True, **(streams | popen))


def run(
    words: Sequence[object], timeout: float = 120, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a command as `start` does to its end, or kill it after `timeout` seconds."""
    with start(words, **options) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


class ForkedPopen(subprocess.Popen):
    """A process that the server forks; always the leader of its own session.

    It is not a child of this process, so that its end comes as a message from the server.
    """

    _status: socket.socket | None = None

    def _execute_child(  # type: ignore[override]
        self, args, _executable, preexec_fn, _close_fds, pass_fds, cwd, env, *rest
    ) -> None:  # fmt: skip
        child_in, _, _, child_out, _, child_err = rest[3:9]
        assert preexec_fn is None, "the code of the command has to do it"
        assert not pass_fds
        fds = [i if fd < 0 else fd for i, fd in enumerate((child_in, child_out, child_err))]
        self._status, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = {"words": args, "env": dict(env), "cwd": str(cwd or Path.cwd())}
        message = json.dumps(request).encode()
        assert len(message) < _MESSAGE_BYTES
        with theirs:
            socket.send_fds(_server(), [message], [*fds, theirs.fileno()])
        reply = self._status.recv(64)
        assert reply, "the fork server ended"
        self.pid, self._child_created = int(reply), True
        self._close_pipe_fds(*rest[3:9])

    def _internal_poll(self, _deadstate: int | None = None) -> int | None:  # type: ignore[override]
        if self.returncode is None:
            pid, status = self._try_wait(os.WNOHANG)
            if pid:
                self._handle_exitstatus(status)
        return self.returncode

    def _try_wait(self, wait_flags: int) -> tuple[int, int]:
        """(pid, wait status), or (0, 0) while it runs."""
        assert self._status is not None
        if wait_flags == os.WNOHANG and not select.select([self._status], [], [], 0)[0]:
            return 0, 0
        with self._status:
            return self.pid, int(self._status.recv(64) or signal.SIGKILL)  # the server was killed


@functools.cache
def _server() -> socket.socket:
    """This process's connection to the server, which is started here if none is shared."""
    if _ADDRESS not in os.environ:
        share()
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.connect("\0" + os.environ[_ADDRESS])
    atexit.register(connection.close)
    return connection


def share() -> None:
    """Start a server for this process and those that it starts; it imports when the first client comes."""
    os.environ[_ADDRESS] = f"tests-fork-server-{os.getpid()}"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("\0" + os.environ[_ADDRESS])
    listener.listen()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    with theirs, listener:
        fds = [theirs.fileno(), listener.fileno()]
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.processes", *map(str, fds)], cwd=ROOT,
            env=os.environ | threads, pass_fds=fds, start_new_session=True,
        )  # fmt: skip

    def stop() -> None:
        ours.close()
        process.wait()

    atexit.register(stop)


def _read_options() -> None:
    """Read the options of a training by DALI, which its commands then need not."""
    from pipelines.dali.options import DaliOptions
    from rsnet.config.command_line import parse
    from tests.helpers.parsers import keep_parsers

    keep_parsers()
    parse(DaliOptions, ["--data", "none"])


def holds_in_fork(check: Callable[[], bool]) -> bool:
    """Return whether `check` holds in a fork of this process, which itself stays as it is.

    The fork never returns into the tests: it fails by an exception, and after 20 seconds.
    """
    if (child := os.fork()) == 0:
        signal.alarm(20)
        code = 1
        try:
            code = 0 if check() else 1
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


def _serve(
    owner: socket.socket, listener: socket.socket
) -> tuple[dict[str, Any], list[int]] | None:
    """Fork for each client's requests; returns the request in the fork, None at the end of the owner."""
    running: dict[int, tuple[int, socket.socket]] = {}  # by pidfd
    clients: set[socket.socket] = set()
    while True:
        for fd in select.select([owner, listener, *clients, *running], [], [])[0]:
            if fd is owner:
                return None
            if fd is listener:
                clients.add(listener.accept()[0])
            elif fd in clients:
                message, fds, *_ = socket.recv_fds(fd, _MESSAGE_BYTES, 4)
                if not message:
                    clients.remove(fd)
                    fd.close()
                    continue
                pid = os.fork()
                if pid == 0:
                    for each in (owner, listener, *clients):
                        each.close()
                    os.close(fds.pop())
                    for pidfd, (_, status) in running.items():
                        os.close(pidfd)
                        status.close()
                    return json.loads(message), fds
                status = socket.socket(fileno=fds.pop())
                status.send(str(pid).encode())
                running[os.pidfd_open(pid)] = pid, status
                for stream in fds:
                    os.close(stream)
            else:
                pid, status = running.pop(fd)
                os.close(fd)
                _, code = os.waitpid(pid, 0)
                with status, contextlib.suppress(BrokenPipeError):  # nobody waits for it
                    status.send(str(code).encode())


def _become(request: dict[str, Any], fds: list[int]) -> None:
    """Make this fork what a fresh interpreter would be, and run its command."""
    import torch

    os.setsid()
    for number, fd in enumerate(fds):
        os.dup2(fd, number)
    for fd in set(fds) - {0, 1, 2}:
        os.close(fd)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    unbuffered = bool(os.environ.get("PYTHONUNBUFFERED"))
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = io.TextIOWrapper(
        open(1, "wb", closefd=False),  # noqa: SIM115
        write_through=unbuffered,
    )
    sys.stderr = open(2, "w", 1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    if os.environ.pop("UNDRAWN_PLOTS", None):
        leave_undrawn()
    _, first, *rest = request["words"]
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


def _exit_code(request: dict[str, Any], fds: list[int]) -> int:
    """Run the command: its exit code; what it raises is printed."""
    try:
        _become(request, fds)
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):  # ends Python as the signal would
            sys.stdout.flush()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        return 1
    return 0


def _end(code: int) -> None:
    """End as Python does, but for clearing away all modules, which takes more than a second."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


if __name__ == "__main__":
    sockets = [socket.socket(fileno=int(fd)) for fd in sys.argv[1:]]
    if sockets[1] not in select.select(sockets, [], [])[0]:
        sys.exit()  # nobody ever came
    gc.disable()  # nothing of it is garbage
    for name in PRELOADED:
        importlib.import_module(name)
    _read_options()
    assert len(os.listdir("/proc/self/task")) == 1, "threads were started, which no fork would have"
    gc.freeze()
    gc.enable()
    job = _serve(*sockets)
    if job is None:
        os._exit(0)
    _end(_exit_code(*job))
