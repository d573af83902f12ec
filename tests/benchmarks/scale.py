"""Cost of a step's memory against its sizes: K rows of the bank, N images of the data set.

    python tests/benchmarks/scale.py [--batch 256] [--dim 512] [--rounds 3] [--most_rows 1000000]

For each K: 2Q (search, loss and backward to q), the same with rows of the query's label only (1000
classes), and putting a batch into the bank. For each N: reading and replacing the previous
embeddings of a batch. One thread; medians with lowest and highest; linear in K means the same
microseconds for each thousand rows, flat in N the same milliseconds.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import search
import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.method.memory_bank import MemoryBank
from utils.method.previous_embeddings import PreviousEmbeddings

ROWS = (4_000, 16_000, 64_000, 256_000, 1_000_000)
IMAGES = (10_000, 100_000, 1_000_000, 10_000_000)
SMALL_DIM = 64  # of the embeddings of so many images: 2.6 GB


def milliseconds(function: Callable[[], object], rounds: int) -> list[float]:
    """Times of `rounds` calls after a first one."""
    times = search.in_turn({"": function}, rounds=rounds + 1, clock=time.perf_counter)[""]
    return [1000 * seconds for seconds in times[1:]]


def first_rows(data: dict[str, Tensor], rows: int) -> dict[str, Tensor]:
    """The same with the first rows of the bank alone."""
    per_row = ("bank", "previous", "row_labels")
    return {name: values[:rows] if name in per_row else values for name, values in data.items()}


def text(times: list[float]) -> str:
    return f"{statistics.median(times):9.2f} ({min(times):.2f} to {max(times):.2f})"


def against_rows(args: argparse.Namespace) -> None:
    """A line for each K."""
    print(f"B {args.batch}, D {args.dim}, ms: median (lowest to highest), n {args.rounds}")
    print(f"{'K':>9}  {'2Q':28}{'us/1000 rows':>13}  {'same label':28}  {'enqueue':28}")
    sizes = {"bank": args.most_rows, "dim": args.dim, "batch": args.batch, "classes": 1000}
    everything = search.make_data(argparse.Namespace(**sizes, device="cpu"))
    for rows in (k for k in ROWS if k <= args.most_rows):
        data = first_rows(everything, rows)
        sides = [
            milliseconds(partial(side, data, 5, 10), args.rounds)
            for side in (search.ours, search.ours_supervised)
        ]
        bank = MemoryBank(rows, args.dim)
        numbers = torch.arange(args.batch)
        enqueue = partial(bank.enqueue, data["t"], index=numbers, label=numbers)
        put = milliseconds(enqueue, 5 * args.rounds)
        each = 1000 * statistics.median(sides[0]) / (rows / 1000)
        print(f"{rows:9}  {text(sides[0]):28}{each:13.0f}  {text(sides[1]):28}  {text(put):28}")


def against_images(args: argparse.Namespace) -> None:
    """A line for each N."""
    print(f"D {SMALL_DIM}\n{'N':>9}  {'swap of previous embeddings, ms':32}")
    new = normalize(torch.randn(args.batch, SMALL_DIM), dim=1)
    for count in IMAGES:
        swap = PreviousEmbeddings(count, SMALL_DIM).swap
        batches = iter([torch.randint(count, (args.batch,)) for _ in range(20 * args.rounds + 1)])
        times = milliseconds(lambda swap=swap, b=batches: swap(next(b), new), 20 * args.rounds)
        print(f"{count:9}  {text(times)}")


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser()
    for name, default in (("batch", 256), ("dim", 512), ("rounds", 3), ("most_rows", 1_000_000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    against_rows(args)
    against_images(args)


if __name__ == "__main__":
    main()
