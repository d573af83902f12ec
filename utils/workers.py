"""Worker processes of the data loaders: the signals they heed, and what is said when one fails."""

import errno
import multiprocessing
import os
import re
import signal
import sys
import threading
from types import TracebackType

from torch import Tensor
from torch.utils.data import get_worker_info

_LESS_MEMORY = "try fewer --num_workers or a smaller --batch_size"
_NO_MEMORY = f"probably the memory is full; {_LESS_MEMORY}"
_NO_SHARED_MEMORY = (
    "probably the shared memory is full, through which workers send images; "
    f"{_LESS_MEMORY}, or a larger /dev/shm (docker run --shm-size 8g)"
)
# What torch says of workers that failed, what to say instead, and the cause.
_FAILURES = (
    (r"unable to .*shared memory", "a worker process could not send its images", _NO_SHARED_MEMORY),
    (
        r"worker \(pid (\d+)\) is killed by signal: Bus error",
        "worker process {} was killed by signal Bus error",
        _NO_SHARED_MEMORY,
    ),
    (
        r"worker \(pid (\d+)\) is killed by signal: Segmentation fault",
        "worker process {} was killed by signal Segmentation fault",
        "probably an image file is damaged so that its decoder crashes; --num_workers 0 may tell",
    ),
    (
        r"worker \(pid (\d+)\) is killed by signal: (.+?)\. ",
        "worker process {} was killed by signal {}",
        _NO_MEMORY,
    ),
    (
        r"worker \(pid(?:\(s\))? ([\d, ]+)\) exited unexpectedly",
        "worker process {} ended unexpectedly",
        _NO_MEMORY,
    ),
    (r"Pin memory thread exited", "the thread that receives images ended", _NO_MEMORY),
    (
        r"Caught MemoryError in .*worker|(?s:worker.*not enough memory|worker.*can't allocate)",
        "a worker process had no memory left",
        _LESS_MEMORY,
    ),
    (
        r"Too many open files|received 0 items of ancdata",
        "worker processes have too many files open",
        "try fewer --num_workers, or a higher limit (ulimit -n)",
    ),
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


def worker_failure(error: BaseException) -> str | None:
    """One line on what happened to a worker, why and what to try; None for any other error.

    torch raises a RuntimeError in the main thread, wherever it is, when a worker process has died.
    """
    for pattern, what, cause in _FAILURES:
        if found := re.search(pattern, str(error)):
            return f"{what.format(*found.groups())}: {cause}"
    return None


def start_failure(error: OSError) -> str:
    """One line on an error of the system while workers were started or spoken to."""
    cause = _NO_SHARED_MEMORY if error.errno == errno.ENOSPC else _NO_MEMORY
    return f"worker processes cannot run ({error.strerror or error}): {cause}"


def forget_workers() -> None:
    """From here on no worker's end is an error: the process itself is ending.

    torch would raise once more, at any place, when another worker ends after one was killed.
    """
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def check_room(num_workers: int) -> None:
    """Make and drop what torch needs to start workers; OSError where there is no room for it.

    It lies in the shared memory. torch itself would print a traceback beside the error.
    """
    _ = multiprocessing.Event(), [multiprocessing.Queue() for _ in range(num_workers + 1)]


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


def _end_when_told(main_process: int) -> None:
    """Wait for the main process' SIGTERM, passing over that of others, and end at once."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process:
        pass
    os._exit(0)  # any other code would be reported as a failure
