"""One table of several encoders' results, as text and as JSON.

    python eval/compare.py --save <DIR> "random network=<DIR>" "CMSF=<DIR>"

Each argument names a row and a folder with what eval_knn.py and eval_linear.py wrote: knn.json,
linear/linear.json (frozen encoder) and finetune/linear.json (fine-tuned encoder). What is not there
stays empty.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import arguments, result_files, running
from utils.errors import InputError

COLUMNS = ("1-NN", "20-NN", "linear", "fine-tuned")


def row(folder: Path) -> dict[str, float | None]:
    """The figures of one encoder by column, percent; None for what was not measured."""
    knn = result_files.read_json(folder / "knn.json").get("k", {})
    linear, finetune = (
        result_files.read_json(folder / kind / "linear.json") for kind in ("linear", "finetune")
    )
    return {
        "1-NN": knn.get("1", {}).get("accuracy"),
        "20-NN": knn.get("20", {}).get("accuracy"),
        "linear": linear.get("top1"),
        "fine-tuned": finetune.get("top1"),
    }


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
        rows[name] = row(Path(folder))
    print(format_rows(rows))
    if args.save:
        print(result_files.write_json(args.save, "results.json", rows))


if __name__ == "__main__":
    running.run_script(main)
