"""BYOL here and in another library, lightly 1.6.0: images a second of the whole training loop.

    pip install lightly==1.6.0 && python tests/benchmarks/peer.py [--rounds 9]

One-sided (here `train_msf.py --demo --topk 1`) and symmetric (`--symmetric`): conv4, 32 px, batch
64, heads of the demo's sizes, the demo's image files, one thread and one worker. Both views are
strong on both sides. Ours: what the script builds of its flags, loader, method and `Run`. Theirs:
the example of lightly's documentation with its transforms, heads, loss and moving average, the same
backbone, torch's SGD and DataLoader; `--channels_last` gives it that layout too. A round is some
epochs; the sides take turns. Medians with lowest and highest, and of each round's ratio.
"""

import argparse
import contextlib
import copy
import gc
import io
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from self_supervised import train_msf
from utils.cli import build_training, options
from utils.data import demo_data
from utils.method.encoders import build_backbone

try:
    from lightly.loss import NegativeCosineSimilarity
    from lightly.models.modules import BYOLPredictionHead, BYOLProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from lightly.transforms import byol_transform
except ImportError as error:
    sys.exit(f"peer.py: compares with lightly (pip install lightly==1.6.0): {error}")

SIZE, BATCH, LEARNING_RATE = 32, 64, 0.05
MOMENTUM = options.DEMO["momentum"]
DIMS = options.DEMO["hidden_dim"], options.DEMO["proj_dim"]


class Theirs(nn.Module):
    """BYOL as in lightly's documentation."""

    def __init__(self) -> None:
        super().__init__()
        backbone = build_backbone("conv4")
        self.backbone = backbone.module
        self.projection_head = BYOLProjectionHead(backbone.feature_dim, *DIMS)
        self.prediction_head = BYOLPredictionHead(DIMS[1], *DIMS)
        self.backbone_momentum = copy.deepcopy(self.backbone)
        self.projection_head_momentum = copy.deepcopy(self.projection_head)
        deactivate_requires_grad(self.backbone_momentum)
        deactivate_requires_grad(self.projection_head_momentum)

    def forward(self, x: Tensor) -> Tensor:
        return self.prediction_head(self.projection_head(self.backbone(x).flatten(start_dim=1)))

    def forward_momentum(self, x: Tensor) -> Tensor:
        y = self.backbone_momentum(x).flatten(start_dim=1)
        return self.projection_head_momentum(y).detach()


def their_loader(folder: Path) -> DataLoader:
    """Two strong views of ours, as far as the transforms' options go."""
    view = {"input_size": SIZE, "cj_sat": 0.4, "min_scale": 0.2}
    view |= {"gaussian_blur": 0.0, "solarization_prob": 0.0}
    transform = byol_transform.BYOLTransform(
        view_1_transform=byol_transform.BYOLView1Transform(**view),
        view_2_transform=byol_transform.BYOLView2Transform(**view),
    )
    return DataLoader(
        torchvision.datasets.ImageFolder(str(folder), transform=transform),
        batch_size=BATCH,
        shuffle=True,
        drop_last=True,
        num_workers=1,
        persistent_workers=True,
    )


def theirs(folder: Path, *, symmetric: bool, channels_last: bool) -> Callable[[int], int]:
    """Epochs -> the number of images trained on."""
    model, loader, criterion = Theirs(), their_loader(folder), NegativeCosineSimilarity()
    if channels_last:
        model.to(memory_format=torch.channels_last)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LEARNING_RATE, momentum=0.9, weight_decay=1e-4)

    def train(epochs: int) -> int:
        for _ in range(epochs):
            for (x0, x1), *_ in loader:
                update_momentum(model.backbone, model.backbone_momentum, m=MOMENTUM)
                update_momentum(model.projection_head, model.projection_head_momentum, m=MOMENTUM)
                loss = criterion(model(x0), model.forward_momentum(x1))
                if symmetric:
                    loss = 0.5 * (loss + criterion(model(x1), model.forward_momentum(x0)))
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        return epochs * len(loader) * BATCH

    return train


def ours(output: str, *flags: str) -> Callable[[int], int]:
    """Epochs -> the number of images trained on; output: folder of the run's files."""
    fixed = ["--demo", "--topk", "1", "--batch_size", str(BATCH), "--num_workers", "1"]
    fixed += ["--epochs", "100000", "--save_freq", "100000", "--save_minutes", "0"]
    sys.argv = ["train_msf.py", *fixed, "--knn_freq", "-1", "--checkpoint_path", output, *flags]
    args = train_msf.parse_args()
    args.weak_strong = False  # the demo's target sees the weak view, which is less work
    images, _ = build_training.read_training_data(args)
    loader, encoders = (
        build_training.build_loader(args, images),
        build_training.build_encoders(args),
    )
    model = train_msf.MSF(encoders, mem_bank_size=args.mem_bank_size, topk=args.topk)
    model = build_training.place(args, model)
    optimizer = build_training.build_optimizer(args, model)
    run = build_training.build_run(args, model, optimizer, loader=loader, val=None)
    batches = run.batches(loader)

    def train(epochs: int) -> int:
        for batch in itertools.islice(batches, epochs * len(loader)):
            run.step(*run.forward(batch))
        return epochs * len(loader) * BATCH

    return train


def measure(
    sides: dict[str, Callable[[int], int]], epochs: int, rounds: int
) -> dict[str, list[float]]:
    """Images a second of each side in each round, a warm-up round left out."""
    speeds = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, train in sides.items():
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()):  # the run's log
                images = train(epochs)
            if number:
                speeds[name].append(images / (time.perf_counter() - start))
    return speeds


def build_sides(output: str, args: argparse.Namespace, *, symmetric: bool) -> dict:
    """Name -> what trains for some epochs, theirs first."""
    folder = demo_data.draw_data_set(options.DEMO_FOLDER) / "train"
    flags = ["--symmetric"] * symmetric
    sides = {"lightly": theirs(folder, symmetric=symmetric, channels_last=args.channels_last)}
    with contextlib.redirect_stdout(io.StringIO()):
        sides["ours"] = ours(f"{output}/{symmetric}", *flags)
    return sides


def main() -> None:
    """Measure both kinds of loss, and print a line for each side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--epochs", type=int, default=2, help="of a round")
    parser.add_argument("--channels_last", action="store_true", help="for lightly too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"images/s, median (lowest to highest) of {args.rounds} rounds of {args.epochs} epochs")
    with tempfile.TemporaryDirectory() as output:
        for kind, symmetric in (("one-sided", False), ("symmetric", True)):
            speeds = measure(
                build_sides(output, args, symmetric=symmetric), args.epochs, args.rounds
            )
            for name, values in speeds.items():
                ratios = [own / peer for own, peer in zip(values, speeds["lightly"], strict=True)]
                print(
                    f"{kind}, {name:11} {statistics.median(values):6.0f} ({min(values):.0f} to "
                    f"{max(values):.0f})  {statistics.median(ratios):.2f} x lightly "
                    f"({min(ratios):.2f} to {max(ratios):.2f})",
                    flush=True,
                )
            gc.collect()  # a worker of the next loaders must not do it for these


if __name__ == "__main__":
    main()
