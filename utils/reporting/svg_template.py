"""Templates of SVG pictures, in which all text is escaped and shows every character."""

from functools import cache
from pathlib import Path

import jinja2  # torch needs it, so that it is there

from utils.runtime.errors import printable


@cache
def read(path: Path) -> jinja2.Template:
    """A template's file; its filter `path` makes a path's data of points (x, y)."""
    page = jinja2.Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda x: printable(x) if type(x) is str else x,  # not what a macro made
    )
    page.filters["path"] = lambda points: "M" + "L".join(f"{x} {y}" for x, y in points)
    return page.from_string(path.read_text())
