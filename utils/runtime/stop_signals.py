"""Signals that ask a run to stop: noted when they come, heeded where nothing is lost."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from utils.runtime.errors import Interrupted

# What clusters and launchers send ahead of stopping a process.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
# Python drops what a handler raises while it forks a process or deletes an object: raised again
# after so many seconds.
_AGAIN = 0.2


def ignore() -> None:
    """From here on signals to stop pass by: the process ends anyway, and with its own code."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class StopSignals:
    """Between `install` and `restore` a signal only sets `received`. A second Ctrl-C interrupts.

    noted: called when one comes.
    """

    def __init__(self, noted: Callable[[], None] = lambda: None) -> None:
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
        """Raise `Interrupted` when a signal comes within, and at the start if one came before."""
        self._at_once = True
        try:
            self._remind()
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
        self._remind()

    def _remind(self, *_: object) -> None:
        if self._at_once and self.received:
            code = 130 if self.received == signal.SIGINT else 75
            raise Interrupted(f"stopped by {self.received.name}", exit_code=code)
