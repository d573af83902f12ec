"""From which purity on neighbors pay: accuracy against purity, beside the target alone (BYOL).

    python tests/benchmarks/methods.py --data <FOLDER> --test <FOLDER> --out <OUT> --epochs 12
    python tests/benchmarks/purity.py CIFAR-10=<OUT> Fashion-MNIST=<OUT> --output purity.png

Purity is set, not hoped for: supervised CMSF is trained with so much label noise, and the purity of
its neighbors by their true classes is what the log says. The curve is the mean over seeds with its
standard deviation; the line with a band is BYOL, which has no neighbors; methods lie on the same
plot by the purity that they reached at the end. Where the curve crosses the line is the break-even
purity. A target is its own nearest neighbor and counts in the log's purity, one of k: here it is
left out, so that k nearest rows and all of a class compare. CMSF-KM, of which small clusters have
fewer than k rows, has at most the purity that this gives.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import methods

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.reporting.health import beside_target

CURVE = ("noise ", "sup all + own")  # what the names of its methods begin with; the last has none
PLAIN = "msf"  # its purity is that of plain neighbors
SHOWN = {
    "msf": "MSF",
    "2q": "CMSF-2Q",
    "2q + own": "CMSF-2Q, --topk_plain 1",
    "km": "CMSF-KM",
    "semi 10%": "semi-supervised, k 10 (where a label counts)",
    "semi 10% far": "semi-supervised, k 400 (where a label counts)",
    "sup top-10": "supervised, the 10 nearest",
}


class Point(NamedTuple):
    """A method over seeds: purity, accuracy and its standard deviation, in percent."""

    purity: float
    accuracy: float
    deviation: float


def neighbors_of(name: str) -> float:
    """k of a method; infinite where it pulls to all of a class."""
    flags = methods.REAL[name][1]
    last = len(flags) - 1 - flags[::-1].index("--topk") if "--topk" in flags else None
    k = "all" if last is None else flags[last + 1]
    return float("inf") if k == "all" else float(k)


def points_of(results: dict[str, list[dict[str, float]]], figure: str) -> dict[str, Point]:
    """Each method's point; BYOL's and what has no purity at 100."""
    found = {}
    for name, runs in results.items():
        key = "purity_plain" if name == PLAIN else "purity_constrained"
        purities, k = [run.get(key, 100.0) for run in runs], neighbors_of(name)
        if 1 < k < float("inf"):
            purities = [beside_target(purity, k) for purity in purities]
        values = [run[figure] for run in runs]
        deviation = statistics.stdev(values) if len(values) > 1 else 0.0
        found[name] = Point(statistics.mean(purities), statistics.mean(values), deviation)
    return found


def curve_of(points: dict[str, Point]) -> list[Point]:
    """The points of the curve, by purity."""
    return sorted(point for name, point in points.items() if name.startswith(CURVE))


def break_even(curve: list[Point], level: float) -> float | None:
    """The purity above which the curve stays above a level, by straight lines; None: nowhere.

    Where all of the curve lies above, its lowest purity is returned.
    """
    above = curve[-1]
    if above.accuracy <= level:
        return None
    for point in reversed(curve[:-1]):
        if point.accuracy <= level:
            share = (level - point.accuracy) / (above.accuracy - point.accuracy)
            return point.purity + share * (above.purity - point.purity)
        above = point
    return above.purity


def draw(sets: dict[str, dict[str, Point]], figure: str, path: Path) -> None:
    """One panel for each data set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn, panels = pyplot.subplots(1, len(sets), figsize=(5.2 * len(sets), 5), squeeze=False)
    for panel, (name, points) in zip(panels[0], sets.items(), strict=True):
        curve, byol = curve_of(points), points["byol"]
        low, high = byol.accuracy - byol.deviation, byol.accuracy + byol.deviation
        panel.axhspan(low, high, color="0.88", zorder=0)
        panel.axhline(byol.accuracy, color="0.4", linestyle="--", linewidth=1, label="BYOL")
        text = "supervised, all of the label and the target, labels with noise"
        _mark(panel, curve, marker="o", label=text)
        for marker, (method, label) in zip("sD^vPX*", SHOWN.items(), strict=True):
            if method in points:
                _mark(panel, [points[method]], marker=marker, linestyle="", label=label)
        panel.set(title=name, xlabel="purity of the neighbors beside the target, %", xlim=(0, 104))
        panel.set_ylabel(f"{figure}, %")
        panel.grid(alpha=0.3)
    handles = panels[0][0].get_legend_handles_labels()
    drawn.legend(*handles, loc="lower center", ncols=2, fontsize=9)
    drawn.tight_layout(rect=(0, 0.2, 1, 1))
    drawn.savefig(path, dpi=110)


def _mark(panel: Any, points: list[Point], **style: str) -> None:
    x, y, deviation = zip(*points, strict=True)
    panel.errorbar(x, y, yerr=deviation, capsize=3, **style)


def main() -> None:
    """Say where the curves cross, and draw them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("sets", nargs="+", metavar="NAME=OUT")
    parser.add_argument("--figure", default="20-NN", choices=["20-NN", "linear", "20-NN held out"])
    parser.add_argument("--output", type=Path, default=Path("output/purity.png"))
    args = parser.parse_args()
    sets = {}
    for text in args.sets:
        name, _, folder = text.partition("=")
        results = json.loads((Path(folder) / "figures.json").read_text())["methods"]
        if "byol" not in results or not set(results) <= set(methods.REAL):
            sys.exit(f"{text}: not of runs on real images with byol among them")
        points = sets[name] = points_of(results, args.figure)
        for method, point in points.items():
            print(f"{name}, {method:16} {point.purity:6.1f} {point.accuracy:6.1f}", end="")
            print(f" ± {point.deviation:.1f}")
        found = break_even(curve_of(points), points["byol"].accuracy)
        said = "at no purity" if found is None else f"from a purity of {found:.0f}% on"
        print(f"{name}: neighbors pay {said}")
    draw(sets, args.figure, args.output)


if __name__ == "__main__":
    main()
