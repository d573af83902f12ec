"""One page on one training run: what it was, how it went, whether it is healthy, what came out.

    python eval/report.py <CHECKPOINT PATH>
    python eval/report.py <CHECKPOINT PATH> --results <DIR> --neighbors <PNG> --output page.html

A single HTML file that opens without a network: curves are SVG, pictures are inside. A run is its
folder or its log.jsonl, one that still goes on too. Results are knn.json, linear.json and
results.json (eval_knn.py, eval_linear.py, compare.py) of the run's folder, the one above it, and
those of --results, and linear/linear.json and finetune/linear.json there.
"""

import argparse
import base64
import itertools
import json
import sys
import time
from html import escape
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import arguments, checkpoint, health, result_files, run_log, running, svg
from utils.errors import InputError
from utils.run_folder import REQUEUE, checkpoints_in
from utils.run_log import PANELS, RunLog

RESULTS = (
    *("knn.json", "linear.json", "linear/linear.json", "finetune/linear.json", "results.json"),
)
KINDS = {"knn.json": "k-NN", "linear.json": "linear classifier", "results.json": "comparison"}
TITLES = {"top1": "top-1", "top5": "top-5", "weighted_top5": "weighted top-5"}
TITLES |= {"best_top1": "best top-1", "best_epoch": "its epoch"}
PNG = b"\x89PNG\r\n\x1a\n"
PATIENCE = 5  # intervals between lines after which a run has perhaps been broken off
STYLE = Path(__file__).with_suffix(".css")


class Result(NamedTuple):
    """A result file: what it is of, its table (row -> column -> figure), whose it is, and where."""

    title: str
    rows: dict[str, dict]
    of: str
    path: Path


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
    times = [record["seconds"] for record in run.records if "seconds" in record]
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


def find_results(folders: list[Path], *, last_sha256: str | None) -> list[Result]:
    """The result files of some folders, each once; last_sha256: of the run's last checkpoint."""
    found: dict[Path, Result] = {}
    for folder in folders:
        for name in RESULTS:
            path = folder / name
            if path.is_file() and path.resolve() not in found:
                found[path.resolve()] = read_result(path, last_sha256=last_sha256)
    return list(found.values())


def read_result(path: Path, *, last_sha256: str | None) -> Result:
    """One result file; InputError if it is not what its name says."""
    record = result_files.read_json(path)
    key = {"knn.json": "k", "linear.json": "lr"}.get(path.name)
    rows = record if key is None else record.get(key)
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise InputError(f"{path}: no result file (it holds no table)")
    labels = {"k": "{}-NN", "lr": "learning rate {}", None: "{}"}[key]
    rows = {labels.format(name): row for name, row in rows.items()}
    title = "fine-tuned encoder" if path.parent.name == "finetune" else KINDS[path.name]
    if key is None:
        of = "accuracy on the val images, percent"
    elif record.get("sha256") and record["sha256"] == last_sha256:
        of = "of this run's last checkpoint"
    else:
        epoch = f", epoch {record['epoch']}" if record.get("epoch") else ""
        of = f"not of this run's last checkpoint, but of {record.get('checkpoint')}{epoch}"
    return Result(title, rows, of, path)


def last_checkpoint(folder: Path) -> tuple[Path, str] | None:
    """The checkpoint farthest on and its sha256; a run that goes on may remove older ones."""
    for path in checkpoints_in(folder):
        try:
            return path, checkpoint.sha256(path)
        except FileNotFoundError:
            continue
    return None


def find_pictures(folder: Path, named: list[Path] | None) -> list[Path]:
    """PNG files of neighbors: the named ones, or neighbors*.png of the run's folder."""
    for path in named or []:
        if not path.is_file():
            raise InputError(f"--neighbors {path}: no such file")
        with path.open("rb") as file:
            if file.read(len(PNG)) != PNG:
                raise InputError(f"--neighbors {path}: no PNG file")
    return named or sorted(folder.glob("neighbors*.png"))


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
        f'<h2>Is this run healthy?</h2><ul class="checks">{"".join(lines)}</ul>{said}'
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


def results_section(run: RunLog, results: list[Result]) -> str:
    """The last k-NN figures of the log, and the tables of the result files."""
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
    return f'<h2>Results</h2><div class="stack tables">{"".join(boxes)}</div>'


def pictures_section(paths: list[Path]) -> str:
    """Pictures of neighbors, inside the page; "" without any."""
    if not paths:
        return ""
    images = [
        '<figure class="card"><img alt="Images with their nearest neighbors" '
        f'src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
        f"<figcaption>{escape(path.name)}</figcaption></figure>"
        for path in paths
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
        settings = {f"--{name}": json.dumps(value) for name, value in run.settings.items()}
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
        place = f", resumed after epoch {origin['epoch']}, step {origin['step']}" if origin else ""
        lines.append(f"<li>{escape(str(start.get('started')))}{place}</li>")
    return f"<p>Started:</p><ul>{''.join(lines)}</ul>" if lines else ""


def build_page(
    run: RunLog,
    *,
    results: list[Result],
    pictures: list[Path],
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
            results_section(run, results),
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
        "--output", type=arguments.path, help="HTML to write; default: report.html in RUN"
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


def main() -> None:
    """Write the page and say what it says."""
    args = parse_args()
    run = run_log.read(args.run)
    folder = run.path.parent
    output = args.output or folder / "report.html"
    for path in args.results:
        if not path.is_dir():
            raise InputError(f"--results {path}: no such folder")
    newest = last_checkpoint(folder)
    results = find_results(
        [folder, folder.resolve().parent, *args.results], last_sha256=newest and newest[1]
    )
    pictures = find_pictures(folder, args.neighbors)
    now = time.time()
    page = build_page(run, results=results, pictures=pictures, newest=newest, now=now)
    result_files.make_folder(output.parent, flag="--output")
    if output.is_dir():
        raise InputError(f"--output {output}: a folder")
    checkpoint.replace_text(output, page)
    print(status(run, now=now))
    for verdict in health.verdicts(run):
        print(f"{verdict.sign} {verdict.question}: {verdict.word}, {verdict.reason}")
    print(output)


if __name__ == "__main__":
    running.run_script(main)
