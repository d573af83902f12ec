"""Which neighbors a picture shows: of images in a checkpoint's bank, or by any encoder's features.

From a bank, for each target the rows that satisfy the method's constraint and, beside them, the
plain nearest rows. The bank tells both: t is the newest row of the target's image, and everything
the constraint needs is a column. The target's own rows are not shown, but count in the ranks, so
that rank 1 is the target itself, as in training.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from utils.data.datasets import ImageSet
from utils.method import checkpoint
from utils.method.memory_bank import MemoryBank
from utils.method.neighbors import nearest
from utils.method.ranks import plain_ranks
from utils.runtime import checked, torch_file
from utils.runtime.errors import InputError

# Of older checkpoints, which do not say that their constraint is the bank's column `label`.
_BY_LABEL = {"SupervisedCMSF": "label", "PseudoCMSF": "pseudo-label"}
_ROWS = torch_file.tensor("(K, D)", lambda value: value.numel() > 0, dims=2)


class Constraint(NamedTuple):
    """What rows of the bank must have in common with a target; there: (K,) bool, which have one."""

    name: str  # "previous embedding", "cluster", or what the method calls its labels
    there: Tensor
    groups: Tensor | None = None  # (K,) int64, the label or cluster
    previous: Tensor | None = None  # (K, D), M' of CMSF-2Q


@dataclass(frozen=True)
class Searched:
    """What is searched for k neighbors of a row.

    embeddings: (K, D), unit norm; index: (K,) int64, of the image each is of; row_of: the newest
    row of each image. by_rank: neighbors are told by their ranks, else by their similarity alone.
    """

    images: ImageSet
    embeddings: Tensor
    index: Tensor
    row_of: dict[int, int]
    k: int
    constraint: Constraint | None = None
    by_rank: bool = True

    def target(self, row: int) -> dict:
        """A record, of builtins, of the image of a row and its neighbors.

        File, number ("index"), label and class of the image, its "bank_row", the "words" below it,
        and "rows": each has a name ("previous", "constrained" or "plain"), a caption, "neighbors"
        and a "remark" on why there are none. A neighbor is such a record too, with its similarity
        to what was searched for, its rank by plain distance to the target (None by features), and
        "same_class" (None: not known).
        """
        others, target = self.index != self.index[row], self._about(row)
        target["words"] += [Path(target["file"]).name] if target["class"] else []
        where = "M: nearest to the target t, by plain search"
        where = where if self.by_rank else "nearest to the target among all images, by features"
        target["rows"] = self._constrained(target, others) if self.constraint else []
        target["rows"].append(self._line(target, "plain", where, others, "no other image"))
        return target

    def _constrained(self, target: dict, others: Tensor) -> list[dict]:
        """The rows of a target under the constraint; others: (K,) bool, rows of other images."""
        row, (name, there, groups, _) = target["bank_row"], self.constraint
        has_one, lines = bool(there[row]), []
        remark = f"no other row with such a {name}" if has_one else f"no {name} yet: no constraint"
        allowed = others & there & has_one
        if groups is None:  # CMSF-2Q: what is nearest to u in M', and where those rows lie in M
            caption = "M': nearest to the target's previous embedding u"
            lines = [self._line(target, "previous", caption, allowed, remark)]
            allowed = torch.zeros_like(others)
            allowed[[neighbor["bank_row"] for neighbor in lines[0]["neighbors"]]] = True
            caption = "M: the same rows, in the order of their distance to t (the constraint)"
        else:
            allowed &= groups == groups[row]
            caption = f"M: nearest to the target t of its {name} (the constraint)"
            target["wanted"] = wanted = int(groups[row])
            if has_one and name != "label":
                classes = [] if name == "cluster" else self.images.classes
                named = classes[wanted] if wanted < len(classes) else wanted
                target["words"].append(f"{name}: {named}")
        return [*lines, self._line(target, "constrained", caption, allowed, remark)]

    def _line(self, target: dict, name: str, caption: str, allowed: Tensor, remark: str) -> dict:
        """The nearest of the allowed rows (K,) to t, or in the line "previous" to u in M'."""
        row = target["bank_row"]
        searched = self.constraint.previous if name == "previous" else self.embeddings
        found = nearest(searched[row : row + 1], searched, k=self.k, allowed=allowed)
        found = found.first(int(found.valid.sum()))  # those that are valid come first
        cosines = searched[found.rows[0]] @ searched[row]
        t = self.embeddings[row : row + 1]
        ranks = plain_ranks(t, self.embeddings, found) if self.by_rank else torch.zeros(1, self.k)
        neighbors = []
        for column, number in enumerate(found.rows[0].tolist()):
            one, rank = self._about(number), int(ranks[0, column]) or None
            cosine, known = float(cosines[column]), min(one["label"], target["label"]) >= 0
            same = one["label"] == target["label"] if known else None
            one["words"].append(
                f"rank {rank}" if rank and name != "previous" else f"cos {cosine:.3f}"
            )
            neighbors.append(one | {"similarity": cosine, "rank": rank, "same_class": same})
        return {"name": name, "caption": caption, "neighbors": neighbors, "remark": remark}

    def _about(self, row: int) -> dict:
        image = int(self.index[row])
        file, label = self.images.name(image), int(self.images.labels[image])
        name = self.images.classes[label] if label >= 0 else None
        record = {"file": file, "index": image, "label": label, "class": name, "bank_row": row}
        return record | {"words": [name or Path(file).name]}


def from_bank(state: dict, images: ImageSet, *, k: int, what: str) -> Searched:
    """The memory bank in a checkpoint of this repository that was trained on these images.

    InputError, begun by `what`, if there is none, or the images are others in names, order or
    classes: the picture would show what the encoder never saw.
    """
    weights = state.get("state_dict", {}) if state.get("format") == checkpoint.FORMAT else {}
    torch_file.check_weights(weights, what=what)
    columns = {n.removeprefix("bank."): v for n, v in weights.items() if n.startswith("bank.")}
    if not {"features", "index", "label", "_extra_state"} <= columns.keys():
        raise InputError(f"{what}: no memory bank in it (--from_features needs none)")
    own = f"{what}: its memory bank"
    features = checked.take(columns, "features", _ROWS, what=own)
    others = {f"with_{name}": name in columns for name in ("previous", "true_label")}
    bank = MemoryBank(*features.shape, **others)
    # Of half precision in float32: similarities are shown to more digits than 16 bits have.
    bank.to(torch.promote_types(features.dtype, torch.float32))
    checkpoint.load_strictly(bank, columns, what=own)
    if not bank.filled:
        raise InputError(f"{own} is empty")
    if images.digest() not in state.get("data", {}).values():
        reason = f"not the images or classes that {what} was trained on, or another --dataset"
        raise InputError(f"data {images.root}: {reason}")
    if fault := bank.fault(num_images=len(images), num_classes=len(images.classes)):
        raise InputError(f"{own}: {fault}")
    of_each = torch_file.tensor(
        f"({len(images)},)", lambda v: len(v) == len(images), dims=1, dtype=torch.int64
    )
    checked.take(weights, "clusters", of_each, what=what, default=None)
    newest = bank.newest(bank.filled)  # the last of an image comes last
    row_of = dict(zip(bank.index[newest].tolist(), newest.tolist(), strict=True))
    constraint = _constraint_of(state, bank, what=what)
    return Searched(images, *bank.in_use("features", "index"), row_of, k, constraint)


def _constraint_of(state: dict, bank: MemoryBank, *, what: str) -> Constraint | None:
    """The constraint of a checkpoint's method; None if it has none (MSF).

    A method whose neighbors have the label of the target in the bank, which others keep for their
    figures, says so by an attribute `constraint` that names it.
    """
    index, label = bank.in_use("index", "label")
    if hasattr(bank, "previous"):
        older, there = bank.in_use("previous", "has_previous")
        return Constraint("previous embedding", there, previous=older)
    if "clusters" in state["state_dict"]:
        groups = state["state_dict"]["clusters"][index]
        return Constraint("cluster", groups >= 0, groups)
    older = _BY_LABEL.get(state.get("method"))
    name = checked.take(
        state, "constraint", checked.or_none(checked.TEXT), what=what, default=older
    )
    return Constraint(name, label >= 0, label) if name else None
