"""Ctrl-C and SIGTERM: they end a command with 130 and 143; work that can may be told instead of ended."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """A signal ended the work. The text says what is saved."""

    def __init__(self, number: int = signal.SIGINT, saved: str = "") -> None:
        super().__init__(saved)
        self.number = int(number)


def number_of(stop: KeyboardInterrupt) -> int:
    """The signal that it stands for."""
    return stop.number if isinstance(stop, Interrupted) else int(signal.SIGINT)


class Ending:
    """The handler of a command's process. A child that inherits it ends as without it."""

    def __init__(self) -> None:
        self.process = os.getpid()

    def __call__(self, number: int, frame: Any) -> None:
        if os.getpid() == self.process:
            raise Interrupted(number)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Inside, a signal raises Interrupted; one that is ignored (nohup) stays so."""
    with _handled_by(Ending()):
        yield


@contextmanager
def told_of_signals(tell: Callable[[int], None]) -> Iterator[None]:
    """Inside, `tell` hears of signals, which end nothing. Only within `ended_by_signals`: a program that uses
    this package as a library keeps its own handlers.
    """
    present = signal.getsignal(signal.SIGTERM)
    if not isinstance(present, Ending) or present.process != os.getpid():
        yield
        return
    with _handled_by(lambda number, frame: tell(number)):
        yield


@contextmanager
def _handled_by(handler: Callable[[int, Any], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, handler) for number in heeded}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
