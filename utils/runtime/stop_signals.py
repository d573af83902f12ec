"""Signals that ask a run to stop: noted when they come, heeded where nothing is lost."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

# What clusters and launchers send ahead of stopping a process.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


# Python drops what a handler raises while it forks a process or deletes an object: raised again
# after so many seconds.
_AGAIN = 0.2


class Stopped(Exception):
    """A signal came within `StopSignals.heeded_at_once`."""


def ignore() -> None:
    """From here on signals to stop pass by: the process ends anyway, and with its own code."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopSignals:
    """Between `install` and `restore` a signal only sets `received`. A second Ctrl-C interrupts.

    stopped: what is raised where signals are heeded at once. noted: called when one comes.
    """

    def __init__(
        self,
        stopped: Callable[[signal.Signals], Exception] | None = None,
        *,
        noted: Callable[[], None] = lambda: None,
    ) -> None:
        self._stopped = stopped or (lambda received: Stopped())
        self._noted = noted
        self.received: signal.Signals | None = None
        self._at_once = False
        self._before: dict = {}

    def install(self) -> None:
        """Note signals from here on."""
        self._before = {n: signal.signal(n, self._note) for n in (*STOP_SIGNALS, signal.SIGINT)}
        self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._remind)

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
                raise self._stopped(self.received)
            yield
        finally:
            self._at_once = False
            signal.setitimer(signal.ITIMER_REAL, 0)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = signal.Signals(number)
        self._noted()
        if self._at_once:
            signal.setitimer(signal.ITIMER_REAL, _AGAIN, _AGAIN)
            raise self._stopped(self.received)

    def _remind(self, number: int, frame: FrameType | None) -> None:
        if self._at_once and self.received:
            raise self._stopped(self.received)
