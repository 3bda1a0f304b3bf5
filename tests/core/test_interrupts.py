"""Signals that wait for the end of a step."""

from __future__ import annotations

import signal

import pytest

from bessemer.core.concurrency import DeferredInterrupts


@pytest.fixture
def handled():
    """Sets a handler of a signal for a test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield signal.signal
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_waits_until_it_is_delivered(handled):
    # the tests themselves may run in the background
    handled(signal.SIGINT, signal.default_int_handler)
    with DeferredInterrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            interrupts.deliver()


def test_a_signal_that_is_ignored_stays_so(handled):
    # as of what a script runs in the background
    handled(signal.SIGINT, signal.SIG_IGN)
    with DeferredInterrupts() as interrupts:
        signal.raise_signal(signal.SIGINT)
        assert interrupts.received is None
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("heard", [True, False])
def test_what_has_stopped_never_goes_on(handled, heard):
    # of one's own, which returns
    handled(signal.SIGTERM, lambda number, frame: None)
    with DeferredInterrupts() as interrupts:
        if heard:
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            interrupts.deliver()
