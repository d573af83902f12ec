"""Encoders with the channels last and with PyTorch's layout: images a second of training.

    python tests/benchmarks/layout.py [--rounds 7] [--device cuda]

Query forward, moving average, target forward, backward and update of a few networks and sizes, in
fp32 and bf16, and features in eval mode in fp32. On noise that is ready; all sides take turns.
Medians with lowest and highest. One CPU thread.
"""

import argparse
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.cli import options
from utils.method.encoders import QueryTargetEncoders, build_backbone

# Arch, whether with the small stem, side of the images, batch.
CASES = (
    ("conv4", False, 32, 32),
    ("resnet18", False, 64, 32),
    ("resnet18", False, 224, 8),
    ("resnet18", True, 32, 16),
)
STEPS = {"conv4": 8}  # of a turn; elsewhere one


def sides_of(
    arch: str, small_stem: bool, views: Tensor, *, precision: str, channels_last: bool
) -> tuple[Callable[[], None], Callable[[], None]]:
    """A training step, and the features of a batch; views: (2, B, 3, S, S)."""
    torch.manual_seed(0)
    backbone = build_backbone(arch, small_stem=small_stem)
    demo = {name: options.DEMO[name] for name in ("proj_dim", "hidden_dim", "proj_bn")}
    encoders = QueryTargetEncoders(
        backbone.module,
        backbone.feature_dim,
        autocast=options.PRECISIONS[precision],
        channels_last=channels_last,
        **(demo if arch == "conv4" else {}),
    ).to(views.device)
    trained = [p for p in encoders.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        q = encoders.query(views[0])
        encoders.update_target()
        loss = (q - encoders.target(views[1])).square().sum(dim=1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def features() -> None:
        backbone.module.eval()(views[0])
        backbone.module.train()

    return step, features


def timed(function: Callable[[], None], steps: int, device: torch.device) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    for _ in range(steps):
        function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps


def measure(case: tuple[str, bool, int, int], rounds: int, device: torch.device) -> None:
    """Print a line for each precision and layout of a case."""
    arch, small_stem, size, batch = case
    views = torch.randn(2, batch, 3, size, size, device=device)
    build = functools.partial(sides_of, arch, small_stem, views)
    sides: dict[tuple[str, str], Callable[[], None]] = {}
    for precision, last in itertools.product(options.PRECISIONS, (False, True)):
        layout = "channels last" if last else "plain"
        step, features = build(precision=precision, channels_last=last)
        sides[precision, layout] = step
        if precision == "fp32":
            sides["features", layout] = features
    seconds = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            took = timed(side, STEPS.get(arch, 1), device)
            seconds[name] += [took] * (number > 0)
    print(f"{arch}{' --small_stem' * small_stem}, {size} px, batch {batch}")
    for (what, layout), times in sorted(seconds.items()):
        speeds = [batch / took for took in times]
        spread = f"{min(speeds):.1f} to {max(speeds):.1f}"
        print(f"  {what:9} {layout:14} {statistics.median(speeds):9.1f} ({spread})", flush=True)


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"images/s on {args.device}, n {args.rounds}")
    for case in CASES:
        measure(case, args.rounds, args.device)


if __name__ == "__main__":
    main()
