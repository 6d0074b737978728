"""Signals that ask a training to stop, those that do not, and what a second one does."""

from __future__ import annotations

import os
import signal

import pytest

from rsnet.training import signals
from rsnet.training.signals import SIGNALS, StopRequest, TrainingInterrupted


class _Ended(Exception):  # noqa: N818
    pass


@pytest.fixture
def exits(monkeypatch):
    def _exit(code: int) -> None:
        raise _Ended(code)

    monkeypatch.setattr(signals.os, "_exit", _exit)


def _send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("name", ["HUP", "INT", "TERM", "USR1", "USR2", "XCPU"])
def test_a_signal_is_noted_and_its_handler_put_back(name):
    number = signal.Signals[f"SIG{name}"]
    before, stop = signal.getsignal(number), StopRequest()
    with stop.listening():
        _send(number)
    assert stop.number == number
    assert signal.getsignal(number) is before
    assert TrainingInterrupted(number, "x").exit_code == 128 + number


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(number):
    before, stop = signal.signal(number, signal.SIG_IGN), StopRequest()
    try:
        with stop.listening():
            _send(number)
        assert stop.number == 0
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.usefixtures("exits")
@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_signal_ends_unless_it_is_one_that_is_repeated(number):
    stop = StopRequest()
    with stop.listening():
        _send(signal.SIGTERM)
        if number in (signal.SIGHUP, signal.SIGXCPU):
            _send(number)
        else:
            with pytest.raises(_Ended, match=str(128 + number)):
                _send(number)
    assert stop.number == signal.SIGTERM


@pytest.mark.usefixtures("exits")
def test_signals_are_noted_after_a_stop_until_all_is_done():
    """Another rank's signal stopped this one, whose own comes while it uploads."""
    before, stop = signal.getsignal(signal.SIGTERM), StopRequest()
    with signals.handlers_put_back():
        with pytest.raises(TrainingInterrupted), stop.listening():
            raise TrainingInterrupted(signal.SIGTERM, "x")
        _send(signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        _send(signal.SIGXCPU)
        with pytest.raises(_Ended, match="143"):
            _send(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(KeyError), stop.listening():
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) is before
