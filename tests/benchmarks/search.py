"""Neighbor search, loss and backward to q of one step, beside the published arithmetic.

    python tests/benchmarks/search.py [--method 2q] [--rounds 3] [--bank 128000] [--batch 256]
    python tests/benchmarks/search.py --method supervised [--topk 10] [--classes 1000]
    python tests/benchmarks/search.py --device cuda [--tf32]

One thread; the two sides alternate in one process; medians. Memory is what the process grows by at
its peak above bank and queries (Linux), each side measured once in a process of its own.
"""

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.method.neighbors import mean_shift_loss, nearest, nearest_among, nearest_with_label


def make_data(args: argparse.Namespace) -> dict[str, Tensor]:
    """A full bank of unit vectors with its previous embeddings, and a batch of q, t, u."""
    torch.manual_seed(0)
    sizes = {"bank": args.bank, "previous": args.bank} | dict.fromkeys("qtu", args.batch)
    data = {
        name: normalize(torch.randn(size, args.dim, device=args.device), dim=1)
        for name, size in sizes.items()
    }
    return data | {
        name: torch.randint(args.classes, (size,), device=args.device)
        for name, size in (("labels", args.batch), ("row_labels", args.bank))
    }


def published_loss(q: Tensor, data: dict[str, Tensor], k: int, candidates: int) -> Tensor:
    """Clone the banks, full distance matrices of t, q and u, scatter a mask, top-k, gather."""
    bank, previous = data["bank"].clone(), data["previous"].clone()
    to_target = 2 - 2 * torch.einsum("bd,kd->bk", data["t"], bank)
    to_query = 2 - 2 * torch.einsum("bd,kd->bk", q, bank)
    to_previous = 2 - 2 * torch.einsum("bd,kd->bk", data["u"], previous)
    _, near = to_target.topk(k, dim=1, largest=False)
    loss = to_query.gather(1, near).mean()
    _, related = to_previous.topk(candidates, dim=1, largest=False)
    penalty = torch.full_like(to_target, 5.0).scatter_(1, related, 0.0)
    _, far = (to_target + penalty).topk(k, dim=1, largest=False)
    return (loss + to_query.gather(1, far).mean()) / 2


def published(data: dict[str, Tensor], k: int, candidates: int) -> Tensor:
    """The published arithmetic, and its backward pass."""
    q = data["q"].detach().requires_grad_()
    loss = published_loss(q, data, k, candidates)
    loss.backward()
    return loss.detach()


def ours(data: dict[str, Tensor], k: int, candidates: int) -> Tensor:
    """The project's functions, as CMSF2Q.forward calls them."""
    q = data["q"].detach().requires_grad_()
    everywhere = torch.ones(len(data["bank"]), dtype=torch.bool, device=data["bank"].device)
    near = nearest(data["t"], data["bank"], k=k)
    related = nearest(data["u"], data["previous"], k=candidates, allowed=everywhere)
    far = nearest_among(data["t"], data["bank"], candidates=related, k=k, fill=near)
    loss = (mean_shift_loss(q, data["bank"], near) + mean_shift_loss(q, data["bank"], far)) / 2
    loss.backward()
    return loss.detach()


def published_supervised(data: dict[str, Tensor], k: int, candidates: int) -> Tensor:
    """Clone the bank, full distance matrices of t and q, a mask of other labels, top-k, gather."""
    q = data["q"].detach().requires_grad_()
    bank = data["bank"].clone()
    to_target = 2 - 2 * torch.einsum("bd,kd->bk", data["t"], bank)
    to_query = 2 - 2 * torch.einsum("bd,kd->bk", q, bank)
    other = data["labels"].unsqueeze(1) != data["row_labels"].unsqueeze(0)
    _, near = torch.where(other, 5.0, to_target).topk(k, dim=1, largest=False)
    loss = to_query.gather(1, near).mean()
    loss.backward()
    return loss.detach()


def ours_supervised(data: dict[str, Tensor], k: int, candidates: int) -> Tensor:
    """The project's functions, as SupervisedCMSF.forward calls them."""
    q = data["q"].detach().requires_grad_()
    same = nearest_with_label(
        data["t"], data["bank"], k=k, labels=data["labels"], row_labels=data["row_labels"]
    )
    loss = mean_shift_loss(q, data["bank"], same)
    loss.backward()
    return loss.detach()


METHODS: dict[str, dict[str, Callable[[dict[str, Tensor], int, int], Tensor]]] = {
    "2q": {"published": published, "ours": ours},
    "supervised": {"published": published_supervised, "ours": ours_supervised},
}


def status_megabytes(field: str) -> float:
    """VmRSS (resident now) or VmHWM (its peak) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def child(args: argparse.Namespace) -> None:
    """Print by how much one step of one side raises the peak."""
    data = make_data(args)
    small = {name: value[: 4 * args.topkp] for name, value in data.items()}
    small["labels"] = small["row_labels"][: len(small["q"])]
    METHODS[args.method][args.only](
        small, args.topk, args.topkp
    )  # libraries allocate at their first use
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts over
    before = status_megabytes("VmRSS")
    METHODS[args.method][args.only](data, args.topk, args.topkp)
    print(status_megabytes("VmHWM") - before)


def now(device: torch.device) -> float:
    """Seconds, when a GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


Clock = Callable[[], float]  # seconds, when what was begun before is done


def in_turn(
    sides: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    calls: int = 1,
    clock: Clock,
) -> dict[str, list[float]]:
    """Seconds of one call of each side, in each round: `calls` of one side, then of the next."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            start = clock()
            for _ in range(calls):
                side()
            seconds[name].append((clock() - start) / calls)
    return seconds


def gpu_megabytes(function: Callable[[], object]) -> float:
    """By how much a call raises the peak of the GPU's memory above what lies there before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def megabytes(name: str, function: Callable[[], object], device: torch.device) -> float:
    """By how much one step of a side raises the peak: of the GPU, or of a process of its own."""
    if device.type == "cuda":
        return gpu_megabytes(function)
    command = [sys.executable, *sys.argv, "--only", name]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def agree(losses: Mapping[str, Tensor], *, tf32: bool) -> bool:
    """Whether the losses of both sides are the same but for rounding."""
    allowed = 1e-3 if tf32 else 1e-6
    return torch.isclose(losses["ours"], losses["published"], atol=allowed).item()


def main() -> None:
    """Time both sides and print medians, spread and ratio."""
    parser = argparse.ArgumentParser()
    for name, default in (("rounds", 3), ("bank", 128000), ("batch", 256), ("dim", 512)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--method", choices=METHODS, default="2q")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--topk", type=int, default=5)
    parser.add_argument("--topkp", type=int, default=10)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--tf32", action="store_true", help="on a GPU: for both sides")
    parser.add_argument("--only", choices=("published", "ours"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.only:
        child(args)
        return
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    data = make_data(args)
    sides = {
        name: partial(side, data, args.topk, args.topkp)
        for name, side in METHODS[args.method].items()
    }
    losses = {name: side() for name, side in sides.items()}
    assert agree(losses, tf32=args.tf32), losses
    seconds = in_turn(sides, rounds=args.rounds, clock=partial(now, args.device))
    kind = "TF32" if args.tf32 else "float32"
    where = "one thread" if args.device.type == "cpu" else args.device
    print(f"{args.method}, B {args.batch}, K {args.bank}, D {args.dim}, {kind}, {where}")
    for name, times in seconds.items():
        memory = megabytes(name, sides[name], args.device)
        low, middle, high = min(times), statistics.median(times), max(times)
        print(f"{name:10} median {middle:.3f} s ({low:.3f} to {high:.3f}), {memory:.0f} MB on top")
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"ratio {medians['published'] / medians['ours']:.2f}, n {args.rounds}")


if __name__ == "__main__":
    main()
