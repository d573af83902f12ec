"""Names as file systems allow them: any bytes but "/" and NUL."""

import os
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from utils.data.datasets import ImageSet

_PARTS = [
    *(b"\n", b"\r", b" ", b"\t", b"\f", b'"', b"\\", b"'", b",", b".", b"\x1b[2J", b"\xff"),
    *(b"\xed\xb3\xbf", b"a", b"1.jpg", b"train"),
    *map(str.encode, ("\u2028", "\x85", "\xa0", "\ufeff", "\u200b", "é", "😀")),
]
_CLASSES = [
    *(b"train", b" a", b"a", b"a ", b'"a"', b"a\tb", b".a", b"car, cat", b"\n", b" ", b"\xe9"),
    *map(str.encode, ("u\r", "\ufeffa", "\u2028", "é")),
]


def components() -> st.SearchStrategy[bytes]:
    """A part of a path: parts that readers stumble over, or any bytes."""
    made_of_parts = st.lists(st.sampled_from(_PARTS), min_size=1, max_size=4).map(b"".join)
    anything = st.binary(min_size=1, max_size=5).filter(lambda name: not set(name) & set(b"/\0"))
    return (made_of_parts | anything).filter(lambda name: name not in (b".", b".."))


@st.composite
def image_sets(draw) -> tuple[ImageSet, np.ndarray]:
    """Images of such names without files, in classes, and the numbers of some, ascending."""
    paths = st.lists(components(), min_size=1, max_size=2).map(b"/".join)
    named = draw(
        st.sets(st.tuples(st.sampled_from(_CLASSES), paths), min_size=1, max_size=8).map(sorted)
    )
    classes = sorted({os.fsdecode(name) for name, _ in named})
    names = [os.fsdecode(b"/".join(parts)) for parts in named]
    labels = [classes.index(os.fsdecode(name)) for name, _ in named]
    chosen = draw(st.sets(st.sampled_from(range(len(names))), min_size=1).map(sorted))
    return ImageSet(Path("data/train"), names, labels, classes), np.array(chosen)
