"""Curves of one or several training runs as small multiples in one picture.

    python eval/plot_training.py <CHECKPOINT PATH>
    python eval/plot_training.py --output seeds.png "top-5=<RUN 1>" "top-5=<RUN 2>" "top-10=<RUN 3>"

A run is its folder (--checkpoint_path) or its log.jsonl, one that still goes on too. Runs of one
name, and without names those whose flags differ by --seed alone, are one group: the mean is drawn,
and a band from the lowest to the highest of them.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import arguments
from utils.evaluation import result_files
from utils.reporting import run_log
from utils.reporting.run_log import PANELS, Panel, RunLog
from utils.runtime import files, script
from utils.runtime.errors import InputError, printable
from utils.training import resume_check

# Okabe and Ito's colors without the yellow, which is faint on white, each with its own dashes.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000", "#56B4E9", "#E69F00")
DASHES = ("-", "--", ":", "-.", (0, (7, 2)), (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
COLUMNS = 3
FEW = 20  # points up to which each is marked
LONGEST_NAME = 60
BAND = "line: mean, band: lowest to highest of the runs of a name"


@dataclass(frozen=True)
class Group:
    """Runs that are drawn as one: of one method."""

    name: str
    runs: list[RunLog]

    @property
    def label(self) -> str:
        """What the legend says."""
        return self.name if len(self.runs) == 1 else f"{self.name} ({len(self.runs)} runs)"

    def has(self, figure: str) -> bool:
        """Whether all its runs have a figure."""
        return all(run.has(figure) for run in self.runs)

    def band(self, figure: str) -> np.ndarray:
        """(4, n): epochs passed, lowest, mean and highest, where all runs were measured.

        A run whose figure was not finite there counts as nan.
        """
        curves = [run.curve(figure) for run in self.runs]
        places = sorted(set.intersection(*(set(curve) for curve in curves)))
        values = np.array([[curve[place] for place in places] for curve in curves])
        return np.stack([places, values.min(axis=0), values.mean(axis=0), values.max(axis=0)])

    def rank_histograms(self) -> dict[float, np.ndarray]:
        """As `RunLog.rank_histograms`, the mean of the runs; {} where they do not go together."""
        each = [run.rank_histograms() for run in self.runs]
        bins = {len(shares) for one in each for shares in one.values()}
        if any(list(one) != list(each[0]) for one in each) or len(bins) > 1:
            return {}
        return {place: np.mean([one[place] for one in each], axis=0) for place in each[0]}


def named(text: str) -> tuple[str | None, RunLog]:
    """The name (None: it has none) and the run of "name=RUN" or "RUN"."""
    name, equals, path = text.partition("=")
    if not equals or Path(text).exists():
        return None, run_log.read(text)
    if not name:
        raise InputError(f"{text}: not NAME=RUN, the name is empty")
    return name, run_log.read(path)


def build_groups(texts: list[str]) -> list[Group]:
    """The groups of the command line's runs, in its order; InputError for runs that do not mix."""
    by_key: dict[Any, list[RunLog]] = {}
    for text in texts:
        name, run = named(text)
        runs = by_key.setdefault(name or _experiment(run), [])
        if run.path.resolve() in [other.path.resolve() for other in runs]:
            raise InputError(f"{text}: a run that is there already, under the same name")
        runs.append(run)
    unnamed = [runs for key, runs in by_key.items() if not isinstance(key, str)]
    names = dict(zip(map(id, unnamed), _names(unnamed), strict=True))
    groups = []
    for key, runs in by_key.items():
        groups.append(Group(key if isinstance(key, str) else names[id(runs)], runs))
        _check(groups[-1])
    return groups


def _experiment(run: RunLog) -> tuple:
    """What runs that differ by their seed alone have in common."""
    if not run.starts:
        return (str(run.path.resolve()),)  # not known: a group of its own
    flags = {n: v for n, v in resume_check.decisive(run.settings).items() if n != "seed"}
    return (run.method, repr(sorted(flags.items())), repr(run.about.get("data")))


def _names(groups: list[list[RunLog]]) -> list[str]:
    """Names of groups that the user gave none: method and flags that differ, or the folder."""
    flags = [resume_check.decisive(runs[0].settings) | {"seed": None} for runs in groups]
    every = sorted({name for settings in flags for name in settings})
    differing = [n for n in every if any(f.get(n) != flags[0].get(n) for f in flags)]
    names = []
    for runs, settings in zip(groups, flags, strict=True):
        parts = [f"--{n} {settings[n]}" for n in differing if n in settings]
        names.append(" ".join([runs[0].method or runs[0].name, *parts]))
    if len(set(names)) == len(names) and max(map(len, names), default=0) <= LONGEST_NAME:
        return names
    names = [runs[0].name for runs in groups]
    return names if len(set(names)) == len(names) else [str(r[0].path.parent) for r in groups]


def _check(group: Group) -> None:
    """InputError for a group of several methods; says what its band leaves out."""
    runs = group.runs
    methods = [run.method or "an unknown method" for run in runs]
    kinds = [{name for p in PANELS for name in p.figures if run.has(name)} for run in runs]
    learned = [kind & {"purity_constrained", "confident"} for kind in kinds]
    if len(set(methods)) > 1 or any(kind != learned[0] for kind in learned):
        of = " and ".join(sorted(set(methods)))
        raise InputError(f"{group.name}: runs of several methods in one group ({of})")
    places = [{(r["epoch"], r["step"]) for r in run.records} for run in runs]
    common = set.intersection(*places)
    if len({run.steps for run in runs}) > 1 or not common:
        raise InputError(f"{group.name}: runs in one group that log no step in common")
    if len({run.place for run in runs}) > 1:
        ends = ", ".join(str(run.place[0]) for run in runs)
        print(f"{group.name}: runs up to epoch {ends}: drawn as far as the shortest", flush=True)
    flags = [resume_check.decisive(run.settings) | {"seed": None} for run in runs]
    others = sorted({n for f in flags for n in f if f[n] != flags[0].get(n)})
    if others and all(run.starts for run in runs):
        print(f"WARNING {group.name}: runs that differ in --{', --'.join(others)}", flush=True)


def build_panels(groups: list[Group]) -> list[Panel]:
    """The panels of which some group has a figure.

    For several groups one figure in each, the first and the last of what goes together: 1-NN and
    20-NN, say.
    """
    panels = []
    for panel in PANELS:
        there = {n: text for n, text in panel.figures.items() if any(g.has(n) for g in groups)}
        if there and len(groups) == 1:
            panels.append(panel._replace(figures=there))
        elif there:
            for name in dict.fromkeys((next(iter(there)), list(there)[-1])):
                text = there[name]
                title = f"{panel.title}: {text}" if len(panel.figures) > 1 else panel.title
                panels.append(Panel(title, panel.unit, {name: text}))
    return panels


def draw_panel(axes: Any, panel: Panel, groups: list[Group]) -> None:
    """The curves of one panel: a color and dashes for each group, or for each of its figures."""
    alone = len(groups) == 1
    lines = [(group, name) for group in groups for name in panel.figures]
    for group, name in lines:
        if not group.has(name):
            continue
        place = list(panel.figures).index(name) if alone else groups.index(group)
        color, dashes = COLORS[place % len(COLORS)], DASHES[place % len(DASHES)]
        x, low, mean, high = group.band(name)
        marker = "o" if len(x) <= FEW else None
        label = panel.figures[name] if alone else None
        axes.plot(x, mean, color=color, linestyle=dashes, marker=marker, markersize=4, label=label)
        if len(group.runs) > 1:
            axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    if alone and len(panel.figures) > 1:
        axes.legend(fontsize=10, frameon=False)
    axes.set(title=panel.title, xlabel="epochs", ylabel=panel.unit)
    axes.set_xlim(left=0)
    axes.grid(alpha=0.3)


def draw_ranks(axes: Any, group: Group, title: str) -> None:
    """Histogram of the constrained neighbors' ranks by plain distance, early to late."""
    histograms = group.rank_histograms()
    for place, (epoch, shares) in enumerate(histograms.items()):
        color, dashes = COLORS[place % len(COLORS)], DASHES[place % len(DASHES)]
        text = f"epoch {epoch:.3g}"
        axes.plot(shares, color=color, linestyle=dashes, marker="o", markersize=4, label=text)
    bins = max(len(shares) for shares in histograms.values())
    labels = [str(2**i) for i in range(bins)]
    axes.set_xticks(range(0, bins, 2), labels[::2])
    axes.set(title=title, xlabel="rank by plain distance, from", ylabel="percent")
    axes.legend(fontsize=10, frameon=False)
    axes.grid(alpha=0.3)


def draw(groups: list[Group], output: Path) -> int:
    """Write the picture; the number of its panels. InputError without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        raise InputError("matplotlib is missing: pip install matplotlib") from None
    panels = build_panels(groups)
    ranks = [group for group in groups if group.rank_histograms()]
    count = len(panels) + len(ranks)
    rows = -(-count // COLUMNS)
    figure = Figure(figsize=(4.6 * COLUMNS, 3.4 * rows + 0.8), layout="constrained", dpi=110)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).ravel()
    for ax, panel in zip(axes[: len(panels)], panels, strict=True):
        draw_panel(ax, panel, groups)
    for ax, group in zip(axes[len(panels) : count], ranks, strict=True):
        of = f", {group.name}" if len(groups) > 1 else ""
        draw_ranks(ax, group, literal(f"ranks of constrained neighbors{of}"))
    for ax in axes[count:]:
        ax.remove()
    handles = [
        Line2D(
            [],
            [],
            color=COLORS[i % len(COLORS)],
            linestyle=DASHES[i % len(DASHES)],
            label=literal(g.label),
        )
        for i, g in enumerate(groups)
    ]
    if len(groups) > 1:
        figure.legend(handles=handles, loc="outside upper center", ncols=COLUMNS, fontsize=12)
    else:
        figure.suptitle(literal(groups[0].label), fontsize=14)
    if any(len(group.runs) > 1 for group in groups):
        figure.supxlabel(BAND, fontsize=11)
    with files.atomic_file(output, flag="--output") as file:
        figure.savefig(file, format="png")
    return count


def literal(text: str) -> str:
    """A text out of a file or a folder's name as it is: matplotlib takes dollars for formulas."""
    return printable(text).replace("$", r"\$")


def parse_args() -> argparse.Namespace:
    """The flags of this script."""
    parser = arguments.Parser(description="Curves of training runs in one picture.")
    parser.add_argument(
        *("runs",),
        nargs="+",
        type=arguments.named_path,
        metavar="[NAME=]RUN",
        help="folder or log.jsonl",
    )
    parser.add_argument(
        *("--output",),
        type=arguments.path,
        default=Path("training.png"),
        help="PNG to write, replaces only one like it",
    )
    return parser.parse_args()


def main() -> None:
    """Draw the runs and say where."""
    args = parse_args()
    if args.output.suffix.lower() != ".png":
        raise InputError(f"--output {args.output}: a name that ends in .png")
    result_files.check_own(
        args.output,
        flag="--output",
        kind="picture of curves",
        is_own=lambda path: result_files.is_png_of(path, "Matplotlib"),  # savefig says so
    )
    groups = build_groups(args.runs)
    result_files.make_folder(args.output.parent, flag="--output")
    count = draw(groups, args.output)
    print(f"{args.output}: {count} panels, {', '.join(group.label for group in groups)}")


if __name__ == "__main__":
    script.run_script(main)
