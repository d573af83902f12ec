"""A table of encoders: rows out of result files, what cannot be compared, text and Markdown."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from utils.evaluation import result_files
from utils.evaluation.result_files import Encoder, ValImages
from utils.runtime import checked
from utils.runtime.errors import InputError, printable

KNN, LINEAR, FINETUNE = "knn.json", "linear/linear.json", "finetune/linear.json"
# Of each file the columns it fills.
FILES = {KNN: ("1-NN", "20-NN"), LINEAR: ("linear",), FINETUNE: ("fine-tuned",)}
# All columns in their order, and how figures are shown: accuracies in percent.
NOT_PERCENT = {
    "effective rank": "{:.1f}",
    "alignment": "{:.3f}",
    "uniformity": "{:.3f}",
    "images/s": "{:,.0f}",
    "parameters": "{:,}",
}
COLUMNS = {
    **dict.fromkeys(("1-NN", "20-NN", "weighted 20-NN", "linear", "fine-tuned"), "{:.1f}"),
    **NOT_PERCENT,
}
MISPLACED = {
    True: "of a fine-tuned encoder",
    False: "of a frozen encoder",
    None: "it does not say whether the encoder was trained too (--fine-tune)",
}


def _is_record(path: Path) -> bool:
    rows = result_files.read_json(path)
    own = [isinstance(row, dict) and result_files.OF in row for row in rows.values()]
    return bool(own) and all(own)


def _is_table(path: Path) -> bool:
    titles = [title.strip() for title in path.read_text().partition("\n")[0].split("|")[2:-1]]
    return bool(titles) and set(titles) <= set(COLUMNS)


# What is written of a table, and whether a file is such.
WRITTEN = {"results.json": _is_record, "results.md": _is_table}


class Row(NamedTuple):
    """One encoder's figures by column, None: not measured; left_out: file -> why not.

    more: what else results.json says of a row that was measured.
    """

    figures: dict[str, float | None]
    encoder: Encoder
    images: ValImages
    left_out: dict[str, str]
    more: dict[str, Any] = {}


def read_row(folder: Path) -> Row:
    """The results of a folder that are of one encoder and of one val set: those of its first."""
    figures = {column: None for columns in FILES.values() for column in columns}
    first, encoder, images = "", Encoder(), ValImages()
    left_out = {}
    for name in FILES:
        what = str(folder / name)
        record = result_files.read_json(folder / name)
        if not record:
            continue
        found = _figures_of(name, record, what=what)
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


def _figures_of(name: str, record: dict, *, what: str) -> dict[str, float | None]:
    """What a file has of its columns; InputError that begins with `what` for what is no figure."""
    if name == KNN:
        kind = checked.or_none(result_files.TABLE)
        rows = checked.take(record, "k", kind, what=what, default=None) or {}
        values = [rows.get(k, {}).get("accuracy") for k in ("1", "20")]
    else:
        values = [checked.take(record, "top1", result_files.FIGURE, what=what, default=None)]
    return dict(zip(FILES[name], values, strict=True))


def read_rows(named: list[str]) -> dict[str, Row]:
    """The rows of folders, "NAME=DIR" each; InputError for one that is none, or a name twice."""
    rows: dict[str, Row] = {}
    for text in named:
        name, equals, folder = text.partition("=")
        if not (name and equals) or not Path(folder).is_dir():
            raise InputError(f"--results {text}: not NAME=DIR with a folder that is there")
        if name in rows:
            raise InputError(f"--results {text}: there is a row of the name {name!r} already")
        rows[name] = read_row(Path(folder))
    return rows


def notes(rows: dict[str, Row]) -> list[str]:
    """What is to be said of a table: what is not comparable, left out, or of unknown weights."""
    first, said = next(iter(rows)), []
    for name, row in rows.items():
        if not row.images.is_same(rows[first].images):
            whose = f"{name}: on {row.images}, {first}: on {rows[first].images}"
            said.append(f"{whose}: not comparable")
        said += [f"{name}: {file} left out: {reason}" for file, reason in row.left_out.items()]
        if not row.encoder.is_known and any(v is not None for v in row.figures.values()):
            said.append(f"{name}: the files do not say of which checkpoint they are")
    return [printable(line) for line in said]


def record(rows: dict[str, Row]) -> dict[str, dict[str, Any]]:
    """What results.json holds: name -> figures by column, and whose they are."""
    return {
        name: {column: row.figures[column] for column in COLUMNS if column in row.figures}
        | {result_files.OF: row.encoder._asdict(), result_files.LEFT_OUT: row.left_out}
        | ({result_files.MORE: row.more} if row.more else {})
        for name, row in rows.items()
    }


def shown(title: str, value: float | None) -> str:
    """A figure of a column as text, a dash for what was not measured."""
    return "-" if value is None else COLUMNS[title].format(value)


def _cells(rows: dict[str, Row]) -> dict[str, list[str]]:
    """Each column's title and texts, a dash for what was not measured."""
    cells = {}
    for title in COLUMNS:
        if any(title in row.figures for row in rows.values()):
            cells[title] = [shown(title, row.figures.get(title)) for row in rows.values()]
    return cells


def as_text(rows: dict[str, Row]) -> str:
    """The table as text."""
    names = ["", *map(printable, rows)]
    lines = [f"{name:<{max(map(len, names))}}" for name in names]
    for title, cells in _cells(rows).items():
        width = max(12, 2 + max(map(len, (title, *cells))))
        lines = [f"{a}{b:>{width}}" for a, b in zip(lines, (title, *cells), strict=True)]
    return "\n".join(lines)


def as_markdown(rows: dict[str, Row]) -> str:
    """The table in Markdown, and its notes below it; names stand there as they are."""
    columns = _cells(rows)
    lines = [("", *columns), ("---", *["---:"] * len(columns))]
    lines += zip(map(_escaped, rows), *columns.values(), strict=True)
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return table + "".join(f"\nNote: {_escaped(line)}\n" for line in notes(rows))


def _escaped(text: str) -> str:
    """A text in one line in which Markdown, GitHub's too, finds nothing to do."""
    return re.sub(r"([\\`*_{}\[\]<>|~&$])", r"\\\1", printable(text))
