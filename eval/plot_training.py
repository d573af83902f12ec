"""Curves of one or several training runs as small multiples in one picture.

    python eval/plot_training.py <CHECKPOINT PATH>
    python eval/plot_training.py --output seeds.svg "top-5=<RUN 1>" "top-5=<RUN 2>" "top-10=<RUN 3>"

A run is its folder (--checkpoint_path) or its log.jsonl, one that still goes on too. Runs of one
name, and without names those whose flags differ by --seed alone, are one group: the mean is drawn,
and a band from the lowest to the highest of them. The picture is an SVG file, for any browser.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import arguments
from utils.evaluation import result_files
from utils.reporting import curves, run_log
from utils.reporting.curves import Group
from utils.reporting.run_log import RunLog
from utils.runtime import files, script
from utils.runtime.errors import InputError
from utils.training import resume_check

LONGEST_NAME = 60
OWN = "<!-- by plot_training.py -->\n"  # how its pictures begin, by which they are known


def build_groups(texts: list[str]) -> list[Group]:
    """The groups of the command line's runs, in its order; InputError for runs that do not mix."""
    by_key: dict[tuple, list[RunLog]] = {}  # the name, or what runs of an experiment have in common
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or Path(text).exists():
            name, path = None, text
        elif not name:
            raise InputError(f"{text}: not NAME=RUN, the name is empty")
        run = run_log.read(path)
        experiment = (run.method, sorted(_flags(run).items()), run.about.get("data"))
        experiment = experiment if run.starts else run.path.resolve()  # not known: a group alone
        runs = by_key.setdefault((name, None if name else repr(experiment)), [])
        if run.path.resolve() in [other.path.resolve() for other in runs]:
            raise InputError(f"{text}: a run that is there already, under the same name")
        runs.append(run)
    names = iter(_names([runs[0] for (name, _), runs in by_key.items() if not name]))
    groups = [Group(name or next(names), runs) for (name, _), runs in by_key.items()]
    for group in groups:
        _check(group)
    return groups


def _flags(run: RunLog) -> dict:
    """The flags that make a run the experiment that it is, whatever its seed."""
    return {n: v for n, v in resume_check.decisive(run.settings).items() if n != "seed"}


def _differing(runs: list[RunLog]) -> list[str]:
    """The names of the flags that are not everywhere the same."""
    flags = [_flags(run) for run in runs]
    every = sorted({name for one in flags for name in one})
    return [n for n in every if any(one.get(n) != flags[0].get(n) for one in flags)]


def _names(runs: list[RunLog]) -> list[str]:
    """Names of groups that the user gave none, of a run each: method and flags that differ."""
    flags = _differing(runs) if runs else []
    names = [
        " ".join([run.method or run.name, *(f"--{n} {_flags(run).get(n)}" for n in flags)])
        for run in runs
    ]
    if len({*names}) == len(names) and max(map(len, names), default=0) <= LONGEST_NAME:
        return names
    return [str(run.path.parent) for run in runs]


def _check(group: Group) -> None:
    """InputError for a group of several methods; says what its band leaves out."""
    runs = group.runs
    methods = {run.method or "an unknown method" for run in runs}
    if len(methods) > 1:
        of = " and ".join(sorted(methods))
        raise InputError(f"{group.name}: runs of several methods in one group ({of})")
    common = set.intersection(*({(r["epoch"], r["step"]) for r in run.records} for run in runs))
    if len({run.steps for run in runs}) > 1 or not common:
        raise InputError(f"{group.name}: runs in one group that log no step in common")
    if len({run.place for run in runs}) > 1:
        ends = ", ".join(str(run.place[0]) for run in runs)
        print(f"{group.name}: runs up to epoch {ends}: drawn as far as the shortest", flush=True)
    if others := _differing(runs):
        print(f"WARNING {group.name}: runs that differ in --{', --'.join(others)}", flush=True)


def draw(groups: list[Group], output: Path) -> int:
    """Write the picture; the number of its charts."""
    charts = curves.build_charts(groups)
    files.replace_text(output, OWN + curves.sheet_svg(charts, groups), flag="--output")
    return len(charts)


def parse_args() -> argparse.Namespace:
    """The flags of this script."""
    parser = arguments.Parser(description="Curves of training runs in one picture.")
    run = {"nargs": "+", "type": arguments.named_path, "metavar": "[NAME=]RUN"}
    parser.add_argument("runs", **run, help="folder or log.jsonl")
    path, text = Path("training.svg"), "SVG to write, replaces only one like it"
    parser.add_argument("--output", type=arguments.path, default=path, help=text)
    return parser.parse_args()


def main() -> None:
    """Draw the runs and say where."""
    args = parse_args()
    if args.output.suffix.lower() != ".svg":
        raise InputError(f"--output {args.output}: a name that ends in .svg")
    own = {"kind": "picture of curves", "is_own": lambda p: p.read_text().startswith(OWN)}
    result_files.check_own(args.output, flag="--output", **own)
    groups = build_groups(args.runs)
    result_files.make_folder(args.output.parent, flag="--output")
    count = draw(groups, args.output)
    print(f"{args.output}: {count} panels, {', '.join(group.label for group in groups)}")


if __name__ == "__main__":
    script.run_script(main)
