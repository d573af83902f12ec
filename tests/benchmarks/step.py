"""Where the time of one training step goes: each part's share, and all that is not the encoders.

    python tests/benchmarks/step.py [--arch resnet50 --image_size 224 --batch 8] [--rounds 5]
    python tests/benchmarks/step.py --demo
    python tests/benchmarks/step.py --device cuda --precision bf16 --batch 256

CMSF-2Q on views that are ready, with a full bank. The parts are timed where the step calls them;
the rest of the step (bank, previous embeddings, neighbors, loss, figures) is what they leave of the
whole. Published: the same encoders with the rest in the published arithmetic, in turn with ours. At
a larger batch (`--scale_to`) the encoders' time grows with it and the rest is measured. One thread;
medians with lowest and highest; every number waits for the GPU if there is one.
"""

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import search
import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from self_supervised.train_msf_2q import CMSF2Q
from utils import options
from utils.encoders import QueryTargetEncoders, build_backbone
from utils.loaders import Batch

IMAGES = 100_000  # N: what the store of previous embeddings holds


class Clock:
    """Seconds by name of part, for one step after the other."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: dict[str, list[float]] = defaultdict(list)

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, its time added to the parts of the present step."""

        def run(*args, **kwargs):
            start = self.now()
            result = function(*args, **kwargs)
            self.steps[name].append(self.now() - start)
            return result

        return run


def build(args: argparse.Namespace) -> tuple[CMSF2Q, torch.optim.SGD]:
    """The method with a full bank, whose rows all have previous embeddings."""
    torch.manual_seed(0)
    backbone = build_backbone(args.arch)
    encoders = QueryTargetEncoders(
        backbone.module,
        backbone.feature_dim,
        proj_dim=args.proj_dim,
        hidden_dim=args.hidden_dim,
        autocast=options.PRECISIONS[args.precision],
        channels_last=True,
    )
    model = CMSF2Q(encoders, IMAGES, mem_bank_size=args.bank, topk=args.topk, topkp=args.topkp)
    dim = encoders.proj_dim
    for start in range(0, args.bank, 2**14):
        rows = normalize(torch.randn(min(2**14, args.bank - start), dim), dim=1)
        count = len(rows)
        model.bank.enqueue(
            rows,
            previous=rows.flip(0),
            has_previous=torch.ones(count, dtype=torch.bool),
            index=torch.zeros(count, dtype=torch.int64),
            label=torch.zeros(count, dtype=torch.int64),
        )
    model.previous.embeddings.normal_()
    model.previous.embeddings.div_(model.previous.embeddings.norm(dim=1, keepdim=True))
    model.previous.seen.fill_(True)
    model.to(args.device)
    optimizer = torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad], lr=0.01, momentum=0.9, weight_decay=1e-4
    )
    return model, optimizer


def make_batch(args: argparse.Namespace, size: int) -> Batch:
    """Views of noise, ready on the device."""
    views = (
        torch.randn(size, 3, args.image_size, args.image_size, device=args.device) for _ in "qt"
    )
    index = torch.randperm(IMAGES)[:size]
    return Batch(*views, index, torch.zeros(size, dtype=torch.int64, device=args.device))


def measure(model: CMSF2Q, optimizer: torch.optim.SGD, batch: Batch, rounds: int) -> Clock:
    """Steps with their parts timed; the first is not counted."""
    encoders = model.encoders
    clock = Clock(batch.query_view.device)
    for name in ("query", "target", "update_target"):
        setattr(encoders, name, clock.timed(name, getattr(encoders, name)))
    backward = clock.timed("backward", lambda loss: loss.backward())
    update = clock.timed("optimizer", optimizer.step)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss, _ = model(batch)
        backward(loss)
        update()

    step = clock.timed("whole step", step)
    for _ in range(rounds + 1):
        step()
    for name in ("query", "target", "update_target"):
        delattr(encoders, name)
    parts = [name for name in clock.steps if name != "whole step"]
    for name in clock.steps:
        del clock.steps[name][0]
    whole = clock.steps["whole step"]
    clock.steps["the rest"] = [
        whole[i] - sum(clock.steps[part][i] for part in parts) for i in range(rounds)
    ]
    return clock


def rest_seconds(model: CMSF2Q, size: int, rounds: int) -> dict[str, list[float]]:
    """The rest of a step, ours and published in turn, on q, t, u of `size` rows."""
    bank = model.bank
    dim, device = bank.features.shape[1], bank.features.device
    clock = Clock(device)
    data: dict[str, Tensor] = {
        name: normalize(torch.randn(size, dim, device=device), dim=1) for name in "qtu"
    }
    data |= {"bank": bank.features, "previous": bank.previous}
    encoders = model.encoders
    own = torch.randperm(IMAGES)[:size]
    batch = Batch(data["q"], data["t"], own, torch.zeros(size, dtype=torch.int64, device=device))

    def ours() -> None:
        q = data["q"].detach().requires_grad_()
        encoders.query, encoders.target = (lambda _: q), (lambda _: data["t"])
        encoders.update_target = lambda: None
        model(batch)[0].backward()

    sides = {
        "ours": ours,
        "published": lambda: search.published(data, model.topk, model.topkp),
    }
    timed = {name: clock.timed(name, side) for name, side in sides.items()}
    for _ in range(rounds + 1):
        for side in timed.values():
            side()
    for name in ("query", "target", "update_target"):
        delattr(encoders, name)
    return {name: times[1:] for name, times in clock.steps.items()}


def line(name: str, times: list[float], whole: float) -> str:
    middle = statistics.median(times)
    spread = f"({1000 * min(times):.1f} to {1000 * max(times):.1f})"
    return f"{name:32}{1000 * middle:10.1f} ms {spread:24} {100 * middle / whole:6.2f}%"


def parse_args() -> argparse.Namespace:
    """The flags of this script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", default="resnet50")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--precision", choices=list(options.PRECISIONS), default="fp32")
    for name, default in (("image_size", 224), ("batch", 8), ("bank", 128000), ("topk", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("topkp", 10), ("rounds", 5), ("threads", 1), ("scale_to", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--demo", action="store_true", help="the demo's network, batch and bank")
    args = parser.parse_args()
    args.proj_dim = args.hidden_dim = None
    if args.demo:
        demo = options.DEMO
        args.arch, args.image_size, args.batch = "conv4", demo["image_size"], demo["batch_size"]
        args.bank, args.topkp, args.scale_to = demo["mem_bank_size"], 5, 0
        args.proj_dim, args.hidden_dim = demo["proj_dim"], demo["hidden_dim"]
    return args


def main() -> None:
    """Print the parts of a step and what the published arithmetic would take of it."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    model, optimizer = build(args)
    clock = measure(model, optimizer, make_batch(args, args.batch), args.rounds)
    whole = statistics.median(clock.steps["whole step"])
    print(
        f"CMSF-2Q, {args.arch}, {args.image_size} px, B {args.batch}, K {args.bank}, D "
        f"{model.encoders.proj_dim}, {args.precision} on {args.device}, {args.threads} threads, "
        f"n {args.rounds}"
    )
    for name, times in clock.steps.items():
        print(line(name, times, whole))
    encoders = whole - statistics.median(clock.steps["the rest"])
    print(
        f"encoders alone: {args.batch / encoders:.2f} images/s, whole step {args.batch / whole:.2f}"
    )
    for size in {args.batch, args.scale_to or args.batch}:
        grown = encoders * size / args.batch
        print(f"at B {size} (encoders {grown:.2f} s):")
        for name, times in rest_seconds(model, size, args.rounds).items():
            middle = statistics.median(times)
            print(line(f"  the rest, {name}", times, middle + grown))


if __name__ == "__main__":
    main()
