"""CMSF-KM: self-supervised constrained mean shift, constraint from k-means (CMSF sec. 3.1).

    python self_supervised/train_msf_km.py --cos --weak_strong --learning_rate 0.05 --epochs 200 \
        --arch resnet50 --topk 5 --momentum 0.99 --mem_bank_size 128000 --num_clusters 50000 \
        --checkpoint_path <CHECKPOINT PATH> <DATASET PATH>

    python self_supervised/train_msf_km.py --demo

A query is pulled to the neighbors of its target in the memory bank M, and to distant neighbors that
are related all the same: rows of M whose images are in the same cluster as its own. After each
epoch all images are clustered anew by their last embeddings.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import arguments, build_training, options
from utils.data.batches import Batch
from utils.method.collapse import embedding_health
from utils.method.encoders import QueryTargetEncoders
from utils.method.kmeans import kmeans
from utils.method.memory_bank import MemoryBank
from utils.method.neighbors import mean_shift_loss, nearest, nearest_with_label, purity
from utils.method.previous_embeddings import PreviousEmbeddings
from utils.method.ranks import constrained_ranks
from utils.runtime import faiss_library, script
from utils.runtime.distributed import from_main, gather, is_main
from utils.runtime.streams import upload

DEMO = options.demo("demo_km", topk=5, num_clusters=100)


class CMSFKM(nn.Module):
    """The method as one module: a batch in, the loss out; `refit` after each epoch.

    num_images: N, the size of the training set. mem_bank_size: K. topk: k, neighbors a query is
    pulled to. num_clusters: at most. topk_plain: of the plain loss, if not k as well. clusters:
    (N,) int64, that of each image, -1 where it has none (yet); may be assigned to.
    """

    def __init__(
        self,
        encoders: QueryTargetEncoders,
        num_images: int,
        *,
        mem_bank_size: int,
        topk: int,
        num_clusters: int,
        topk_plain: int | None = None,
    ) -> None:
        super().__init__()
        self.encoders = encoders
        self.topk, self.topk_plain, self.num_clusters = topk, topk_plain or topk, num_clusters
        self.bank = MemoryBank(mem_bank_size, encoders.proj_dim)
        self.previous = PreviousEmbeddings(num_images, encoders.proj_dim)
        self.register_buffer("clusters", torch.full((num_images,), -1))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """One step: the loss (scalar, 0 to 4, with gradient) and figures in percent."""
        q = self.encoders.query(batch.query_view, *batch.small_views)  # ([V,] B, D)
        self.encoders.update_target()
        t = self.encoders.target(batch.target_view)  # (B, D), without gradient

        # Targets enter the bank before the search: each is its own nearest neighbor.
        self.previous.remember(*gather(batch.index, t))
        self.bank.enqueue(t, index=batch.index, label=batch.label)
        rows, row_index, row_labels = self.bank.in_use("features", "index", "label")

        # Clusters as they are now, of rows too that were written before the last refit.
        own = self.clusters[upload(batch.index, t.device)]  # (B,), -1: no constraint
        clusters = {"labels": own, "row_labels": self.clusters[row_index]}
        near = nearest(t, rows, k=max(self.topk, self.topk_plain))
        far = nearest_with_label(t, rows, k=self.topk, **clusters)
        loss_near = mean_shift_loss(q, rows, near.first(self.topk_plain))
        loss_far = mean_shift_loss(q, rows, far)
        self.latest = t, far  # for `diagnostics`
        return (loss_far + loss_near) / 2, {
            "no_cluster": 100 * (own < 0).float().mean(),
            "fewer_than_k": 100 * (far.valid.sum(dim=1) < self.topk).float().mean(),
            "loss_constrained": loss_far.detach(),
            "loss_plain": loss_near.detach(),
            "purity_constrained": purity(batch.label, row_labels, far),
            "purity_plain": purity(batch.label, row_labels, near.first(self.topk)),
        }

    @torch.no_grad()
    def refit(self, *, seed: Sequence[int]) -> dict[str, float]:
        """Cluster the images seen so far by their last embeddings, the same in every process.

        seed: integers that the first centers follow from. Returns figures of the clusters that have
        an image, on the main process alone.
        """
        start = time.monotonic()
        embeddings, seen = self.previous.on_main()  # (N, D), (N,)
        clusters, figures = torch.full_like(self.clusters, -1), {}
        if is_main():
            rows = embeddings if seen.all() else embeddings[seen]  # a copy may be 2.6 GB
            found = kmeans(rows, num_clusters=self.num_clusters, seed=seed)
            assignments = torch.from_numpy(found.assignments)
            clusters[seen.to(clusters.device)] = assignments.to(clusters.device)
            sizes = assignments.unique(return_counts=True)[1]
            figures = {
                "clusters": len(sizes),
                "cluster_min": sizes.min().item(),
                "cluster_median": sizes.median().item(),
                "cluster_max": sizes.max().item(),
                "cluster_distance": float(found.squared_distance.mean()),
            }
        self.clusters.copy_(from_main(clusters))
        return figures | {"refit_s": round(time.monotonic() - start, 3)}

    def diagnostics(self) -> dict[str, Tensor]:
        """Health of the embeddings in the bank, and how distant the constrained neighbors are."""
        (rows,) = self.bank.in_use("features")
        t, far = self.latest
        return {"constrained_ranks": constrained_ranks(t, rows, far), **embedding_health(rows)}


def parse_args() -> argparse.Namespace:
    """The flags of this script."""
    parser = arguments.Parser(description="Train self-supervised CMSF-KM.")
    options.add_training_options(parser)
    options.add_crop_options(parser)
    help_text = "of k-means after each epoch; with no more images than that each is its own cluster"
    parser.add_argument("--num_clusters", type=arguments.positive, default=50000, help=help_text)
    options.add_plain_option(parser)
    return options.parse(parser, demo=DEMO)


def main() -> None:
    """Train, save, and report k-NN accuracy."""
    args = parse_args()
    faiss_library.load("k-means")  # an epoch would be over before it is needed
    train, val = build_training.read_training_data(args)
    if args.num_clusters > len(train):
        reason = f"above the {len(train)} training images, each of which becomes a cluster"
        print(f"WARNING --num_clusters {args.num_clusters}: {reason}", flush=True)
    model = CMSFKM(
        build_training.build_encoders(args),
        len(train),
        mem_bank_size=args.mem_bank_size,
        topk=args.topk,
        num_clusters=args.num_clusters,
        topk_plain=args.topk_plain,
    )
    run, loader = build_training.start_run(args, model, train, val)
    with run:
        for batch in run.batches(loader):
            loss, stats = run.forward(batch)
            run.step(loss, stats)
            if run.epoch_step == run.epoch_steps:
                run.check_loss()
                run.note(model.refit(seed=[args.seed, run.total_steps]))
        run.finish("CMSF-KM")


if __name__ == "__main__":
    script.run_script(main)
