"""What `test_distributed_eval` starts under torchrun: several evaluations, one after the other.

    torchrun --nproc_per_node=2 tests/evaluation_worker.py COMMANDS.json

COMMANDS.json: a list of [module, flag, ...]. Each process writes what ended a command, an error's
text or "", to COMMANDS.json.RANK, as a list. The last command may leave the others.
"""

import importlib
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.runtime import distributed, script
from utils.runtime.errors import InputError


def main() -> None:
    """Run the commands in processes that join once."""
    commands = Path(sys.argv[1])
    distributed.start(torch.device("cpu"))
    distributed.start = lambda device: device
    rank, errors = distributed.rank(), []
    for module, *flags in json.loads(commands.read_text()):
        sys.argv = [module, *flags]
        try:
            importlib.import_module(module).main()
        except InputError as error:
            errors.append(str(error))
        else:
            errors.append("")
        distributed.wait_for_all()  # one may read what another wrote
    Path(f"{commands}.{rank}").write_text(json.dumps(errors))


if __name__ == "__main__":
    script.run_script(main)
