"""How a script starts and ends: signals, errors in one line, exit codes, torchrun."""

import atexit
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from utils.runtime import distributed
from utils.runtime.errors import InputError, Interrupted, RunError, printable
from utils.runtime.stop_signals import StopSignals, ignore
from utils.runtime.workers import end_all, forget_workers, worker_failure

# Seconds.
_MAIN_SPEAKS_FIRST = 15
_LOOKS_EVERY = 1  # for torchrun
_TIME_TO_SAVE = 20  # that a process has to stop in order, when torchrun is gone


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run main(): what a user can mend is one line and exit code 2, a broken run exit code 1.

    A script that a signal stopped has the code of `errors.Interrupted`; training saves before.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # A worker that is not forked imports the script, and would begin another run in its folder.
        guard = '`if __name__ == "__main__":` guard'
        print(f"worker processes cannot start without an {guard}", file=sys.stderr, flush=True)
        os._exit(1)
    follow_torchrun()
    atexit.register(_remove_cache_folder)
    code, name = 0, printable(os.path.basename(sys.argv[0]))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a stand-in for a stream may have none
            stream.reconfigure(errors="backslashreplace")  # what it cannot hold ends no run
    signals = StopSignals()
    signals.install()
    try:
        with signals.heeded_at_once():  # outside of training nothing is to be saved
            main()
            distributed.wait_for_all()
    except Interrupted as stop:
        ignore()
        if distributed.is_main():
            print(printable(f"{name}: {stop}"), file=sys.stderr)
        code = stop.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except Exception as error:
        forget_workers()
        reason = _reason(error)
        if reason is None:  # a mistake of ours
            if not distributed.is_launched():
                raise
            reason = traceback.format_exc()
        _say_error(name, reason, signals)
        code = 2 if isinstance(error, InputError) else 1
    if distributed.is_launched():
        # At once: an orderly end would close connections, which with nccl waits for the others, and
        # with gloo now and then aborts (torch 2.14) when threads are left.
        end_all()
        _remove_cache_folder()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _reason(error: Exception) -> str | None:
    """What to say of an error that is the input's, the run's or the machine's; None for others."""
    text = str(error)
    if isinstance(error, (InputError, RunError)):
        return printable(text)
    if isinstance(error, OSError):  # a full or failing disk, a closed pipe
        return printable(f"{error.filename or 'output'}: {error.strerror or error}")
    if not isinstance(error, (MemoryError, RuntimeError)):
        return None
    if reason := worker_failure(error) or distributed.failure(error):
        return reason
    if "does not have a deterministic implementation" in text:
        return f"--deterministic: {text.split(',')[0]}; only without it, or with another --arch"
    if not isinstance(error, MemoryError) and not re.search("alloc|memory", text, re.IGNORECASE):
        return None
    first_line = text.splitlines()[0] if text else "no memory left"
    return f"{first_line}; try a smaller --batch_size, --mem_bank_size or --arch"


def _say_error(name: str, error: str, signals: StopSignals) -> None:
    """Print an error: what all of several processes meet, as a mistake in a flag, once.

    When the main process ends, torchrun ends the others, those that wait here among them.
    """
    prefix = distributed.prefix()
    if not distributed.is_main() and not error.startswith(prefix):
        until = time.monotonic() + _MAIN_SPEAKS_FIRST
        while time.monotonic() < until:
            if signals.received:
                return
            time.sleep(0.1)
        error = prefix + error
    print(f"{name}: error: {error}", file=sys.stderr)


def _remove_cache_folder() -> None:
    """Remove the folder that torch makes for what --compile compiles, where it is empty."""
    folder = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")
    if os.path.basename(folder).startswith("torchinductor_"):
        with suppress(OSError):
            os.rmdir(folder)


def follow_torchrun() -> None:
    """Call at the start of a process that torchrun may have started: tidy up, and end with it.

    If torchrun is killed the process stops too, as by SIGTERM, within half a minute at most.
    torchrun's folders for logs, <temporary>/torchelastic_*/<run>/<attempt>/<rank>, are removed as
    far as empty (it makes them anew if it needs them); one that it got by --log_dir stays.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    folders = list(Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parents)[:4]
    if len(folders) == 4 and folders[-1].name.startswith("torchelastic_"):
        with suppress(OSError):
            for folder in folders:
                folder.rmdir()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _is_gone(torchrun: int) -> bool:
    """Whether it was killed before this process could see who it was: then it is the first one."""
    try:  # in a container torchrun may be the first one
        return torchrun == 1 and b"torch" not in Path("/proc/1/cmdline").read_bytes()
    except OSError:
        return False


def _end_with(torchrun: int) -> None:
    """Wait until this process has another parent; then ask it to stop, and see that it does."""
    while os.getppid() == torchrun and not _is_gone(torchrun):
        time.sleep(_LOOKS_EVERY)
    if os.environ.get("LOCAL_RANK") == "0":
        with suppress(OSError):
            name = os.path.basename(sys.argv[0])
            print(f"{name}: torchrun has ended or was killed, the run stops", file=sys.stderr)
    else:
        time.sleep(2 * _LOOKS_EVERY)  # the first one says why before all stop together
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_TIME_TO_SAVE)
    end_all()
    os._exit(1)
