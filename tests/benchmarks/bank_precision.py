"""How a bank in half precision changes which neighbors are found.

    python tests/benchmarks/bank_precision.py [--weights <CHECKPOINT>]

Of the k nearest rows of each query, how many are the same with the bank in float16 (and, to
compare, bfloat16) as in float32; queries in float32. On random unit vectors, and on the bank of a
checkpoint, whose newest rows are the queries.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.method import checkpoint
from utils.method.neighbors import nearest

KS = (1, 5, 10, 50)


def agreement(queries: Tensor, rows: Tensor, dtype: torch.dtype) -> dict[int, float]:
    """Percent of the k nearest rows that are found in both precisions, for each k."""
    whole, half = (nearest(queries, kept, k=max(KS)).rows for kept in (rows, rows.to(dtype)))
    return {
        k: 100 * (whole[:, :k, None] == half[:, None, :k]).any(dim=2).float().mean().item()
        for k in KS
    }


def main() -> None:
    """Print a line for each bank and precision."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", type=Path, help="a checkpoint with a bank")
    for name, default in (("bank", 128000), ("dim", 512), ("queries", 256)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = normalize(torch.randn(args.bank, args.dim), dim=1)
    banks = {f"random, K {args.bank}, D {args.dim}": rows}
    if args.weights:
        state = checkpoint.load(args.weights, flag="--weights")["state_dict"]
        kept = state["bank.features"].float()
        banks[f"{args.weights}, K {len(kept)}, D {kept.shape[1]}"] = kept
    for name, rows in banks.items():
        queries = rows[-args.queries :]
        if name.startswith("random"):
            queries = normalize(torch.randn(args.queries, args.dim), dim=1)
        for dtype in (torch.float16, torch.bfloat16):
            shares = agreement(queries, rows, dtype)
            text = "  ".join(f"k {k}: {share:.2f}%" for k, share in shares.items())
            print(f"{name}: {dtype}  {text}")


if __name__ == "__main__":
    main()
