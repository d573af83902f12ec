"""One page on one training run: what it was, how it went, whether it is healthy, what came out.

    python eval/report.py <CHECKPOINT PATH>
    python eval/report.py <CHECKPOINT PATH> --results <DIR> --neighbors <PNG> --output page.html

A single HTML file that opens without a network: curves are SVG, pictures are inside. A run is its
folder or its log.jsonl, one that still goes on too. Results are knn.json, linear.json and
results.json (eval_knn.py, eval_linear.py, compare.py) of the run's folder, the one above it, and
those of --results, and linear/linear.json and finetune/linear.json there, as far as they are of the
run's last checkpoint and on the val images of the first; what is left out is named.
"""

import argparse
import base64
import datetime
import itertools
import os
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jinja2  # torch needs it, so that it is there

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import arguments
from utils.evaluation import comparison_table, result_files
from utils.evaluation.result_files import Encoder, ValImages
from utils.reporting import curves, health, run_log
from utils.reporting.run_log import RunLog
from utils.runtime import checked, files, plain_json, script
from utils.runtime.errors import InputError, printable
from utils.training.run_folder import REQUEUE, checkpoints_in

COMPARISON = "results.json"
RESULTS = ("knn.json", "linear.json", "linear/linear.json", "finetune/linear.json", COMPARISON)
# Of a file of one encoder: where its table is, what a row is called, and the title.
TABLES = {
    "knn.json": ("k", "{}-NN", "k-NN"),
    "linear.json": ("lr", "learning rate {}", "linear classifier"),
}
PICTURES = {"neighbors": "png", "features": "svg"}  # by flag, and how their names begin and end
QUESTION = "<h2>Is this run healthy?</h2>"  # by which a page of ours is known


class Result(NamedTuple):
    """A result file: its table (row -> column -> figure), whose it is in words, and of what.

    images: the val images that it is of; a comparison does not say.
    """

    title: str
    rows: dict[str, dict]
    note: str
    encoders: list[Encoder]
    images: ValImages = ValImages()


def status(run: RunLog, *, now: float) -> str:
    """Whether a run is finished, stopped, or goes on; now: seconds since the epoch."""
    epoch, step = run.place
    of = f" of {run.epochs}" if run.epochs else ""
    place = f"epoch {epoch}{of}, step {step} of {run.steps}"
    if "error" in run.records[-1]:
        return f"stopped in {place}: {run.records[-1]['error']}"
    if run.epochs and run.place >= (run.epochs, run.steps):
        return f"finished: {place}"
    if (run.path.parent / REQUEUE).exists():
        return f"stopped by a signal, to be resumed (--resume auto): {place}"
    word = "still going on, or broken off"
    word = word if run.epochs else "of how many epochs is not known (no run.json)"
    age = datetime.timedelta(seconds=round(max(0, now - run.path.stat().st_mtime)))
    return f"{word}: {place}; the last line was written {age} before this page"


def find_results(
    named: list[Path], *, also: Path, last: str | None
) -> tuple[dict[Path, Result], dict[Path, str]]:
    """The result files of some folders, each once, of a run's last checkpoint (sha256, or None).

    And of those that are not of it, or on other val images than the first, the reason why they are
    left out. InputError for a file that is none; in the folder `also`, which nobody named, it is
    left out as well.
    """
    found: dict[Path, Result] = {}
    left_out: dict[Path, str] = {}
    paths: dict[str, tuple[Path, bool]] = {}
    for folder, name in itertools.product([*named, also], RESULTS):
        paths.setdefault(os.path.realpath(folder / name), (folder / name, folder in named))
    for path, is_named in paths.values():
        try:
            if not (record := result_files.read_json(path)):
                continue
            result = (read_comparison if path.name == COMPARISON else read_result)(path, record)
        except InputError as error:
            if is_named:
                raise
            left_out[path] = str(error).removeprefix(f"{path}: ")
            continue
        told = [first for first in found if found[first].images != ValImages()]
        if reason := not_of(result.encoders, last=last):
            left_out[path] = reason
        elif told and not result.images.is_same(images := found[told[0]].images):
            left_out[path] = f"on {result.images}, not on {images} as {told[0]}"
        else:
            found[path] = result
    return found, left_out


def not_of(encoders: list[Encoder], *, last: str | None) -> str:
    """Why what is of these encoders is not of the last checkpoint (its sha256), "" if it is."""
    if last is None:
        return "the run has no checkpoint yet"
    if last in {encoder.sha256 for encoder in encoders}:
        return ""
    whose = " and ".join(dict.fromkeys(map(str, encoders))) or "nothing"
    return f"of {whose}, not of the run's last checkpoint ({last[:12]})"


def read_result(path: Path, record: dict) -> Result:
    """What a file of one encoder holds; InputError if its table is none."""
    what = str(path)
    key, label, title = TABLES[path.name]
    rows = checked.take(record, key, result_files.TABLE, what=what)
    encoder = result_files.encoder_of(record, what=what)
    tuned = result_files.is_fine_tuned(record, what=what)
    if tuned or (tuned is None and path.parent.name == "finetune"):
        title = "fine-tuned encoder"
    rows = {label.format(name): row for name, row in rows.items()}
    note = f"of this run's last checkpoint: {encoder}"
    return Result(title, rows, note, [encoder], result_files.val_images_of(record, what=what))


def read_comparison(path: Path, record: dict) -> Result:
    """What compare.py has written: rows of several encoders, of which one is the run's."""
    encoders, rows = {}, {}
    for name in record:
        what = f"{path}, {printable(name)}"
        rows[name] = row = dict(checked.take(record, name, checked.TABLE, what=str(path)))
        for key in (result_files.LEFT_OUT, result_files.MORE):
            row.pop(key, None)
        of = {result_files.OF: row.pop(result_files.OF, {})}
        of = checked.take(of, result_files.OF, checked.TABLE, what=what)
        encoders[name] = result_files.encoder_of(of, what=what)
    checked.take({"its table": rows}, "its table", result_files.TABLE, what=str(path))
    whose = "; ".join(f"{name}: {encoder}" for name, encoder in encoders.items())
    note = f"on the val images; k-NN, linear and fine-tuned: accuracy, percent; {whose}"
    for row in rows.values():
        measured = {n: row[n] for n in comparison_table.NOT_PERCENT if row.get(n) is not None}
        row |= {name: comparison_table.shown(name, value) for name, value in measured.items()}
    return Result("comparison", rows, note, list(encoders.values()))


def find_pictures(folder: Path, named: dict, *, last: str | None) -> tuple[dict, dict]:
    """The pictures that the flags name, or the folder's such as neighbors*.png: shown, left out.

    named: by flag. Each path with why it is not known to be of the last checkpoint, by the JSON
    beside it; "" if it is.
    """
    shown, left_out = {}, {}
    for kind, ending in PICTURES.items():
        for path in named[kind] or sorted(folder.glob(f"{kind}*.{ending}")):
            if not path.is_file() or result_files.picture_format(path) != ending:
                if named[kind]:
                    raise InputError(f"--{kind} {path}: no {ending.upper()} file")
                continue
            about = path.with_suffix(".json")
            try:
                encoder = result_files.encoder_of(result_files.read_json(about), what=str(about))
                note = not_of([encoder], last=last)
            except InputError as error:
                note = str(error)
            (shown if named[kind] or not note else left_out)[path] = note
    return shown, left_out


def build_page(run: RunLog, *, now: float, **parts: Any) -> str:
    """The whole page as text; parts: results, pictures, what is left out, the last checkpoint."""
    page = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {
        "cell": lambda x: "–" if x is None else f"{x:.2f}" if isinstance(x, float) else str(x),
        "columns": lambda rows: list(dict.fromkeys(name for row in rows.values() for name in row)),
        "pairs": lambda table, words: ", ".join(words.format(*pair) for pair in table.items()),
        "json": plain_json.dumps,
        "svg": curves.chart_svg,
        "duration": lambda seconds: str(datetime.timedelta(seconds=round(seconds))),
        "kind": result_files.picture_format,
        "base64": lambda path: base64.b64encode(path.read_bytes()).decode(),
    }
    return page.from_string(Path(__file__).with_suffix(".html").read_text()).render(
        run=run,
        style=Path(__file__).with_suffix(".css").read_text(),
        status=status(run, now=now),
        made=time.strftime("%Y-%m-%d %H:%M", time.gmtime(now)),
        question=QUESTION,
        health=health,
        charts=curves.build_charts([curves.Group(run.name, [run])]),
        **parts,
    )


def parse_args() -> argparse.Namespace:
    """The flags of this script."""
    parser = arguments.Parser(description="A page on one training run.")
    run = {"type": arguments.path_text, "metavar": "RUN"}
    parser.add_argument("run", **run, help="the run's folder, or its log.jsonl")
    text = "HTML to write, replaces only a page like it; default: report.html in RUN"
    parser.add_argument("--output", type=arguments.path, help=text)
    several = {"nargs": "+", "default": [], "type": arguments.path}
    parser.add_argument("--results", **several, help="folders with result files")
    for kind, ending in PICTURES.items():
        parser.add_argument(f"--{kind}", **several, help=f"{ending.upper()} files of {kind}")
    return parser.parse_args()


def main() -> None:
    """Write the page and say what it says."""
    args = parse_args()
    run = run_log.read(args.run)
    folder = run.path.parent
    output = args.output or folder / "report.html"
    if output.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--output {output}: ends in none of .html, .htm")
    result_files.check_own(
        output, flag="--output", kind="page on a run", is_own=lambda p: QUESTION in p.read_text()
    )
    result_files.make_folder(output.parent, flag="--output")
    for path in args.results:
        if not path.is_dir():
            raise InputError(f"--results {path}: no such folder")
    checkpoint = next(iter(checkpoints_in(folder)), None)
    last = checkpoint and files.sha256(checkpoint)
    above = folder.resolve().parent
    results, left_out = find_results([folder, *args.results], also=above, last=last)
    pictures, others = find_pictures(folder, vars(args), last=last)
    left_out |= others
    now = time.time()
    parts = {"results": results, "left_out": left_out, "pictures": pictures}
    page = build_page(run, now=now, checkpoint=checkpoint, sha256=last, **parts)
    files.replace_text(output, page, flag="--output")
    print(printable(status(run, now=now)))
    for verdict in health.verdicts(run):
        print(f"{health.SIGNS[verdict.word]} {verdict.question}: {verdict.word}, {verdict.reason}")
    for path, reason in left_out.items():
        print(f"{path} left out: {reason}")
    for path, note in pictures.items():
        if note:
            print(f"{path}: {note}")
    print(output)


if __name__ == "__main__":
    script.run_script(main)
