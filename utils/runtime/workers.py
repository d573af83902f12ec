"""Worker processes of the data loaders: the signals they heed, and what is said when one fails."""

import multiprocessing
import multiprocessing.util
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

from torch import Tensor
from torch.utils.data import get_worker_info

_ADVICE = (
    "try fewer --num_workers (0: none) or a smaller --batch_size if the memory may be full, more "
    "shared memory (/dev/shm; docker run --shm-size 8g), or more open files (ulimit -n)"
)
# In errors that torch raises for workers in the main thread, wherever it is.
_OF_WORKERS = re.compile(
    r"DataLoader worker|Pin memory thread|unable to .*shared memory|ancdata|Too many open files"
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
    error: BaseException, workers: Sequence[multiprocessing.Process] | None = None
) -> str | None:
    """One line on what happened to a worker and what to try; None for any other error.

    workers: those of the loader that the error came from, whose exit codes tell more than it does;
    None: it came from elsewhere.
    """
    text = str(error)
    if workers:
        time.sleep(0.1)  # the end of one may be a moment away
    if ended := next((worker for worker in workers or () if worker.exitcode), None):
        if ended.exitcode > 0:
            how = f"ended with exit code {ended.exitcode}, what it printed says why"
        else:
            how = f"was killed by signal {signal.strsignal(-ended.exitcode)}"
        return f"DataLoader worker (pid {ended.pid}) {how}: {_ADVICE}"
    if "in DataLoader worker process" in text:  # raised there; a mistake of ours is no failure
        if not isinstance(error, (OSError, ImportError, MemoryError)) and "memory" not in text:
            return None
        return f"a worker process failed: {text.strip().splitlines()[-1]}; {_ADVICE}"
    if isinstance(error, OSError) and workers is not None:
        place = f"{error.filename}: " if error.filename else ""
        return f"worker processes cannot run ({place}{error.strerror or error}): {_ADVICE}"
    if isinstance(error, RuntimeError) and _OF_WORKERS.search(text):
        return f"{text.splitlines()[0].split('. ')[0]}: {_ADVICE}"
    return None


def check_room(num_workers: int) -> None:
    """Make and drop what torch needs to start workers; OSError where there is no room for it.

    That is shared memory and open files. torch itself would print a traceback beside the error. The
    folder of the workers' sockets is made here too, and stays: so they share that of the main
    process, which goes when it ends; one of a worker's own would stay where a signal ends it.
    """
    multiprocessing.util.get_temp_dir()
    each = range(num_workers + 1)
    _ = [multiprocessing.Queue() for _ in each], [multiprocessing.Pipe() for _ in each]


def end_all() -> None:
    """End the workers and remove their folder, for a process that is about to end at once."""
    workers = multiprocessing.active_children()
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(1)
    _remove_folder()


def _remove_folder() -> None:
    with suppress(OSError):
        shutil.rmtree(multiprocessing.util.get_temp_dir())


def forget_workers() -> None:
    """From here on no worker's end is an error: the process itself is ending.

    torch would raise once more, at any place, when another worker ends after one was killed.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


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
        _remove_folder()
        os._exit(0)


def _end_when_told(main_process: int) -> None:
    """Wait for the main process' SIGTERM, passing over that of others, and end at once."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main_process:
        pass
    os._exit(0)  # any other code would be reported as a failure
