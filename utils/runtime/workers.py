"""Worker processes of the data loaders: the signals they heed, and what is said when one fails."""

import errno
import multiprocessing
import multiprocessing.util
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType

from torch import Tensor
from torch.utils.data import get_worker_info

_LESS_MEMORY = "try fewer --num_workers or a smaller --batch_size"
_NO_MEMORY = f"probably the memory is full; {_LESS_MEMORY}"
_NO_SHARED_MEMORY = (
    "probably the shared memory is full, through which workers send images; "
    f"{_LESS_MEMORY}, or a larger /dev/shm (docker run --shm-size 8g)"
)
_NO_FILES = "try fewer --num_workers, or a higher limit (ulimit -n)"
_DECODER = "probably an image file is damaged so that its decoder crashes; --num_workers 0 may tell"
_BY_SIGNAL = {"Bus error": _NO_SHARED_MEMORY, "Segmentation fault": _DECODER}
# What torch says of workers that failed, what to say instead, and the cause.
_FAILURES = (
    (
        r"Too many open files|received 0 items of ancdata",
        "worker processes have too many files open",
        _NO_FILES,
    ),
    (
        r"unable to open shared memory[^:]*: ([^\n]+)",
        "a worker process cannot use the shared memory, through which it sends images ({})",
        "see that /dev/shm is there and can be written to, or try --num_workers 0",
    ),
    (r"unable to .*shared memory", "a worker process could not send its images", _NO_SHARED_MEMORY),
    (r"Pin memory thread exited", "the thread that receives images ended", _NO_MEMORY),
    (
        r"Caught MemoryError in .*worker|(?s:worker.*not enough memory|worker.*can't allocate)",
        "a worker process had no memory left",
        _LESS_MEMORY,
    ),
)
# What may help where the system refuses to start a worker, by the number of its error.
_BY_ERROR = {
    errno.ENOSPC: _NO_SHARED_MEMORY,
    errno.ENOMEM: _NO_MEMORY,
    errno.EMFILE: _NO_FILES,
    errno.ENFILE: _NO_FILES,
    errno.EAGAIN: "try fewer --num_workers, or a higher limit of processes (ulimit -u)",
}
_NO_GUARD = 78  # the exit code of a worker that was about to run the script once more
_SAYS = re.compile(
    r"worker \(pid(?:\(s\))? ([\d, ]+)\) (?:is killed by signal: (.+?)\. |exited unexpectedly"
    r"(?: with exit code (\d+))?)"
)


def cores() -> int:
    """How many processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def too_many(num_workers: int) -> str | None:
    """Why so many workers make a run slow here; None where there is a core for each."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if num_workers * processes <= cores():
        return None
    each = f" in each of {processes} processes" if processes > 1 else ""
    return f"more worker processes{each} than the {cores()} cores here, which is slow"


def worker_failure(
    error: BaseException, workers: Iterable[multiprocessing.Process] = ()
) -> str | None:
    """One line on what happened to a worker, why and what to try; None for any other error.

    torch raises a RuntimeError in the main thread, wherever it is, when a worker process has died.
    workers: those of the loader; their exit codes tell more than the error does.
    """
    text = str(error)
    died = _SAYS.search(text)
    if died or isinstance(error, (ConnectionError, EOFError, FileNotFoundError)):
        for worker in workers:
            worker.join(0.1)  # its end may be a moment away
            if worker.exitcode:
                return _end_of(str(worker.pid), worker.exitcode)
    if died:
        numbers, name, code = died.groups()
        return _end_of(numbers, int(code) if code else None, signal_name=name)
    for pattern, what, cause in _FAILURES:
        if found := re.search(pattern, text):
            return f"{what.format(*found.groups())}: {cause}"
    if isinstance(error, (OSError, ImportError)) and "in DataLoader worker process" in text:
        return f"a worker process failed: {text.strip().splitlines()[-1]}"
    return None


def _end_of(numbers: str, code: int | None, *, signal_name: str | None = None) -> str:
    """What is to be said of workers (their process numbers) that ended."""
    if code == _NO_GUARD:
        return (
            "worker processes cannot start: the script has no "
            '`if __name__ == "__main__":` guard, '
            f"which start method {multiprocessing.get_start_method()} needs (forkserver is the "
            "default since Python 3.14)"
        )
    if code is not None and code < 0:
        signal_name = signal.strsignal(-code) or str(-code)
    if signal_name:
        cause = _BY_SIGNAL.get(signal_name, _NO_MEMORY)
        return f"worker process {numbers} was killed by signal {signal_name}: {cause}"
    if code:
        return f"worker process {numbers} ended with exit code {code}: what it printed says why"
    return (
        f"worker process {numbers} ended unexpectedly: what it printed says why, if it did; "
        f"otherwise {_NO_MEMORY}"
    )


def start_failure(error: OSError) -> str:
    """One line on an error of the system while workers were started or spoken to."""
    cause = _BY_ERROR.get(error.errno, "--num_workers 0 does without them")
    place = f"{error.filename}: " if error.filename else ""
    return f"worker processes cannot run ({place}{error.strerror or error}): {cause}"


def check_is_main() -> None:
    """End a worker that runs the script itself, at its start, because the script has no guard.

    Workers that are not forked import the script. Without `if __name__ == "__main__":` they would
    run it: they would begin another run in the folder of this one.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(_NO_GUARD)


def end_all() -> None:
    """End the workers and remove their folder, for a process that is about to end at once."""
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(1)
    remove_folder()


def remove_folder() -> None:
    """Remove the folder of the workers' sockets; made for that if it was not there."""
    with suppress(OSError):
        shutil.rmtree(multiprocessing.util.get_temp_dir())


def forget_workers() -> None:
    """From here on no worker's end is an error: the process itself is ending.

    torch would raise once more, at any place, when another worker ends after one was killed.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def check_room(num_workers: int) -> None:
    """Make and drop what torch needs to start workers; OSError where there is no room for it.

    That is shared memory and open files. torch itself would print a traceback beside the error. The
    folder of the workers' sockets is made here too, and stays: so they share that of the main
    process, which goes when it ends; one of a worker's own would stay where a signal ends it.
    """
    check_is_main()
    multiprocessing.util.get_temp_dir()
    each = range(num_workers + 1)
    _ = [multiprocessing.Queue() for _ in each], [multiprocessing.Pipe() for _ in each]
    multiprocessing.Event()


def share(*tensors: Tensor) -> None:
    """In a worker, move tensors to the shared memory now, so that an error for want of it arrives.

    torch does it when it sends them, in a thread whose error only loses the batch: the main process
    would wait for it forever.
    """
    if get_worker_info() is not None:
        for tensor in tensors:
            tensor.share_memory_()


def ignore_signals(worker_id: int) -> None:
    """At the start of a worker: leave signals to the main process, and end when it says so.

    A cluster, or Ctrl-C, sends them to every process of a job. The main process still needs batches
    to finish its step; workers end with it, or by the SIGTERM that it sends where they do not.
    """
    sys.excepthook = _be_quiet_at_the_end
    multiprocessing.util.Finalize(None, _tidy_up_after, args=(os.getppid(),), exitpriority=100)
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS: there SIGTERM ends a worker, whoever sent it
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        main_process = multiprocessing.parent_process().pid
        threading.Thread(target=_end_when_told, args=(main_process,), daemon=True).start()


def _be_quiet_at_the_end(kind: type, error: BaseException, traceback: TracebackType) -> None:
    """Print an error, unless it is that the main process, which has its say, has gone away."""
    if not issubclass(kind, (ConnectionError, EOFError)):
        sys.__excepthook__(kind, error, traceback)


def _tidy_up_after(parent: int) -> None:
    """Before anything else at the end of a worker: if the main process was killed, remove all."""
    if os.getppid() != parent:
        remove_folder()
        os._exit(0)


def _end_when_told(main_process: int) -> None:
    """Wait for the main process' SIGTERM, passing over that of others, and end at once."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process:
        pass
    os._exit(0)  # any other code would be reported as a failure
