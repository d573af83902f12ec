"""The k-NN majority vote beside the published loop over queries.

    python tests/benchmarks/knn_vote.py [--queries 50000] [--k 20] [--rounds 5]

One thread; the two sides alternate; medians. The loop breaks ties at random, ours by the nearer
neighbor, so the sides agree where there is no tie: that is checked.
"""

import argparse
import random
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.evaluation.knn import majority_vote


def published(neighbor_labels: np.ndarray) -> np.ndarray:
    """Count each query's labels and draw one of the most frequent."""
    winners = []
    for labels in neighbor_labels.tolist():
        counts = Counter(labels).most_common()
        most = [label for label, count in counts if count == counts[0][1]]
        winners.append(random.choice(most))
    return np.array(winners)


def main() -> None:
    """Time both sides and print medians, spread and ratio."""
    parser = argparse.ArgumentParser()
    for name, default in (("queries", 50000), ("k", 20), ("classes", 1000), ("rounds", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    # Half of the neighbors share one label, as of a trained network.
    labels = rng.integers(args.classes, size=(args.queries, args.k))
    labels = np.where(rng.random(labels.shape) < 0.5, labels[:, :1], labels)
    sides = {"published": published, "ours": majority_vote}
    votes = {name: side(labels) for name, side in sides.items()}
    print(f"agreement {100 * (votes['published'] == votes['ours']).mean():.2f}% (rest: ties)")
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(args.rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            side(labels)
            seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        print(
            f"{name:10} median {1000 * statistics.median(times):.0f} ms "
            f"({1000 * min(times):.0f} to {1000 * max(times):.0f})"
        )
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    print(f"ratio {medians['published'] / medians['ours']:.1f}, n {args.rounds}")


if __name__ == "__main__":
    main()
