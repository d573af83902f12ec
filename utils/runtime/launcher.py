"""The launcher, torchrun: the folder that it leaves, and processes that outlive it."""

import os
import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from utils.runtime import workers

_LOOKS_EVERY = 1  # seconds
_TIME_TO_SAVE = 20  # seconds that a process has to stop in order, when its launcher is gone


def follow() -> None:
    """Call at the start of a process that torchrun may have started.

    The folder in which torchrun keeps logs, if it is asked for any, is removed where it is empty.
    If torchrun is killed the process stops too, as by SIGTERM, within half a minute at most.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    _remove_folder()
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _remove_folder() -> None:
    """Remove the folders <temporary>/torchelastic_*/<run>/<attempt>/<rank> as far as empty.

    Of several processes the last one removes what all share. (torchrun only looks whether an error
    file was written there, and makes the folders anew for another attempt.) A folder that torchrun
    got by --log_dir stays.
    """
    folders = list(Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parents)[:4]
    if len(folders) == 4 and folders[-1].name.startswith("torchelastic_"):
        with suppress(OSError):
            for folder in folders:
                folder.rmdir()


def _is_gone(launcher: int) -> bool:
    """Whether it was killed before this process could see who it was: then it is the first one."""
    if launcher != 1:
        return False
    try:
        return b"torch" not in Path("/proc/1/cmdline").read_bytes()  # in a container it may be
    except OSError:
        return False


def _end_with(launcher: int) -> None:
    """Wait until this process has another parent; then ask it to stop, and see that it does."""
    while os.getppid() == launcher and not _is_gone(launcher):
        time.sleep(_LOOKS_EVERY)
    if os.environ.get("LOCAL_RANK") == "0":
        with suppress(OSError):
            name = os.path.basename(sys.argv[0])
            print(f"{name}: torchrun has ended or was killed, the run stops", file=sys.stderr)
    else:
        time.sleep(2 * _LOOKS_EVERY)  # the first one says why before all stop together
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_TIME_TO_SAVE)
    workers.end_all()
    os._exit(1)
