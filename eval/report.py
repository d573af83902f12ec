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
import itertools
import os
import sys
import time
from html import escape
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import arguments
from utils.evaluation import result_files
from utils.evaluation.result_files import Encoder, ValImages
from utils.reporting import health, run_log, svg
from utils.reporting.run_log import PANELS, RunLog
from utils.runtime import checked, files, plain_json, script
from utils.runtime.errors import InputError, printable
from utils.training.run_folder import REQUEUE, checkpoints_in

COMPARISON = "results.json"
RESULTS = (*("knn.json", "linear.json", "linear/linear.json", "finetune/linear.json", COMPARISON),)
KINDS = {"knn.json": "k-NN", "linear.json": "linear classifier", COMPARISON: "comparison"}
TITLES = {"top1": "top-1", "top5": "top-5", "weighted_top5": "weighted top-5"}
TITLES |= {"best_top1": "best top-1", "best_epoch": "its epoch"}
ENDINGS = (".html", ".htm")
QUESTION = "<h2>Is this run healthy?</h2>"  # by which a page of ours is known
PATIENCE = 5  # intervals between lines after which a run has perhaps been broken off
STYLE = Path(__file__).with_suffix(".css")


class Result(NamedTuple):
    """A result file: what it is of, its table (row -> column -> figure), whose it is, and where.

    images: the val images that it is of; a comparison does not say.
    """

    title: str
    rows: dict[str, dict]
    of: str
    path: Path
    images: ValImages = ValImages()


def status(run: RunLog, *, now: float) -> str:
    """Whether a run is finished, stopped, or goes on; now: seconds since the epoch."""
    epoch, step = run.place
    of = f" of {run.epochs}" if run.epochs else ""
    place = f"epoch {epoch}{of}, step {step} of {run.steps}"
    if "error" in run.records[-1]:
        return f"stopped in {place}: {run.records[-1]['error']}"
    if run.finished:
        return f"finished: {place}"
    if (run.path.parent / REQUEUE).exists():
        return f"stopped by a signal, to be resumed (--resume auto): {place}"
    if run.finished is None:
        return f"up to {place} (without run.json nothing tells how many epochs it is to have)"
    age = max(0, now - run.path.stat().st_mtime)
    times = [taken for record in run.records if (taken := record.get("seconds")) is not None]
    gaps = [b - a for a, b in itertools.pairwise(times)] or [600]
    ago = f"the last line was written {duration(age)} before this page"
    if age > PATIENCE * max(60, *gaps):
        return f"perhaps broken off, or still going on: {place}; {ago}"
    return f"still going on: {place}; {ago}"


def duration(seconds: float) -> str:
    """Seconds in words."""
    minutes, hours = seconds / 60, seconds / 3600
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if minutes < 120 else f"{hours:.1f} h"


def find_results(
    named: list[Path], *, also: list[Path], last_sha256: str | None
) -> tuple[list[Result], dict[Path, str]]:
    """The result files of some folders, each once, of a run's last checkpoint (None: it has none).

    And of those that are not of it, or on other val images than the first, the reason why they are
    left out. InputError for a file that is none; in the folders `also`, which nobody named, it is
    left out as well.
    """
    found: dict[Path, Result] = {}
    left_out: dict[Path, str] = {}
    paths: dict[str, Path] = {}
    for path in (folder / name for folder in [*named, *also] for name in RESULTS):
        paths.setdefault(os.path.realpath(path), path)
    asked = {folder / name for folder in named for name in RESULTS}
    for path in paths.values():
        read = read_comparison if path.name == COMPARISON else read_result
        try:
            record = result_files.read_json(path)
            result, of = read(path, record) if record else (None, [])
        except InputError as error:
            if path in asked:
                raise
            left_out[path] = str(error).removeprefix(f"{path}: ")
            continue
        if result is None:
            continue
        if reason := why_not(result, of, found, last_sha256=last_sha256):
            left_out[path] = reason
        else:
            found[path] = result
    return list(found.values()), left_out


def why_not(
    result: Result, of: list[Encoder], found: dict[Path, Result], *, last_sha256: str | None
) -> str:
    """Why a result of these encoders is left out, "" if it goes with those found before it."""
    if last_sha256 is None:
        return "the run has no checkpoint yet"
    if last_sha256 not in {encoder.sha256 for encoder in of}:
        whose = " and ".join(dict.fromkeys(map(str, of))) or "nothing"
        return f"of {whose}, not of the run's last checkpoint ({last_sha256[:12]})"
    first = next((other for other in found.values() if other.images != ValImages()), result)
    if not result.images.is_same(first.images):
        return f"on {result.images}, not on {first.images} as {first.path}"
    return ""


def read_result(path: Path, record: dict) -> tuple[Result, list[Encoder]]:
    """What a file of one encoder holds, and which it is; InputError if its table is none."""
    key, label = {"knn.json": ("k", "{}-NN"), "linear.json": ("lr", "learning rate {}")}[path.name]
    rows = checked.take(record, key, result_files.TABLE, what=str(path))
    encoder = result_files.encoder_of(record, what=str(path))
    images = result_files.val_images_of(record, what=str(path))
    tuned = result_files.is_fine_tuned(record, what=str(path))
    if tuned is None:
        tuned = path.parent.name == "finetune"
    title = "fine-tuned encoder" if tuned else KINDS[path.name]
    rows = {label.format(name): row for name, row in rows.items()}
    of = f"of this run's last checkpoint: {encoder}"
    return Result(title, rows, of, path, images), [encoder]


def read_comparison(path: Path, record: dict) -> tuple[Result, list[Encoder]]:
    """What compare.py has written: rows of several encoders, of which one is the run's."""
    own = (result_files.OF, result_files.LEFT_OUT)
    encoders, rows = {}, {}
    for name in record:
        row = checked.take(record, name, checked.table_of(checked.ANY), what=str(path))
        what = f"{path}, {printable(name)}"
        of = checked.take(row, own[0], checked.table_of(checked.ANY), what=what, default={})
        encoders[name] = result_files.encoder_of(of, what=what)
        rows[name] = {column: row[column] for column in row if column not in own}
        for column in rows[name]:
            checked.take(row, column, result_files.FIGURE, what=what)
    whose = "; ".join(f"{name}: {encoder}" for name, encoder in encoders.items())
    of = f"accuracy on the val images, percent; {whose}"
    return Result(KINDS[path.name], rows, of, path), list(encoders.values())


def last_checkpoint(folder: Path) -> tuple[Path, str] | None:
    """The checkpoint farthest on and its sha256; a run that goes on may remove older ones."""
    for path in checkpoints_in(folder):
        try:
            return path, files.sha256(path)
        except FileNotFoundError:
            continue
    return None


def find_pictures(
    folder: Path, named: list[Path] | None, *, last_sha256: str | None
) -> tuple[dict[Path, str], dict[Path, str]]:
    """PNG files of neighbors, each with a note: the named ones, or neighbors*.png of the folder.

    And of those in the folder that are not known to be of the last checkpoint, the reason why they
    are left out; to a named one it is the note.
    """
    for path in named or []:
        if not path.is_file():
            raise InputError(f"--neighbors {path}: no such file")
        if not result_files.is_png(path):
            raise InputError(f"--neighbors {path}: no PNG file")
    paths = named or filter(Path.is_file, sorted(folder.glob("neighbors*.png")))
    notes = {path: of_another(path, last_sha256=last_sha256) for path in paths}
    if named:
        return notes, {}
    return {p: n for p, n in notes.items() if not n}, {p: n for p, n in notes.items() if n}


def of_another(picture: Path, *, last_sha256: str | None) -> str:
    """Why a picture is not known to be of the last checkpoint, by the JSON beside it; "" if so."""
    about = picture.with_suffix(".json")
    try:
        encoder = result_files.encoder_of(result_files.read_json(about), what=str(about))
    except InputError as error:
        return f"not known of which checkpoint ({error})"
    if not encoder.is_known:
        return f"not known of which checkpoint (no {about.name} beside it that says so)"
    if encoder.sha256 is None or encoder.sha256 != last_sha256:
        return f"of {encoder}, not of the run's last checkpoint"
    return ""


def cell(value: object) -> str:
    """A figure as it stands in a table."""
    if value is None:
        return "–"
    return f"{value:.2f}" if isinstance(value, float) else escape(str(value))


def table(rows: dict[str, dict]) -> str:
    """A table in a box of its own to scroll in; columns: all that any row has."""
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    titles = ["", *(TITLES.get(column, column) for column in columns)]
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in titles)
    lines = []
    for name, row in rows.items():
        cells = "".join(f"<td>{cell(row.get(column))}</td>" for column in columns)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def definitions(pairs: dict[str, object]) -> str:
    """A list of names and what they stand for, without those that are None."""
    there = {name: value for name, value in pairs.items() if value is not None}
    parts = (f"<dt>{escape(k)}</dt><dd>{escape(str(v))}</dd>" for k, v in there.items())
    return f"<dl>{''.join(parts)}</dl>"


def health_section(run: RunLog) -> str:
    """Is this run healthy? One line for each question."""
    lines = [
        f'<li class="{escape(v.word.replace(" ", "-"))}"><span class="sign" aria-hidden="true">'
        f"{v.sign}</span><span><b>{escape(v.word)}</b>: {escape(v.question)}<br>"
        f'<span class="quiet">{escape(v.reason)}</span></span></li>'
        for v in health.verdicts(run)
    ]
    warnings = [record for record in run.records if "warning" in record]
    said = ""
    if warnings:
        last = warnings[-1]
        said = (
            f"<p>{len(warnings)} of {len(run.records)} log lines warn, the last in epoch "
            f"{last['epoch']}, step {last['step']}: {escape(str(last['warning']))}</p>"
        )
    return (
        f'{QUESTION}<ul class="checks">{"".join(lines)}</ul>{said}'
        f'<p class="quiet">Ranges: {escape(health.DEMO_RUNS)}. Other data and networks have '
        "others; below half of what the demo runs had is worth a look.</p>"
    )


def curves_section(run: RunLog) -> str:
    """The curves of all panels that the log has figures for."""
    epoch, step = run.place
    x_end = epoch - 1 + step / run.steps  # the same for all, to compare them
    cards = []
    for panel in PANELS:
        lines = []
        for name, label in panel.figures.items():
            if run.has(name):
                curve = run.curve(name)
                lines.append(svg.Line(label, list(curve), list(curve.values())))
        if lines:
            chart = svg.line_chart(lines, title=panel.title, unit=panel.unit, x_end=x_end)
            cards.append(card(panel.title, chart))
    if histograms := run.rank_histograms():
        lines = [
            svg.Line(f"epoch {epoch:.3g}", [float(i) for i in range(len(shares))], shares)
            for epoch, shares in histograms.items()
        ]
        title = "ranks of constrained neighbors"
        x_label = "log2 of the rank by plain distance"
        cards.append(
            card(title, svg.line_chart(lines, title=title, x_label=x_label, unit="percent"))
        )
    return f'<h2>Curves</h2><div class="cards">{"".join(cards)}</div>'


def card(title: str, content: str, note: str = "") -> str:
    """A box with a heading."""
    caption = f"<figcaption>{note}</figcaption>" if note else ""
    return f'<figure class="card"><h3>{escape(title)}</h3>{content}{caption}</figure>'


def results_section(run: RunLog, results: list[Result], left_out: dict[Path, str]) -> str:
    """The last k-NN figures of the log, the tables of the result files, what is not among them."""
    boxes = []
    measured = [record for record in run.records if record.get("knn")]
    if measured:
        rows = {f"{k}-NN": row for k, row in measured[-1]["knn"].items()}
        note = f"val images after epoch {measured[-1]['epoch']}, percent (log.jsonl)"
        boxes.append(card("k-NN during training", table(rows), note))
    for result in results:
        note = f"{escape(result.of)}<br><code>{escape(str(result.path))}</code>"
        boxes.append(card(result.title, table(result.rows), note))
    if not boxes:
        boxes.append("<p>Nothing has been measured yet (eval_knn.py, eval_linear.py --save).</p>")
    for path, reason in left_out.items():
        boxes.append(
            f'<p class="quiet">Left out: <code>{escape(str(path))}</code>, {escape(reason)}</p>'
        )
    return f'<h2>Results</h2><div class="stack tables">{"".join(boxes)}</div>'


def pictures_section(pictures: dict[Path, str]) -> str:
    """Pictures of neighbors with their notes, inside the page; "" without any."""
    if not pictures:
        return ""
    images = [
        '<figure class="card"><img alt="Images with their nearest neighbors" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        f"<figcaption>{escape(': '.join(filter(None, (path.name, note))))}</figcaption></figure>"
        for path, note in pictures.items()
    ]
    return f'<h2>Neighbors</h2><div class="stack">{"".join(images)}</div>'


def origin_section(run: RunLog, newest: tuple[Path, str] | None) -> str:
    """What was run: command, versions, data, last checkpoint, every start."""
    about = run.about
    pairs: dict[str, object] = {
        "method": run.method,
        "script": about.get("script"),
        "images": counts_text(about.get("counts", {})) or None,
        "versions": ", ".join(f"{k} {v}" for k, v in about.get("versions", {}).items()) or None,
        "device": about.get("device"),
        "processes": about.get("processes"),
        "folder": str(run.path.parent),
        "last checkpoint": newest[0].name if newest else "none yet",
        "its sha256": newest[1] if newest else None,
    }
    for name, digest in about.get("data", {}).items():
        pairs[f"digest of {name}"] = digest
    parts = ["<h2>What was run</h2>"]
    if about.get("command"):
        parts.append(f"<pre>{escape(about['command'])}</pre>")
    else:
        parts.append("<p>There is no run.json, so that command and versions are not known.</p>")
    parts.append(definitions(pairs))
    parts.append(starts_text(run.starts))
    if run.settings:
        settings = {f"--{name}": plain_json.dumps(value) for name, value in run.settings.items()}
        parts.append(f"<details><summary>All flags</summary>{definitions(settings)}</details>")
    return "".join(parts)


def counts_text(counts: dict[str, int]) -> str:
    """How many images there were, in words."""
    return ", ".join(f"{number:,} {name}" for name, number in counts.items())


def starts_text(starts: list[dict]) -> str:
    """When the run was started, and from where it went on."""
    lines = []
    for start in starts:
        origin = start.get("resumed_from")
        place = ""
        if origin:
            place = f", resumed after epoch {origin.get('epoch')}, step {origin.get('step')}"
        lines.append(f"<li>{escape(str(start.get('started')) + place)}</li>")
    return f"<p>Started:</p><ul>{''.join(lines)}</ul>" if lines else ""


def build_page(
    run: RunLog,
    *,
    results: list[Result],
    left_out: dict[Path, str],
    pictures: dict[Path, str],
    newest: tuple[Path, str] | None,
    now: float,
) -> str:
    """The whole page as text."""
    title = f"{run.method or 'Training run'}: {run.name}"
    taken = run.records[-1].get("seconds")
    made = time.strftime("%Y-%m-%d %H:%M", time.gmtime(now))
    facts = [f"made {made} UTC"]
    if taken is not None:
        facts.insert(0, f"{duration(taken)} of training")
    if run.cut:
        facts.append("the last line of the log is half written and left out")
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{STYLE.read_text()}</style></head><body>",
            f'<header><h1>{escape(title)}</h1><p class="status">{escape(status(run, now=now))}</p>',
            f'<p class="quiet">{escape("; ".join(facts))}</p></header><main>',
            health_section(run),
            results_section(run, results, left_out),
            curves_section(run),
            pictures_section(pictures),
            origin_section(run, newest),
            "</main></body></html>\n",
        ]
    )


def parse_args() -> argparse.Namespace:
    """The flags of this script."""
    parser = arguments.Parser(description="A page on one training run.")
    parser.add_argument(
        "run", type=arguments.path_text, metavar="RUN", help="the run's folder, or its log.jsonl"
    )
    parser.add_argument(
        *("--output",),
        type=arguments.path,
        help="HTML to write, replaces only a page like it; default: report.html in RUN",
    )
    parser.add_argument(
        *("--results",),
        type=arguments.path,
        nargs="+",
        default=[],
        help="folders with result files",
    )
    parser.add_argument(
        "--neighbors", type=arguments.path, nargs="+", help="PNG files of nearest neighbors"
    )
    return parser.parse_args()


def is_page(path: Path) -> bool:
    """Whether a file is a page that was written here."""
    with path.open(encoding="utf-8") as file:
        head = file.read(2**20)
    return head.startswith("<!doctype html>") and QUESTION in head


def check_output(path: Path) -> None:
    """InputError unless the page can be written without loss of another file."""
    if path.suffix.lower() not in ENDINGS:
        raise InputError(f"--output {path}: ends in none of {', '.join(ENDINGS)}")
    result_files.check_own(path, flag="--output", kind="page on a run", is_own=is_page)
    result_files.make_folder(path.parent, flag="--output")


def main() -> None:
    """Write the page and say what it says."""
    args = parse_args()
    run = run_log.read(args.run)
    folder = run.path.parent
    output = args.output or folder / "report.html"
    check_output(output)
    for path in args.results:
        if not path.is_dir():
            raise InputError(f"--results {path}: no such folder")
    newest = last_checkpoint(folder)
    last = newest and newest[1]
    above = [folder.resolve().parent]
    results, left_out = find_results([folder, *args.results], also=above, last_sha256=last)
    pictures, others = find_pictures(folder, args.neighbors, last_sha256=last)
    left_out |= others
    now = time.time()
    page = build_page(
        run, results=results, left_out=left_out, pictures=pictures, newest=newest, now=now
    )
    files.replace_text(output, page, flag="--output")
    print(printable(status(run, now=now)))
    for verdict in health.verdicts(run):
        print(f"{verdict.sign} {verdict.question}: {verdict.word}, {verdict.reason}")
    for path, reason in left_out.items():
        print(f"{path} left out: {reason}")
    for path, note in pictures.items():
        if note:
            print(f"{path}: {note}")
    print(output)


if __name__ == "__main__":
    script.run_script(main)
