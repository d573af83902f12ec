"""Supervised CMSF: the constraint is the label (CMSF sec. 3.3).

    python supervised/train_sup_msf.py --cos --weak_strong --learning_rate 0.05 --epochs 200 \
        --arch resnet50 --topk 10 --momentum 0.99 --mem_bank_size 128000 \
        --checkpoint_path <CHECKPOINT PATH> <DATASET PATH>

    python supervised/train_sup_msf.py --demo

A query is pulled to the k rows of its own class nearest to its target (top-k), or to all rows of
its class (`--topk all`). There are no class weights and no negatives. With `--topk_plain` half of
the loss is plain, as in CMSF-2Q and CMSF-KM: on few images and classes the class means alone come
to lie in few dimensions, which `--topk all --topk_plain 1` prevents (docs/results.md).
`--label_noise` and `--label_file` give images other labels than those of their folders.
"""

import argparse
import sys
from pathlib import Path

from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import arguments, build_training, options
from utils.data.batches import Batch
from utils.data.label_noise import as_tensor, given_labels, labels_to_use, write_changes
from utils.method.collapse import embedding_health
from utils.method.encoders import QueryTargetEncoders
from utils.method.memory_bank import MemoryBank
from utils.method.neighbors import (
    Neighbors,
    mean_shift_loss,
    mean_shift_loss_all,
    nearest,
    nearest_with_label,
    purity,
    purity_all,
)
from utils.method.ranks import constrained_ranks
from utils.runtime import script
from utils.runtime.distributed import is_main

DEMO = options.demo("demo_sup", topk="all", topk_plain=1, mem_bank_size=2000)


class SupervisedCMSF(nn.Module):
    """The method as one module: a batch in, the loss out.

    mem_bank_size: K. topk: k, or None for all rows of the class. topk_plain: neighbors of the plain
    loss, 0: no such loss, as published. given: (N,) int64, on the host, labels to use instead of
    the images' own.
    """

    constraint = "label"  # neighbors have it in the bank: for `show_neighbors.py`

    def __init__(
        self,
        encoders: QueryTargetEncoders,
        num_classes: int,
        *,
        mem_bank_size: int,
        topk: int | None,
        topk_plain: int = 0,
        given: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.encoders = encoders
        self.num_classes, self.topk, self.topk_plain = num_classes, topk, topk_plain
        self.given = given
        self.latest: tuple[Tensor, Neighbors] | None = None  # targets and their constrained rows
        self.bank = MemoryBank(mem_bank_size, encoders.proj_dim, with_true_label=True)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """One step: the loss (scalar, 0 to 4, with gradient) and figures in percent."""
        q = self.encoders.query(batch.query_view)  # (B, D)
        self.encoders.update_target()
        t = self.encoders.target(batch.target_view)  # (B, D), without gradient

        # Targets enter the bank before the search: each is its own nearest neighbor.
        label = labels_to_use(batch, self.given)  # (B,)
        self.bank.enqueue(t, index=batch.index, label=label, true_label=batch.label)
        rows, row_labels = self.bank.in_use("features", "label")  # M (K, D), (K,)

        among = {"labels": label, "row_labels": row_labels}
        if self.topk is None:
            loss = mean_shift_loss_all(q, rows, num_classes=self.num_classes, **among)
        else:
            same = nearest_with_label(t, rows, k=self.topk, **among)
            loss = mean_shift_loss(q, rows, same)
            self.latest = t, same
        stats = self._purity(label, batch.label)
        if self.topk_plain:
            plain = mean_shift_loss(q, rows, nearest(t, rows, k=self.topk_plain))
            stats |= {"loss_constrained": loss.detach(), "loss_plain": plain.detach()}
            loss = (loss + plain) / 2
        return loss, stats

    def _purity(self, label: Tensor, truth: Tensor) -> dict[str, Tensor]:
        """Of what was pulled to, by the labels in use and, if those are given, by the true ones."""
        row_labels, row_truth = self.bank.in_use("label", "true_label")
        stats = {}
        if self.topk is not None:
            _, same = self.latest
            stats["purity_constrained"] = purity(label, row_labels, same)
            stats["fewer_than_k"] = 100 * (same.valid.sum(dim=1) < self.topk).float().mean()
            if self.given is not None:
                stats["purity_true"] = purity(truth, row_truth, same)
        elif self.given is not None:
            among = {"row_labels": row_labels, "row_truth": row_truth}
            among["num_classes"] = self.num_classes
            stats["purity_true"] = purity_all(label, truth, **among)
        return stats

    def diagnostics(self) -> dict[str, Tensor]:
        """Health of the embeddings, purity of plain neighbors, ranks of the constrained ones."""
        rows, row_labels = self.bank.in_use("features", "label")
        newest = self.bank.newest(256)
        near = nearest(rows[newest], rows, k=self.topk or 10)
        figures = {"purity_plain": purity(row_labels[newest], row_labels, near)}
        if self.latest is not None:
            t, same = self.latest
            figures["constrained_ranks"] = constrained_ranks(t, rows, same)
        return figures | embedding_health(rows)


def parse_args() -> argparse.Namespace:
    """The flags of this script."""
    parser = arguments.Parser(description="Train supervised CMSF.")
    options.add_training_options(parser, topk_all=True)
    options.add_plain_option(parser, may_be_none=True)
    options.add_label_options(parser)
    return options.parse(parser, demo=DEMO)


def main() -> None:
    """Train, save, and report k-NN accuracy."""
    args = parse_args()
    train, val = build_training.read_training_data(args, labeled=True)
    given = given_labels(train, file=args.label_file, noise=args.label_noise, seed=args.noise_seed)
    model = SupervisedCMSF(
        build_training.build_encoders(args),
        len(train.classes),
        mem_bank_size=args.mem_bank_size,
        topk=None if args.topk == "all" else args.topk,
        topk_plain=args.topk_plain,
        given=as_tensor(given),
    )
    run, loader = build_training.start_run(args, model, train, val, given=given)
    with run:
        if is_main():
            write_changes(args.checkpoint_path / "label_noise.txt", train, given)
        for batch in run.batches(loader):
            loss, stats = run.forward(batch)
            run.step(loss, stats)
        run.finish("supervised CMSF")


if __name__ == "__main__":
    script.run_script(main)
