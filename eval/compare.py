"""One table of several encoders' results, as text and as JSON.

    python eval/compare.py --save <DIR> "random network=<DIR>" "CMSF=<DIR>"

Each argument names a row and a folder with what eval_knn.py and eval_linear.py wrote: knn.json,
linear/linear.json (frozen encoder) and finetune/linear.json (fine-tuned encoder). What is not there
stays empty, and so does what is of another checkpoint than the first of them, which is said.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import arguments, checked, result_files, running
from utils.errors import InputError
from utils.result_files import Encoder

KNN, LINEAR, FINETUNE = "knn.json", "linear/linear.json", "finetune/linear.json"
# Column -> the file it stands in, and where in it.
COLUMNS = {
    **{f"{k}-NN": (KNN, ("k", k, "accuracy")) for k in ("1", "20")},
    **{"linear": (LINEAR, ("top1",)), "fine-tuned": (FINETUNE, ("top1",))},
}


class Row(NamedTuple):
    """One encoder's figures by column, percent, None: not measured; and what is not of it.

    left_out: file -> why its figures are not in the row.
    """

    figures: dict[str, float | None]
    encoder: Encoder
    left_out: dict[str, str]


def read_row(folder: Path) -> Row:
    """The results of a folder that are of one encoder: that of its first file."""
    there = {name: read(folder / name) for name in (KNN, LINEAR, FINETUNE)}
    there = {name: record for name, record in there.items() if record}
    encoders = {n: result_files.encoder_of(r, what=str(folder / n)) for n, r in there.items()}
    first = next(iter(there), "")
    encoder = encoders.get(first, Encoder())
    left_out = {
        name: f"of {other}, not of {encoder} as {first}"
        for name, other in encoders.items()
        if not other.is_same(encoder)
    }
    figures = {}
    for column, (name, place) in COLUMNS.items():
        value = {} if name in left_out else there.get(name, {})
        for part in place:
            value = value.get(part) or {} if part != place[-1] else value.get(part)
        figures[column] = value
    return Row(figures, encoder, left_out)


def read(path: Path) -> dict:
    """A result file, {} if it is not there; InputError if what is taken out of it is none."""
    record = result_files.read_json(path)
    checked.take(record, "k", checked.or_none(result_files.TABLE), what=str(path), default=None)
    checked.take(record, "top1", result_files.FIGURE, what=str(path), default=None)
    return record


def format_rows(rows: dict[str, dict[str, float | None]]) -> str:
    """The table as text; a dash for what was not measured."""
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{column:>12}" for column in COLUMNS)]
    for name, figures in rows.items():
        cells = (f"{'-' if v is None else f'{v:.1f}':>12}" for v in figures.values())
        lines.append(f"{name:<{width}}" + "".join(cells))
    return "\n".join(lines)


def parse_args() -> argparse.Namespace:
    """The flags of this script."""
    parser = arguments.Parser(description="One table of several encoders' results.")
    parser.add_argument("rows", nargs="+", type=arguments.named_path, metavar="NAME=DIR")
    parser.add_argument("--save", type=arguments.path, help="folder to write results.json to")
    return parser.parse_args()


def main() -> None:
    """Print the table and write it."""
    args = parse_args()
    rows = {}
    for text in args.rows:
        name, equals, folder = text.partition("=")
        if not equals or not Path(folder).is_dir():
            raise InputError(f"{text}: not NAME=DIR with a folder that is there")
        rows[name] = read_row(Path(folder))
    for name, row in rows.items():
        for file, reason in row.left_out.items():
            print(f"{name}: {file} left out: {reason}")
        if not row.encoder.is_known and any(v is not None for v in row.figures.values()):
            print(f"{name}: the files do not say of which checkpoint they are")
    print(format_rows({name: row.figures for name, row in rows.items()}))
    if args.save:
        record = {
            name: row.figures
            | {result_files.OF: row.encoder._asdict(), result_files.LEFT_OUT: row.left_out}
            for name, row in rows.items()
        }
        print(result_files.write_json(args.save, "results.json", record))


if __name__ == "__main__":
    running.run_script(main)
