"""Which neighbors a picture shows: of images in a checkpoint's bank, or by any encoder's features.

From a bank, for each target the rows that satisfy the method's constraint and, beside them, the
plain nearest rows. The bank tells both: t is the newest row of the target's image, and everything
the constraint needs is a column. The target's own rows are not shown, but count in the ranks, so
that rank 1 is the target itself, as in training.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.data.bad_images import BadImages, reason_of
from utils.data.datasets import ImageSet
from utils.method import checkpoint
from utils.method.memory_bank import MemoryBank
from utils.method.neighbors import Neighbors, nearest, nearest_among
from utils.method.ranks import plain_ranks
from utils.reporting import pictures
from utils.runtime import checked, torch_file
from utils.runtime.errors import InputError

_NAMED = 5  # how many names an error lists
# Methods whose constraint is the bank's column `label`, which others keep for their figures.
_BY_LABEL = {"SupervisedCMSF": "label", "PseudoCMSF": "pseudo-label"}
_ROWS = torch_file.tensor("(K, D)", lambda value: value.numel() > 0, dims=2)


class Line(NamedTuple):
    """One row of neighbors for each of B targets.

    name: "previous", "constrained" or "plain". found: (B, k), rows of the bank. similarity: (B, k),
    cosine to what was searched for, u in "previous", else t. ranks: (B, k) int64, as `plain_ranks`
    gives them for t; None where the order is that of the ranks and nothing is to be compared.
    remarks: for each target what to say if it has no neighbors.
    """

    name: str
    caption: str
    found: Neighbors
    similarity: Tensor
    ranks: Tensor | None
    remarks: list[str]


class Shown(NamedTuple):
    """Targets and their neighbors.

    targets: (B,) image numbers. rows: (B,) the targets' rows. row_images: (K,) the image number of
    each row. constraint: "previous embedding", "label", "pseudo-label", "cluster" or None. wanted:
    (B,) int64, the label or cluster searched for, -1 where none; None where there is no such thing.
    """

    targets: Tensor
    rows: Tensor
    row_images: Tensor
    lines: list[Line]
    constraint: str | None = None
    wanted: Tensor | None = None


def bank_of(state: dict, *, what: str) -> MemoryBank:
    """The memory bank in a checkpoint of this repository; InputError, begun by `what`, if none.

    Checkpoints within an epoch hold it too: the embeddings that lie in files of their own are those
    of the images, not of the bank.
    """
    ours = state if state.get("format") == checkpoint.FORMAT else {}
    weights = ours.get("state_dict", {})
    torch_file.check_weights(weights, what=what)
    columns = {n.removeprefix("bank."): v for n, v in weights.items() if n.startswith("bank.")}
    if not {"features", "index", "label", "_extra_state"} <= columns.keys():
        raise InputError(f"{what}: no memory bank in it (--from_features needs none)")
    features = checked.take(columns, "features", _ROWS, what=f"{what}: its memory bank")
    bank = MemoryBank(
        *features.shape,
        with_previous="previous" in columns,
        with_true_label="true_label" in columns,
    )
    # Of half precision in float32: similarities are shown to more digits than 16 bits have.
    dtype = torch.promote_types(features.dtype, torch.float32)
    checkpoint.load_strictly(bank.to(dtype), columns, what=f"{what}: its memory bank")
    if not bank.filled:
        raise InputError(f"{what}: its memory bank is empty")
    return bank


def check_same_images(state: dict, bank: MemoryBank, images: ImageSet, *, what: str) -> None:
    """InputError unless these are the images, in names, order and classes, of the bank's numbers.

    There is no way around it: with others the picture would show what the encoder never saw.
    """
    digests = checked.take(state, "data", checked.table_of(checked.TEXT), what=what, default={})
    if images.digest() not in digests.values():
        dataset = torch_file.one_line(str(checkpoint.settings(state).get("dataset", "imagenet")))
        raise InputError(
            f"data {images.root}: not the images or classes that {what} was trained on "
            f"(--dataset {dataset}), so its bank does not tell which files are meant"
        )
    if fault := bank.fault(num_images=len(images), num_classes=len(images.classes)):
        raise InputError(f"{what}: its memory bank: {fault}")
    checked.take(state["state_dict"], "clusters", _of_each(images), what=what, default=None)


def _of_each(images: ImageSet) -> checked.Kind:
    """A number of each image."""
    count = len(images)
    return torch_file.tensor(f"({count},)", lambda v: len(v) == count, dims=1, dtype=torch.int64)


def numbers_of(images: ImageSet, names: Sequence[str]) -> list[int]:
    """The numbers of images by their names below the root; InputError that lists unknown ones."""
    wanted = dict.fromkeys(names)
    for number in range(len(images)):
        if (name := images.name(number)) in wanted:
            wanted[name] = number
    if unknown := [name for name, number in wanted.items() if number is None]:
        raise InputError(f"--images {','.join(unknown[:_NAMED])}: not in {images.root}")
    return [wanted[name] for name in names]


def newest_rows(bank: MemoryBank) -> dict[int, int]:
    """Image number -> the row written last for it, of all images in the bank."""
    order = bank.newest(bank.filled)
    return dict(zip(bank.index[order].tolist(), order.tolist(), strict=True))


def with_constraint(state: dict, bank: MemoryBank) -> list[int]:
    """The images in the bank whose newest row has a constraint; all of them if none has one.

    Without: a first visit (CMSF-2Q), no confident pseudo-label, no cluster yet.
    """
    newest = newest_rows(bank)
    constraint, groups = _constraint(state, bank)
    if constraint is None:
        return list(newest)
    has_one = bank.has_previous if groups is None else groups >= 0
    return [number for number, row in newest.items() if has_one[row]] or list(newest)


def drawn_numbers(available: Sequence[int], *, count: int, seed: int) -> list[int]:
    """At most `count` of the available image numbers at random, sorted; fewer are said.

    InputError if there is none.
    """
    if not len(available):
        raise InputError(f"--count {count}: no image to draw from")
    if count > len(available):
        print(f"--count {count}: only {len(available)} images to draw from, all are shown")
    count = min(count, len(available))
    drawn = np.random.default_rng(seed).choice(np.sort(available), count, replace=False)
    return sorted(drawn.tolist())


def from_bank(state: dict, bank: MemoryBank, targets: Sequence[int], *, k: int) -> Shown:
    """The k neighbors of each target under the constraint of the checkpoint's method, and plain.

    targets: image numbers that are in the bank.
    """
    newest = newest_rows(bank)
    rows = torch.tensor([newest[number] for number in targets])
    embeddings, index = bank.in_use("features", "index")
    own = index == torch.tensor(targets).unsqueeze(1)  # (B, K) bool
    near = nearest(embeddings[rows], embeddings, k=k, allowed=~own)
    plain = _line("plain", "M: nearest to the target t, by plain search", bank, rows, near)
    shown = Shown(torch.tensor(targets), rows, index, [plain])
    constraint, groups = _constraint(state, bank)
    if constraint is None:
        return shown
    if groups is None:
        lines = _previous_lines(bank, rows, ~own, near, k)
        return shown._replace(lines=[*lines, plain], constraint=constraint)
    return _by_group(shown, bank, groups, ~own, k, constraint=constraint)


def from_features(features: Tensor, numbers: Tensor, targets: Sequence[int], *, k: int) -> Shown:
    """The k plain neighbors of each target among features (n, F), of unit norm.

    numbers: (n,) int64, ascending, the image numbers of the features; targets: some of them.
    """
    rows = torch.searchsorted(numbers, torch.tensor(targets))
    own = numbers == torch.tensor(targets).unsqueeze(1)
    near = nearest(features[rows], features, k=k, allowed=~own)
    similarity = _similarity(features[rows], features, near)
    caption = "nearest to the target among all images, by features"
    line = Line("plain", caption, near, similarity, None, ["no other image"] * len(targets))
    return Shown(torch.tensor(targets), rows, numbers, [line])


def draw(
    shown: Shown,
    images: ImageSet,
    *,
    title: str,
    notes: Sequence[str] = (),
    side: int = 96,
    bad_images: BadImages | None = None,
) -> tuple[pictures.Image.Image, list[dict]]:
    """The picture (RGB) and a record of each target in it, of Python builtins.

    side: of a neighbor's thumbnail, pixels. A record holds file, label and class, and of each
    neighbor also bank row, similarity, rank and whether the class is the target's; "place" is the
    thumbnail's left and top edge and side. bad_images: what is done about a file that cannot be
    read (default: InputError); left out, it is a gray tile.
    """
    bad_images = bad_images or BadImages()
    drawing = _Drawing(shown, images, side, bad_images)
    made = [drawing.panel(number) for number in range(len(shown.targets))]
    panels, records = [panel for panel, _ in made], [record for _, record in made]
    sheet = pictures.neighbor_sheet(panels, title=title, notes=notes, side=side)
    for record, places in zip(records, sheet.places, strict=True):
        record["place"] = list(places.target)
        for line, inside in zip(record["rows"], places.rows, strict=True):
            for neighbor, place in zip(line["neighbors"], inside, strict=True):
                neighbor["place"] = list(place)
    return sheet.image, records


def _constraint(state: dict, bank: MemoryBank) -> tuple[str | None, Tensor | None]:
    """What rows must have in common with a target, and by which number (K,) int64, -1: nothing.

    Without a number it is the previous embedding; without a name nothing is asked (MSF).
    """
    index, label = bank.in_use("index", "label")
    if hasattr(bank, "previous"):
        return "previous embedding", None
    if "clusters" in state["state_dict"]:
        return "cluster", state["state_dict"]["clusters"][index]
    if state.get("method") in _BY_LABEL:
        return _BY_LABEL[state["method"]], label
    return None, None


def _line(
    name: str,
    caption: str,
    bank: MemoryBank,
    rows: Tensor,
    found: Neighbors,
    *,
    similarity: Tensor | None = None,
    remarks: list[str] | None = None,
) -> Line:
    """A line of neighbors of the targets in `rows` with their ranks."""
    (embeddings,) = bank.in_use("features")
    if similarity is None:
        similarity = _similarity(embeddings[rows], embeddings, found)
    ranks = plain_ranks(embeddings[rows], embeddings, found)
    remarks = remarks or ["no other row in the bank"] * len(rows)
    return Line(name, caption, found, similarity, ranks, remarks)


def _similarity(queries: Tensor, rows: Tensor, found: Neighbors) -> Tensor:
    """Inner products (B, k) of the queries with their neighbors."""
    return torch.einsum("bd,bkd->bk", queries, rows[found.rows])


def _previous_lines(
    bank: MemoryBank, rows: Tensor, allowed: Tensor, near: Neighbors, k: int
) -> list[Line]:
    """CMSF-2Q: what is nearest to u in M', and where those rows lie in M."""
    embeddings, older, has_older = bank.in_use("features", "previous", "has_previous")
    u, visited = older[rows], has_older[rows]
    related = nearest(u, older, k=k, allowed=allowed & has_older)
    related = related._replace(valid=related.valid & visited.unsqueeze(1))
    none = near._replace(valid=torch.zeros_like(near.valid))  # only candidates, nothing fills up
    far = nearest_among(embeddings[rows], embeddings, candidates=related, k=k, fill=none)
    remarks = [
        "no other row of the bank has one"
        if seen
        else "the image had not been visited before: no constraint"
        for seen in visited.tolist()
    ]
    older_line = _line(
        "previous",
        "M': nearest to the target's previous embedding u",
        *(bank, rows, related),
        similarity=_similarity(u, older, related),
        remarks=remarks,
    )
    caption = "M: the same rows, in the order of their distance to t (the constraint)"
    return [older_line, _line("constrained", caption, bank, rows, far, remarks=remarks)]


def _by_group(
    shown: Shown, bank: MemoryBank, groups: Tensor, allowed: Tensor, k: int, *, constraint: str
) -> Shown:
    """Add the nearest rows of the target's group; groups: (K,) int64, of each row, -1: none."""
    (embeddings,) = bank.in_use("features")
    wanted = groups[shown.rows]
    allowed = allowed & (groups == wanted.unsqueeze(1)) & (wanted >= 0).unsqueeze(1)
    found = nearest(embeddings[shown.rows], embeddings, k=k, allowed=allowed)
    remarks = [
        f"no other row has its {constraint}" if group >= 0 else f"no {constraint}: no constraint"
        for group in wanted.tolist()
    ]
    caption = f"M: nearest to the target t among the rows of its {constraint} (the constraint)"
    line = _line("constrained", caption, bank, shown.rows, found, remarks=remarks)
    return shown._replace(lines=[line, *shown.lines], constraint=constraint, wanted=wanted)


class _Drawing:
    """Turns what is shown into panels and records; each file is read once."""

    def __init__(self, shown: Shown, images: ImageSet, side: int, bad_images: BadImages) -> None:
        self.shown, self.images, self.side = shown, images, side
        self.bad_images = bad_images
        self._read: dict[tuple[int, int], pictures.Image.Image | None] = {}

    def panel(self, number: int) -> tuple[pictures.Panel, dict]:
        """The panel of target `number` and its record, without places."""
        image = int(self.shown.targets[number])
        record = self._about(image) | {"bank_row": int(self.shown.rows[number])}
        notes = [Path(record["file"]).name] if record["class"] else []
        if self.shown.wanted is not None:
            record["wanted"] = int(self.shown.wanted[number])
            notes += self._wanted_note(record["wanted"])
        target = pictures.Tile(
            self._thumbnail(image, pictures.target_side(self.side)), self._title(record), notes
        )
        rows = [self._row(line, number, record["label"]) for line in self.shown.lines]
        record["rows"] = [line for _, line in rows]
        return pictures.Panel(target, [row for row, _ in rows]), record

    def _row(self, line: Line, number: int, label: int) -> tuple[pictures.Row, dict]:
        """A row of the panel and its record."""
        tiles, records = [], []
        for place in line.found.valid[number].nonzero().squeeze(1).tolist():
            row = int(line.found.rows[number, place])
            image = int(self.shown.row_images[row])
            similarity = float(line.similarity[number, place])
            rank = None if line.ranks is None else int(line.ranks[number, place])
            record = self._about(image)
            same = record["label"] == label if label >= 0 and record["label"] >= 0 else None
            record |= {"bank_row": row, "similarity": similarity, "rank": rank, "same_class": same}
            records.append(record)
            by_rank = rank is not None and line.name != "previous"
            note = f"rank {rank}" if by_rank else f"cos {similarity:.3f}"
            thumbnail = self._thumbnail(image, self.side)
            tiles.append(pictures.Tile(thumbnail, self._title(record), [note], same))
        row = pictures.Row(line.caption, tiles, line.remarks[number])
        return row, {"name": line.name, "caption": line.caption, "neighbors": records}

    def _about(self, image: int) -> dict:
        """What is known of an image."""
        label = int(self.images.labels[image])
        name = self.images.classes[label] if label >= 0 else None
        return {"file": self.images.name(image), "index": image, "label": label, "class": name}

    @staticmethod
    def _title(record: dict) -> str:
        return record["class"] or Path(record["file"]).name

    def _wanted_note(self, wanted: int) -> list[str]:
        """The line under a target that tells what its neighbors must have in common."""
        if wanted < 0 or self.shown.constraint == "label":
            return []
        by_class = self.shown.constraint == "pseudo-label" and wanted < len(self.images.classes)
        return [f"{self.shown.constraint}: {self.images.classes[wanted] if by_class else wanted}"]

    def _thumbnail(self, image: int, side: int) -> pictures.Image.Image | None:
        """An image's thumbnail, None if it cannot be read and such files are left out."""
        if (image, side) not in self._read:
            try:
                self._read[image, side] = pictures.thumbnail(self.images.image(image), side)
            except MemoryError:
                raise
            except Exception as error:  # a damaged file can raise about anything
                path = self.images.path(image)
                self.bad_images.add(path, reason_of(error, path))
                self._read[image, side] = None
        return self._read[image, side]
