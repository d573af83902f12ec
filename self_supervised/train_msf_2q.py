"""CMSF-2Q: self-supervised constrained mean shift, constraint from a second query (CMSF sec. 3.1).

    python self_supervised/train_msf_2q.py --cos --weak_strong --learning_rate 0.05 --epochs 200 \
        --arch resnet50 --topk 5 --momentum 0.99 --mem_bank_size 128000 --topkp 5 \
        --checkpoint_path <CHECKPOINT PATH> <DATASET PATH>

    python self_supervised/train_msf_2q.py --demo

A query is pulled to the neighbors of its target in the memory bank M, and to distant neighbors that
are related all the same: rows of M whose images lay near this image at its previous visit, under
another augmentation and an older encoder.
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
from utils.method.neighbors import mean_shift_loss, nearest, nearest_among, purity
from utils.method.previous_embeddings import PreviousEmbeddings
from utils.method.ranks import constrained_ranks
from utils.runtime import script
from utils.runtime.distributed import gather, own_rows

DEMO = options.demo("demo_2q", topk=5, topkp=5)


class CMSF2Q(nn.Module):
    """The method as one module: a batch in, the loss out.

    num_images: N, the size of the training set. mem_bank_size: K. topk: k, neighbors a query is
    pulled to. topkp: k', candidates from M'. topk_plain: of the plain loss, if not k as well.
    """

    def __init__(
        self,
        encoders: QueryTargetEncoders,
        num_images: int,
        *,
        mem_bank_size: int,
        topk: int,
        topkp: int,
        topk_plain: int | None = None,
    ) -> None:
        super().__init__()
        self.encoders = encoders
        self.topk, self.topkp, self.topk_plain = topk, topkp, topk_plain or topk
        self.bank = MemoryBank(mem_bank_size, encoders.proj_dim, with_previous=True)
        self.previous = PreviousEmbeddings(num_images, encoders.proj_dim)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """One step: the loss (scalar, 0 to 4, with gradient) and figures (purities in percent)."""
        q = self.encoders.query(batch.query_view, *batch.small_views)  # ([V,] B, D)
        self.encoders.update_target()
        t = self.encoders.target(batch.target_view)  # (B, D), without gradient

        # Targets enter the bank before the search, each as its own nearest neighbor, and beside it
        # what its image's embedding was before: u (B, D), if it was visited (B,).
        u, visited = own_rows(*self.previous.swap(*gather(batch.index, t)))
        columns = {"index": batch.index, "label": batch.label}
        self.bank.enqueue(t, previous=u, has_previous=visited, **columns)
        rows, older, has_older = self.bank.in_use("features", "previous", "has_previous")

        near = nearest(t, rows, k=max(self.topk, self.topk_plain))  # in M (K, D)
        related = nearest(u, older, k=self.topkp, allowed=has_older)  # in M' (K, D)
        related = related._replace(valid=related.valid & visited.unsqueeze(1))
        far = nearest_among(t, rows, candidates=related, k=self.topk, fill=near)
        loss_near = mean_shift_loss(q, rows, near.first(self.topk_plain))
        loss_far = mean_shift_loss(q, rows, far)
        self.latest = t, far  # for `diagnostics`
        return (loss_far + loss_near) / 2, {
            "no_previous_visit": 100 * (~visited).float().mean(),
            "filled_up": 100 * (related.valid.sum(dim=1) < self.topk).float().mean(),
            "loss_constrained": loss_far.detach(),
            "loss_plain": loss_near.detach(),
            "purity_constrained": purity(batch.label, self.bank.label, far),
            "purity_plain": purity(batch.label, self.bank.label, near.first(self.topk)),
        }

    def diagnostics(self) -> dict[str, Tensor]:
        """Health of the embeddings in the bank, and how distant the constrained neighbors are."""
        (rows,) = self.bank.in_use("features")
        t, far = self.latest
        return {"constrained_ranks": constrained_ranks(t, rows, far), **embedding_health(rows)}


def parse_args() -> argparse.Namespace:
    """The flags of this script."""
    parser = arguments.Parser(description="Train self-supervised CMSF-2Q.")
    options.add_training_options(parser)
    options.add_crop_options(parser)
    help_text = "candidates from the previous embeddings"
    parser.add_argument("--topkp", type=arguments.positive, default=10, help=help_text)
    options.add_plain_option(parser)
    return options.parse(parser, demo=DEMO)


def main() -> None:
    """Train, save, and report k-NN accuracy."""
    args = parse_args()
    train, val = build_training.read_training_data(args)
    model = CMSF2Q(
        build_training.build_encoders(args),
        len(train),
        mem_bank_size=args.mem_bank_size,
        topk=args.topk,
        topkp=args.topkp,
        topk_plain=args.topk_plain,
    )
    run, loader = build_training.start_run(args, model, train, val)
    with run:
        for batch in run.batches(loader):
            loss, stats = run.forward(batch)
            run.step(loss, stats)
        run.finish("CMSF-2Q")


if __name__ == "__main__":
    script.run_script(main)
