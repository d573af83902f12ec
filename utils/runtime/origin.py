"""What a run or a figure came from: command, versions, machine."""

import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch

from utils.runtime import distributed, faiss_library

ROOT = Path(__file__).resolve().parents[2]


def versions() -> dict[str, str]:
    """Python and the packages that decide what comes out; faiss: "none" without it."""
    import torchvision  # here, as it takes as long to import as torch itself

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": np.__version__,
        "faiss": faiss_library.version(),
    }


def command() -> str:
    """The command this process was started with, as one would type it."""
    return shlex.join(["python", *sys.argv])


def of_start(device: torch.device) -> dict:
    """What a run says of the process it starts in, of builtins; see `RunFolder.describe`.

    started: UTC, ISO 8601. script: path below the repository's root, if it is there. device: the
    GPU's name or the device's kind.
    """
    script, on_gpu = Path(sys.argv[0]).resolve(), device.type == "cuda"
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "script": str(script).removeprefix(f"{ROOT}/"),
        "command": command(),
        "versions": versions(),
        "processes": distributed.world_size(),
        "device": torch.cuda.get_device_name(device) if on_gpu else device.type,
    }
