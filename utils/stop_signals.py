"""Signals that ask a run to stop: noted when they come, heeded where nothing is lost."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# What clusters and launchers send ahead of stopping a process.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Stopped(Exception):
    """A signal came within `StopSignals.heeded_at_once`."""


class StopSignals:
    """Between `install` and `restore` a signal only sets `received`. A second Ctrl-C interrupts."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._at_once = False
        self._before: dict = {}

    def install(self) -> None:
        """Note signals from here on."""
        self._before = {n: signal.signal(n, self._note) for n in (*STOP_SIGNALS, signal.SIGINT)}

    def restore(self) -> None:
        """Give signals back to whoever had them."""
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def heeded_at_once(self) -> Iterator[None]:
        """Raise `Stopped` when a signal comes within, and at the start if one has come before."""
        self._at_once = True
        try:
            if self.received:
                raise Stopped
            yield
        finally:
            self._at_once = False

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        if self._at_once:
            raise Stopped
