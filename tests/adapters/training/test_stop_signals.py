"""Signals: when they end a program, and with what code."""

import os
import signal
import time

import pytest
from quickchange_adapters.training.stop_signals import (
    SAME_S,
    SIGNALS,
    Interrupted,
    Stopped,
    StopSignals,
)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_it_at_once_where_nobody_holds_it(number: int) -> None:
    before = signal.getsignal(number)
    signals = StopSignals()
    with pytest.raises(Interrupted) as caught, signals.obeyed():
        send(number)
    assert not isinstance(caught.value, Stopped)
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) == before


def steps(signals: StopSignals, sent: dict[int, int], done: list[int]) -> None:
    """Do four steps, and get a signal in those that are named."""
    with signals.obeyed(), signals.held():
        for step in range(4):
            if step in sent:
                send(sent[step])
            done.append(step)
            signals.obey()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_held_signal_waits_for_the_next_good_moment(number: int) -> None:
    done: list[int] = []
    with pytest.raises(Stopped) as caught:
        steps(StopSignals(), {1: number}, done)
    assert (done, caught.value.exit_code) == ([0, 1], 128 + number)


def hold(pause_s: float, done: list[str]) -> None:
    """Get two signals, and never ask for them."""
    signals = StopSignals()
    with signals.obeyed(), signals.held():
        send(signal.SIGINT)
        time.sleep(pause_s)
        send(signal.SIGTERM)
        done.append("went on")


def test_a_second_signal_at_once_is_the_same_wish_and_is_obeyed_at_the_end() -> None:
    done: list[str] = []
    with pytest.raises(Stopped) as caught:
        hold(0, done)
    assert (done, caught.value.exit_code) == (["went on"], 130)


def test_a_later_second_signal_ends_it_at_once() -> None:
    done: list[str] = []
    with pytest.raises(Interrupted) as caught:
        hold(SAME_S * 1.1, done)
    assert not isinstance(caught.value, Stopped)
    assert (done, caught.value.exit_code) == ([], 143)


def test_what_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        signals = StopSignals()
        with signals.obeyed(), signals.held():
            send(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


class ToldLate(StopSignals):
    """Gets a signal just after it was asked whether there was one."""

    def obey(self) -> None:
        """Ask, and be told."""
        super().obey()
        send(signal.SIGTERM)


def test_a_signal_after_the_last_question_is_not_lost() -> None:
    signals = ToldLate()
    with pytest.raises(Interrupted) as caught, signals.obeyed(), signals.held():
        pass
    assert caught.value.exit_code == 143
