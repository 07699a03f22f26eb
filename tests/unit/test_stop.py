"""Signals that ask for a clean end."""

import signal
import threading

import pytest

from runtime_jax.training.stop import Stop, StoppedError

SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_work_at_the_next_check(number):
    before, done = signal.getsignal(number), []
    refused = pytest.raises(StoppedError, match=f"^stopped by {number.name}; once more$")
    with refused as caught, Stop() as stop, stop.parts("; once more"):
        for part in range(3):
            stop.check()
            if part == 1:
                signal.raise_signal(number)
            done.append(part)
    assert done == [0, 1] and caught.value.status == SIGNALS[number]
    assert signal.getsignal(number) is before


def test_work_that_is_done_when_the_signal_comes_is_not_stopped():
    with Stop() as stop:
        with stop.parts(""):
            signal.raise_signal(signal.SIGTERM)
        assert stop.requested(1)


def test_other_errors_pass():
    with Stop() as stop, pytest.raises(ZeroDivisionError), stop.parts(""):
        raise ZeroDivisionError


@pytest.fixture
def interruptible():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    yield
    signal.signal(signal.SIGINT, before)


def test_a_second_signal_ends_it_at_once_unless_it_is_an_echo(monkeypatch, interruptible):
    with pytest.raises(KeyboardInterrupt), Stop() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # from the launcher, after the terminal's
        monkeypatch.setattr("time.monotonic", lambda at=stop._at: at + 2)
        signal.raise_signal(signal.SIGINT)


def test_other_threads_cannot_be_asked():
    def work():
        with Stop() as stop:
            names.append(stop.name)

    names = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert names == [None]
