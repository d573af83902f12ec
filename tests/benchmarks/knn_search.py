"""Memory and time of the k-NN search over a large set of features.

    python tests/benchmarks/knn_search.py [--base 100000] [--queries 5000] [--dim 2048]

What the process grows by at its peak above the features (Linux), which for ImageNet and ResNet-50
are 1.28 million x 2048 float32, 10.5 GB: normalized in place, searched in blocks, voted at once.
One thread; in a process of its own, since a peak stays.
"""

import argparse
import sys
import time
from pathlib import Path

import faiss
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from search import status_megabytes

from utils.evaluation.knn import knn_figures


def main() -> None:
    """Search once and print time and memory."""
    parser = argparse.ArgumentParser()
    for name, default in (("base", 100_000), ("queries", 5_000), ("dim", 2048)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    torch.manual_seed(0)
    sets = [
        (torch.randn(count, args.dim), torch.randint(1000, (count,)))
        for count in (args.base, args.queries)
    ]
    small = [(features[:50].clone(), labels[:50]) for features, labels in sets]
    knn_figures(*small, ks=[1, 20], num_classes=1000)  # libraries allocate at their first use
    Path("/proc/self/clear_refs").write_text("5")
    before, start = status_megabytes("VmRSS"), time.perf_counter()
    knn_figures(*sets, ks=[1, 5, 10, 20], num_classes=1000)
    seconds, peak = time.perf_counter() - start, status_megabytes("VmHWM")
    held = sum(features.nbytes for features, _ in sets) / 2**20
    print(
        f"{args.queries} queries among {args.base} rows of {args.dim}: {seconds:.1f} s, "
        f"{peak - before:.0f} MB above the features' {held:.0f} MB"
    )


if __name__ == "__main__":
    main()
