"""MSF: self-supervised mean shift without a constraint (CMSF sec. 3; Koohpayegani et al. 2021).

    python self_supervised/train_msf.py --cos --weak_strong --learning_rate 0.05 --epochs 200 \
        --arch resnet50 --topk 5 --momentum 0.99 --mem_bank_size 128000 \
        --checkpoint_path <CHECKPOINT PATH> <DATASET PATH>

    python self_supervised/train_msf.py --demo

A query is pulled to the k rows of the memory bank nearest to its target. With `--topk 1` that is
the target itself, which makes the method BYOL with a one-sided loss.
"""

import argparse
import sys
from pathlib import Path

from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import arguments, build_training, options
from utils.data.batches import Batch
from utils.method.collapse import embedding_health
from utils.method.encoders import QueryTargetEncoders
from utils.method.memory_bank import MemoryBank
from utils.method.neighbors import mean_shift_loss, nearest, purity
from utils.runtime import script

DEMO = options.demo("demo_msf", topk=5)


class MSF(nn.Module):
    """The method as one module: a batch in, the loss out.

    mem_bank_size: K. topk: k, neighbors a query is pulled to.
    """

    def __init__(self, encoders: QueryTargetEncoders, *, mem_bank_size: int, topk: int) -> None:
        super().__init__()
        self.encoders = encoders
        self.topk = topk
        self.bank = MemoryBank(mem_bank_size, encoders.proj_dim)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """One step: the loss (scalar, 0 to 4, with gradient) and the purity in percent."""
        q = self.encoders.query(batch.query_view, *batch.small_views)  # ([V,] B, D)
        self.encoders.update_target()
        t = self.encoders.target(batch.target_view)  # (B, D), without gradient

        # Targets enter the bank before the search: each is its own nearest neighbor.
        self.bank.enqueue(t, index=batch.index, label=batch.label)
        rows, row_labels = self.bank.in_use("features", "label")  # M (K, D), (K,)
        near = nearest(t, rows, k=self.topk)
        loss = mean_shift_loss(q, rows, near)
        return loss, {"purity_plain": purity(batch.label, row_labels, near)}

    def diagnostics(self) -> dict[str, Tensor]:
        """Health of the embeddings in the bank."""
        return embedding_health(*self.bank.in_use("features"))


def parse_args() -> argparse.Namespace:
    """The flags of this script."""
    parser = arguments.Parser(description="Train self-supervised MSF (--topk 1: one-sided BYOL).")
    options.add_training_options(parser)
    options.add_crop_options(parser)
    return options.parse(parser, demo=DEMO)


def main() -> None:
    """Train, save, and report k-NN accuracy."""
    args = parse_args()
    train, val = build_training.read_training_data(args)
    encoders = build_training.build_encoders(args)
    model = MSF(encoders, mem_bank_size=args.mem_bank_size, topk=args.topk)
    run, loader = build_training.start_run(args, model, train, val)
    with run:
        for batch in run.batches(loader):
            loss, stats = run.forward(batch)
            run.step(loss, stats)
        run.finish("MSF" if args.topk > 1 else "BYOL, one-sided")


if __name__ == "__main__":
    script.run_script(main)
