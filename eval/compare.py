"""One table of several encoders' results, as text and as JSON.

    python eval/compare.py --save <DIR> "random network=<DIR>" "CMSF=<DIR>"

Each argument names a row and a folder with what eval_knn.py and eval_linear.py wrote: knn.json,
linear/linear.json (frozen encoder), finetune/linear.json (fine-tuned). What is not there stays
empty, and so does, which is said, what is of another checkpoint or other val images than the first.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import arguments
from utils.evaluation import result_files
from utils.evaluation.result_files import Encoder, ValImages
from utils.runtime import checked, script
from utils.runtime.errors import InputError

KNN, LINEAR, FINETUNE = "knn.json", "linear/linear.json", "finetune/linear.json"
COLUMNS = {KNN: ("1-NN", "20-NN"), LINEAR: ("linear",), FINETUNE: ("fine-tuned",)}
MISPLACED = {
    True: "of a fine-tuned encoder",
    False: "of a frozen encoder",
    None: "it does not say whether the encoder was trained too (--fine-tune)",
}


class Row(NamedTuple):
    """One encoder's figures by column, percent, None: not measured; left_out: file -> why not."""

    figures: dict[str, float | None]
    encoder: Encoder
    images: ValImages
    left_out: dict[str, str]


def read_row(folder: Path) -> Row:
    """The results of a folder that are of one encoder and of one val set: those of its first."""
    figures = {column: None for columns in COLUMNS.values() for column in columns}
    first, encoder, images = "", Encoder(), ValImages()
    left_out = {}
    for name in COLUMNS:
        what = str(folder / name)
        record = result_files.read_json(folder / name)
        if not record:
            continue
        found = figures_of(name, record, what=what)
        own = result_files.encoder_of(record, what=what)
        seen = result_files.val_images_of(record, what=what)
        tuned = result_files.is_fine_tuned(record, what=what)
        if name != KNN and tuned != (name == FINETUNE):
            left_out[name] = MISPLACED[tuned]
        elif first and not own.is_same(encoder):
            left_out[name] = f"of {own}, not of {encoder} as {first}"
        elif first and not seen.is_same(images):
            left_out[name] = f"on {seen}, not on {images} as {first}"
        else:
            figures |= found
            if not first:
                first, encoder, images = name, own, seen
    return Row(figures, encoder, images, left_out)


def figures_of(name: str, record: dict, *, what: str) -> dict[str, float | None]:
    """What a file has of its columns; InputError that begins with `what` for what is no figure."""
    if name == KNN:
        kind = checked.or_none(result_files.TABLE)
        rows = checked.take(record, "k", kind, what=what, default=None) or {}
        values = [rows.get(k, {}).get("accuracy") for k in ("1", "20")]
    else:
        values = [checked.take(record, "top1", result_files.FIGURE, what=what, default=None)]
    return dict(zip(COLUMNS[name], values, strict=True))


def format_rows(rows: dict[str, dict[str, float | None]]) -> str:
    """The table as text; a dash for what was not measured."""
    width = max(map(len, rows))
    lines = [" " * width + "".join(f"{column:>12}" for column in next(iter(rows.values())))]
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
    args, rows = parse_args(), {}
    for text in args.rows:
        name, equals, folder = text.partition("=")
        if not equals or not Path(folder).is_dir():
            raise InputError(f"{text}: not NAME=DIR with a folder that is there")
        if name in rows:
            raise InputError(f"{text}: there is a row of the name {name!r} already")
        rows[name] = read_row(Path(folder))
    if args.save:
        result_files.make_folder(args.save, flag="--save")
    first = next(iter(rows))
    for name, row in rows.items():
        if not row.images.is_same(rows[first].images):
            print(f"{name}: on {row.images}, {first}: on {rows[first].images}: not comparable")
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
    script.run_script(main)
