"""Which neighbors a picture shows: of images in a checkpoint's bank, or by any encoder's features.

From a bank, for each target the rows that satisfy the method's constraint and, beside them, the
plain nearest rows. The bank tells both: t is the newest row of the target's image, and everything
the constraint needs is a column. The target's own rows are not shown, but count in the ranks, so
that rank 1 is the target itself, as in training.

What is shown of a target is a record of builtins: file, number ("index"), label and class of its
image, its "bank_row", the "words" below it, and "rows" of neighbors. A row has a name, a caption,
"neighbors" and, where there are none, a "remark" on why; a neighbor is such a record too, with its
similarity to what was searched for, its rank by plain distance to the target (None by features),
and "same_class" (None: not known).
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from utils.data.datasets import ImageSet
from utils.method import checkpoint
from utils.method.memory_bank import MemoryBank
from utils.method.neighbors import Neighbors, nearest, nearest_among
from utils.method.ranks import plain_ranks
from utils.runtime import checked, torch_file
from utils.runtime.errors import InputError

# Methods whose constraint is the bank's column `label`, which others keep for their figures.
_BY_LABEL = {"SupervisedCMSF": "label", "PseudoCMSF": "pseudo-label"}
_ROWS = torch_file.tensor("(K, D)", lambda value: value.numel() > 0, dims=2)


class Line(NamedTuple):
    """A row of neighbors (B, k) for each of B targets: what was searched for (B, D), and where."""

    name: str  # "previous", "constrained" or "plain"
    caption: str
    found: Neighbors
    queries: Tensor
    searched: Tensor


class Constraint(NamedTuple):
    """What rows of the bank must have in common with a target; there: (K,) bool, which have one."""

    name: str  # "previous embedding", "label", "pseudo-label" or "cluster"
    there: Tensor
    groups: Tensor | None = None  # (K,) int64, the label or cluster
    previous: Tensor | None = None  # (K, D), M' of CMSF-2Q


def bank_of(state: dict, images: ImageSet, *, what: str) -> MemoryBank:
    """The memory bank in a checkpoint of this repository that was trained on these images.

    InputError, begun by `what`, if there is none, or the images are others in names, order or
    classes: the picture would show what the encoder never saw.
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
    digests = checked.take(state, "data", checked.table_of(checked.TEXT), what=what, default={})
    if images.digest() not in digests.values():
        dataset = torch_file.one_line(str(checkpoint.settings(state).get("dataset", "imagenet")))
        raise InputError(
            f"data {images.root}: not the images or classes that {what} was trained on "
            f"(--dataset {dataset}), so its bank does not tell which files are meant"
        )
    if fault := bank.fault(num_images=len(images), num_classes=len(images.classes)):
        raise InputError(f"{what}: its memory bank: {fault}")
    of_each = torch_file.tensor(
        f"({len(images)},)", lambda v: len(v) == len(images), dims=1, dtype=torch.int64
    )
    checked.take(weights, "clusters", of_each, what=what, default=None)
    return bank


def constraint_of(state: dict, bank: MemoryBank) -> Constraint | None:
    """The constraint of a checkpoint's method; None if it has none (MSF)."""
    index, label = bank.in_use("index", "label")
    if hasattr(bank, "previous"):
        older, there = bank.in_use("previous", "has_previous")
        return Constraint("previous embedding", there, previous=older)
    if "clusters" in state["state_dict"]:
        groups = state["state_dict"]["clusters"][index]
        return Constraint("cluster", groups >= 0, groups)
    if state.get("method") in _BY_LABEL:
        return Constraint(_BY_LABEL[state["method"]], label >= 0, label)
    return None


def newest_rows(bank: MemoryBank) -> dict[int, int]:
    """Image number -> the row written last for it, of all images in the bank."""
    order = bank.newest(bank.filled)
    return dict(zip(bank.index[order].tolist(), order.tolist(), strict=True))


def neighbors_of(
    rows: Tensor,
    embeddings: Tensor,
    index: Tensor,
    images: ImageSet,
    *,
    k: int,
    constraint: Constraint | None = None,
    by_rank: bool = True,
) -> list[dict]:
    """Records of the targets in `rows` (B,) with their k neighbors under the constraint, and plain.

    embeddings: (K, D), unit norm; index: (K,) int64, of the image each is of. by_rank: neighbors
    are told by their ranks, otherwise by their similarity alone.
    """
    t, others = embeddings[rows], index != index[rows].unsqueeze(1)  # (B, D), (B, K) bool
    plain = nearest(t, embeddings, k=k, allowed=others)
    where = "M: nearest to the target t, by plain search"
    where = where if by_rank else "nearest to the target among all images, by features"
    lines = [Line("plain", where, plain, t, embeddings)]
    if constraint:
        allowed = others & constraint.there & constraint.there[rows].unsqueeze(1)
        if (older := constraint.previous) is not None:
            # CMSF-2Q: what is nearest to u in M', and where those rows lie in M.
            related = nearest(older[rows], older, k=k, allowed=allowed)
            caption = "M': nearest to the target's previous embedding u"
            before = [Line("previous", caption, related, older[rows], older)]
            none = plain._replace(valid=torch.zeros_like(plain.valid))  # nothing fills up
            found = nearest_among(t, embeddings, candidates=related, k=k, fill=none)
            caption = "M: the same rows, in the order of their distance to t (the constraint)"
        else:
            allowed &= constraint.groups == constraint.groups[rows].unsqueeze(1)
            before, found = [], nearest(t, embeddings, k=k, allowed=allowed)
            caption = f"M: nearest to the target t of its {constraint.name} (the constraint)"
        lines = [*before, Line("constrained", caption, found, t, embeddings), *lines]
    records = _records(rows, index, images, lines, ranked=(t, embeddings) if by_rank else None)
    for record in records if constraint else []:
        _note(record, constraint, images.classes)
    return records


def _note(record: dict, constraint: Constraint, classes: list[str]) -> None:
    """Add to a target's record which group it is of, and why no row satisfies the constraint."""
    there = bool(constraint.there[record["bank_row"]])
    none = f"no {constraint.name} yet: no constraint"
    for row in record["rows"][:-1]:
        row["remark"] = f"no other row with such a {constraint.name}" if there else none
    if constraint.groups is not None:
        record["wanted"] = wanted = int(constraint.groups[record["bank_row"]])
        known = constraint.name == "pseudo-label" and wanted < len(classes)
        if there and constraint.name != "label":
            record["words"].append(f"{constraint.name}: {classes[wanted] if known else wanted}")


def _records(
    rows: Tensor,
    index: Tensor,
    images: ImageSet,
    lines: list[Line],
    *,
    ranked: tuple[Tensor, Tensor] | None,
) -> list[dict]:
    """What is shown of the targets in `rows`; ranked: the targets and rows that ranks are of."""

    def about(row: Tensor) -> dict:
        image = int(index[row])
        file, label = images.name(image), int(images.labels[image])
        name = images.classes[label] if label >= 0 else None
        record = {"file": file, "index": image, "label": label, "class": name}
        return record | {"bank_row": int(row), "words": [name or Path(file).name]}

    targets = [about(row) | {"rows": []} for row in rows]
    for target in targets:
        target["words"] += [Path(target["file"]).name] if target["class"] else []
    for line in lines:
        found = line.found
        similarity = torch.einsum("bd,bkd->bk", line.queries, line.searched[found.rows])
        ranks = plain_ranks(*ranked, found) if ranked else torch.zeros_like(found.rows)
        for place, target in enumerate(targets):
            neighbors = []
            for column in found.valid[place].nonzero().squeeze(1).tolist():
                one, rank = about(found.rows[place, column]), int(ranks[place, column]) or None
                cosine = float(similarity[place, column])
                known = one["label"] >= 0 and target["label"] >= 0
                same = one["label"] == target["label"] if known else None
                by_rank = rank and line.name != "previous"
                one["words"].append(f"rank {rank}" if by_rank else f"cos {cosine:.3f}")
                neighbors.append(one | {"similarity": cosine, "rank": rank, "same_class": same})
            row = {"name": line.name, "caption": line.caption, "neighbors": neighbors}
            target["rows"].append(row | {"remark": "no other image"})
    return targets
