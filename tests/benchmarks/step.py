"""Where the time of one training step goes: each part's share, and all that is not the encoders.

    python tests/benchmarks/step.py --batch_size 8 [--rounds 5]
    python tests/benchmarks/step.py --demo
    python tests/benchmarks/step.py --device cuda --precision bf16 --channels_last

CMSF-2Q on views that are ready, with a full bank; flags that are not this script's are those of
`train_msf_2q.py`. The parts are timed where the step calls them; the rest of the step (bank,
previous embeddings, neighbors, loss, figures) is what they leave of the whole. Published: the same
encoders with the rest in the published arithmetic, in turn with ours. At a larger batch
(`--scale_to`) the encoders' time grows with it and the rest is measured. One thread; medians with
lowest and highest; every number waits for the GPU if there is one.

`training_steps` is the whole of a step on a GPU: from crops that are there, through the loader's
views and `Run`; the GPU's benchmark (`tests/gpu.py`) holds it against `encoder_step`.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import search
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from self_supervised import train_msf_2q
from self_supervised.train_msf_2q import CMSF2Q
from utils.cli import build_training
from utils.data.batches import Batch, CropBatch
from utils.data.train_loader import TwoViewLoader
from utils.runtime.streams import upload
from utils.training.engine import Run

IMAGES = 100_000  # N: what the store of previous embeddings holds
_NEVER = 10**9  # epochs, images or minutes after which something would happen


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


def script_flags(*flags: object) -> argparse.Namespace:
    """What the training script makes of such flags."""
    before = sys.argv
    sys.argv = ["train_msf_2q.py", *map(str, flags)]
    if "--demo" not in flags:
        sys.argv.append(".")  # a folder of images, which nothing reads
    try:
        return train_msf_2q.parse_args()
    finally:
        sys.argv = before


def build(args: argparse.Namespace) -> tuple[CMSF2Q, torch.optim.SGD]:
    """The method as the script builds it, with a full bank whose rows all have previous ones."""
    sizes = {"mem_bank_size": args.mem_bank_size, "topk": args.topk, "topkp": args.topkp}
    model = build_training.place(args, CMSF2Q(build_training.build_encoders(args), IMAGES, **sizes))
    optimizer = build_training.build_optimizer(args, model)
    bank, previous = model.bank, model.previous
    shape, device = bank.features.shape, bank.features.device
    for start in range(0, shape[0], 2**14):
        rows = torch.randn(min(2**14, shape[0] - start), shape[1], device=device)
        rows, none = normalize(rows, dim=1), torch.zeros(len(rows), dtype=torch.int64)
        columns = {"previous": rows.flip(0), "has_previous": none == 0, "index": none}
        bank.enqueue(rows, label=none, **columns)
    previous.embeddings.normal_()
    previous.embeddings.div_(previous.embeddings.norm(dim=1, keepdim=True))
    previous.seen.fill_(True)
    return model, optimizer


class Published2Q(nn.Module):
    """The method on the same encoders in the published arithmetic, from the same bank and store.

    As there, the previous embeddings of all images lie on the device, and the bank's size is a
    multiple of the batch.
    """

    def __init__(self, model: CMSF2Q) -> None:
        super().__init__()
        self.encoders, self.topk, self.topkp = model.encoders, model.topk, model.topkp
        self.rows, self.older = model.bank.features.clone(), model.bank.previous.clone()
        self.store = model.previous.embeddings.to(self.rows.device, copy=True)
        self.place = 0

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """One step: the loss, and no figures."""
        q = self.encoders.query(batch.query_view)
        with torch.no_grad():
            self.encoders.update_target()
            t = self.encoders.target(batch.target_view)
            index = upload(batch.index, t.device)
            u = self.store[index]
            self.store[index] = t
            place = slice(self.place, self.place + len(t))
            self.rows[place], self.older[place] = t, u
            self.place = (self.place + len(t)) % len(self.rows)
        data = {"t": t, "u": u, "bank": self.rows, "previous": self.older}
        return search.published_loss(q, data, self.topk, self.topkp), {}


def make_batch(args: argparse.Namespace, size: int) -> Batch:
    """Views of noise, ready on the device."""
    views = (
        torch.randn(size, 3, args.image_size, args.image_size, device=args.device) for _ in "qt"
    )
    index = torch.randperm(IMAGES)[:size]
    return Batch(*views, index, torch.zeros(size, dtype=torch.int64, device=args.device))


def update(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """Backward pass and update; gradients go with their step, as those of CUDA graphs must."""
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def encoder_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """A step of the encoders alone: both of them, moving average, a plain loss, update."""
    q = model.encoders.query(batch.query_view)
    model.encoders.update_target()
    t = model.encoders.target(batch.target_view)
    update(optimizer, 2 - 2 * (q * t).sum(dim=1).mean())


class ReadyCrops:
    """In the place of workers: crops that lie on the device, the same for all batches."""

    num_workers = 0

    def __init__(self, args: argparse.Namespace) -> None:
        shape = (args.batch_size, 2 * 3 * args.image_size**2)
        self.crops = torch.randint(256, shape, dtype=torch.uint8, device=args.device)

    def __iter__(self) -> Iterator[CropBatch]:
        size = len(self.crops)
        order, label = torch.randperm(IMAGES), torch.zeros(size, dtype=torch.int64)
        for index in itertools.cycle(order[: IMAGES // size * size].split(size)):
            yield CropBatch(self.crops, index, label, {})


def ready_loader(args: argparse.Namespace) -> TwoViewLoader:
    """The script's loader of an endless epoch, but for the workers."""
    loader = build_training.build_loader(args, range(_NEVER))
    loader._loader = ReadyCrops(args)
    return loader


def training_batches(
    model: nn.Module, optimizer: torch.optim.Optimizer, loader: TwoViewLoader, folder: Path
) -> tuple[Run, Iterator[Batch]]:
    """A run that neither reports nor saves, and its batches."""
    (rate,) = {group["lr"] for group in optimizer.param_groups}
    args = script_flags(
        *("--epochs", _NEVER, "--learning_rate", rate, "--checkpoint_path", folder),
        *("--print_freq", _NEVER, "--save_freq", _NEVER, "--save_minutes", 0, "--knn_freq", -1),
    )
    run = Run(args, model, optimizer)
    return run, run.batches(loader)


def training_steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, loader: TwoViewLoader, folder: Path
) -> Iterator[Tensor]:
    """Steps of such a run, each when it is asked for: the loss, which nothing waits for."""
    run, batches = training_batches(model, optimizer, loader, folder)
    for batch in batches:
        loss, stats = run.forward(batch)
        run.step(loss, stats)
        yield loss.detach()


def measure(model: CMSF2Q, optimizer: torch.optim.SGD, batch: Batch, rounds: int) -> Clock:
    """Steps with their parts timed; the first is not counted."""
    encoders = model.encoders
    clock = Clock(batch.query_view.device)
    for name in ("query", "target", "update_target"):
        setattr(encoders, name, clock.timed(name, getattr(encoders, name)))
    backward = clock.timed("backward", lambda loss: loss.backward())
    descend = clock.timed("optimizer", optimizer.step)

    def step() -> None:
        loss, _ = model(batch)
        backward(loss)
        descend()
        optimizer.zero_grad(set_to_none=True)

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


def parse_args() -> tuple[argparse.Namespace, argparse.Namespace]:
    """The flags of this script, and those of the training script."""
    parser = argparse.ArgumentParser()
    for name, default in (("rounds", 5), ("threads", 1), ("scale_to", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    own, others = parser.parse_known_args()
    return own, script_flags(*others)


def main() -> None:
    """Print the parts of a step and what the published arithmetic would take of it."""
    own, args = parse_args()
    torch.set_num_threads(own.threads)
    model, optimizer = build(args)
    size = args.batch_size
    clock = measure(model, optimizer, make_batch(args, size), own.rounds)
    whole = statistics.median(clock.steps["whole step"])
    print(
        f"CMSF-2Q, {args.arch}, {args.image_size} px, B {size}, K {args.mem_bank_size}, D "
        f"{model.encoders.proj_dim}, {args.precision} on {args.device}, {own.threads} threads, "
        f"n {own.rounds}"
    )
    for name, times in clock.steps.items():
        print(line(name, times, whole))
    encoders = whole - statistics.median(clock.steps["the rest"])
    print(f"encoders alone: {size / encoders:.2f} images/s, whole step {size / whole:.2f}")
    for larger in sorted({size, max(size, own.scale_to)}):
        grown = encoders * larger / size
        print(f"at B {larger} (encoders {grown:.2f} s):")
        for name, times in rest_seconds(model, larger, own.rounds).items():
            middle = statistics.median(times)
            print(line(f"  the rest, {name}", times, middle + grown))


if __name__ == "__main__":
    main()
