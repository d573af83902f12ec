"""Time and bytes of one checkpoint at the paper's sizes: CMSF-2Q, ResNet-50, ImageNet.

    python tests/benchmarks/save.py [FOLDER]

Bank of 128000 rows, previous embeddings of 1,281,167 images, momentum of every parameter; the
numbers in them are random. FOLDER: where to write, 8 GB for a while; default: a temporary one.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from self_supervised.train_msf_2q import CMSF2Q
from utils.method import checkpoint
from utils.method.encoders import QueryTargetEncoders, build_backbone
from utils.runtime.torch_file import is_finite
from utils.training.run_folder import RunFolder

NUM_IMAGES, BANK = 1_281_167, 128_000
EVERY = 10 * 60  # seconds from one save to the next, the default of --save_minutes
REPEATS = 3


def build_state() -> dict:
    """What a run would save in the middle of training."""
    torch.manual_seed(0)
    backbone = build_backbone("resnet50")
    encoders = QueryTargetEncoders(backbone.module, backbone.feature_dim)
    model = CMSF2Q(encoders, NUM_IMAGES, mem_bank_size=BANK, topk=5, topkp=5)
    for store in (model.bank.features, model.bank.previous, model.previous.embeddings):
        store.uniform_(-1, 1)
    model.previous.seen.fill_(True)
    optimizer = torch.optim.SGD(encoders.parameters(), lr=0.1, momentum=0.9)
    for parameter in encoders.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    state = {
        "format": checkpoint.FORMAT,
        "epoch": 1,
        "step": 1,
        "optimizer": optimizer.state_dict(),
    }
    return state | {"state_dict": model.state_dict()}


def main() -> None:
    """Some saves, and reading what they wrote."""
    state = build_state()
    seconds = []
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if len(sys.argv) > 1 else None) as name:
        folder = RunFolder(Path(name))
        for _ in range(REPEATS):
            start = time.perf_counter()
            finite = all(map(is_finite, state["state_dict"].values()))  # as `Run` asks
            assert finite
            path = folder.save(state)
            seconds.append(time.perf_counter() - start)
        middle = statistics.median(seconds)
        print(
            f"{path.stat().st_size / 1e9:.2f} GB in {middle:.2f} s ({min(seconds):.2f} to "
            f"{max(seconds):.2f}, n {REPEATS}), {100 * middle / EVERY:.2f}% of ten minutes"
        )
        start = time.perf_counter()
        folder.load(path)
        print(f"reading and verifying it: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
