"""The files that evaluation scripts write: checks before the work, JSON records after it."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from utils.errors import InputError


def check_output(args: argparse.Namespace, *, endings: tuple[str, ...]) -> None:
    """InputError unless --output can be written: its ending, its folder, nothing to be lost.

    Not even --force replaces the checkpoint that --weights names.
    """
    path, what = args.output, f"--output {args.output}"
    if path.suffix.lower() not in endings:
        raise InputError(f"{what}: ends in none of {', '.join(endings)}")
    if not path.parent.is_dir():
        raise InputError(f"{what}: no folder {path.parent}")
    if path.is_dir():
        raise InputError(f"{what}: is a folder")
    if not path.exists():
        return
    if args.weights and os.path.exists(args.weights) and path.samefile(args.weights):
        raise InputError(f"{what}: is the file of --weights itself")
    if not args.force:
        raise InputError(f"{what}: there is such a file already (--force replaces it)")


def make_folder(folder: Path, *, flag: str) -> None:
    """Make a folder to write to; InputError that names the flag if that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{flag} {folder}: {error.strerror}") from error


def write_json(folder: Path, name: str, record: dict[str, Any], *, flag: str = "--save") -> Path:
    """Write a result to folder/name and return its path; InputError that names the flag if not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"{flag} {folder}: {error.strerror}") from error
    return folder / name


def read_json(path: Path) -> dict:
    """A result file, {} where there is none; InputError if it cannot be read."""
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: no result file ({error})") from error
    if not isinstance(record, dict):
        raise InputError(f"{path}: no result file (it holds no object)")
    return record
