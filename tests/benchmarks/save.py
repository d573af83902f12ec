"""Time and bytes of one checkpoint at the paper's sizes: CMSF-2Q, ResNet-50, ImageNet.

    python tests/benchmarks/save.py [FOLDER]

Bank of 128000 rows, previous embeddings of 1,281,167 images, momentum of every parameter; the
numbers in them are random. FOLDER: where to write, 8 GB for a while; default: a temporary one.
"""

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from self_supervised.train_msf_2q import CMSF2Q
from utils.method import checkpoint
from utils.method.encoders import QueryTargetEncoders, build_backbone
from utils.training.run_folder import RunFolder, apart

NUM_IMAGES, BANK = 1_281_167, 128_000
TEN_MINUTES = 10 * 60 * 510  # images at the published speed, 510 a second
TEN_EPOCHS = 10 * NUM_IMAGES / 510  # seconds
REPEATS = 3


def build_state() -> tuple[CMSF2Q, dict]:
    """A model in the middle of training, and what a run would save of it."""
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
    return model, state | {"state_dict": model.state_dict()}


def report(what: str, save: Callable[[], object], folder: Path, *, every: float) -> None:
    """Run a save several times; print its median time, range, bytes and share of the training.

    every: seconds from one such save to the next.
    """
    seconds, written = [], 0
    for _ in range(REPEATS):
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.pth")}
        start = time.perf_counter()
        save()
        seconds.append(time.perf_counter() - start)
        new = [p for p in folder.rglob("*.pth") if before.get(p) != p.stat().st_mtime_ns]
        written = sum(path.stat().st_size for path in new)
    middle = statistics.median(seconds)
    print(
        f"{what:<38}{written / 1e9:6.2f} GB{middle:8.2f} s ({min(seconds):.2f} to "
        f"{max(seconds):.2f}), {100 * middle / every:.2f}% of the time"
    )


def main() -> None:
    """Each kind of save in turn."""
    model, state = build_state()
    place = sys.argv[1] if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory(dir=place) as name:
        folder, stores = RunFolder(Path(name), say=print), {"previous": model.previous}

        def after_ten_minutes() -> None:
            model.previous.saved_in[torch.randperm(NUM_IMAGES)[:TEN_MINUTES]] = 0
            inner["step"] += 1
            folder.save_step(inner, stores)

        whole = partial(folder.save_epoch, state)
        report("everything, after ten epochs", whole, folder.path, every=TEN_EPOCHS)
        with apart(stores.values()):
            inner = state | {"state_dict": model.state_dict()}
        folder.save_step(inner, stores)  # the first one within an epoch writes every row
        report("within an epoch, after ten minutes", after_ten_minutes, folder.path, every=600)
        start = time.perf_counter()
        folder.load(folder.epoch_path(1), stores)
        print(f"reading and verifying all: {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
