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
from utils.method.neighbors import (
    Neighbors,
    all_finite,
    constrained_ranks,
    mean_shift_loss,
    nearest,
    nearest_with_label,
    purity,
)
from utils.method.previous_embeddings import PreviousEmbeddings
from utils.runtime import faiss_library, origin, script
from utils.runtime.distributed import all_true, from_main, gather, is_main
from utils.runtime.streams import upload

DEMO = options.DEMO | {
    "topk": 5,
    "num_clusters": 100,
    "checkpoint_path": origin.ROOT / "output" / "demo_km",
}


class CMSFKM(nn.Module):
    """The method as one module: a batch in, the loss out; `refit` after each epoch.

    encoders: any `QueryTargetEncoders`, so any backbone. num_images: N, the size of the training
    set. mem_bank_size: K. topk: k, neighbors a query is pulled to. num_clusters: most clusters that
    a refit makes. topk_plain: neighbors of the plain loss, if not k as well.

    clusters: (N,) int64, the cluster of each image, -1 where it has none (yet); may be assigned to.
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
        self.latest: tuple[Tensor, Neighbors] | None = None  # targets and their constrained rows
        self.bank = MemoryBank(mem_bank_size, encoders.proj_dim)
        self.previous = PreviousEmbeddings(num_images, encoders.proj_dim)
        self.register_buffer("clusters", torch.full((num_images,), -1))

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """One step: the loss (scalar, 0 to 4, with gradient) and figures in percent."""
        q = self.encoders.query(batch.query_view, *batch.small_views)  # ([V,] B, D)
        with torch.no_grad():
            self.encoders.update_target()
            t = self.encoders.target(batch.target_view)  # (B, D)
        finite = all_true(all_finite(q, t))  # else nothing is remembered, and the loss is nan

        # The targets of all processes enter the bank before the search: each is its own nearest
        # neighbor.
        all_t, index, label = gather(t, batch.index, batch.label)
        self.previous.remember(index, all_t)
        self.bank.enqueue(all_t, index=index, label=label, only_if=finite)
        rows, row_index, row_labels = self.bank.in_use("features", "index", "label")
        # Clusters as they are now, of rows too that were written before the last refit.
        own = self.clusters[upload(batch.index, t.device)]  # (B,), -1: no constraint
        near = nearest(t, rows, k=max(self.topk, self.topk_plain))
        far = nearest_with_label(
            t, rows, k=self.topk, labels=own, row_labels=self.clusters[row_index]
        )

        self.latest = t, far
        loss_near = mean_shift_loss(q, rows, near.first(self.topk_plain))
        loss_far = mean_shift_loss(q, rows, far)
        return ((loss_far + loss_near) / 2).where(finite, torch.nan), {
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

        seed: integers that the first centers follow from. Returns the figures of the clusters, on
        the main process alone: how many have an image, and the images they have.
        """
        start = time.monotonic()
        embeddings, seen = self.previous.on_main()  # (N, D), (N,)
        clusters, figures = torch.full_like(self.clusters, -1), {}
        if is_main():
            rows = embeddings if seen.all() else embeddings[seen]  # a copy may be 2.6 GB
            found = kmeans(rows, num_clusters=self.num_clusters, seed=seed)
            assignments = torch.from_numpy(found.assignments)
            clusters[seen.to(clusters.device)] = assignments.to(clusters.device)
            sizes = assignments.bincount()
            sizes = sizes[sizes > 0]
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
    parser.add_argument(
        "--num_clusters",
        type=arguments.positive,
        default=50000,
        help="of k-means after each epoch; with no more images than that each is its own cluster",
    )
    options.add_plain_option(parser)
    return options.parse(parser, demo=DEMO)


def main() -> None:
    """Train, save, and report k-NN accuracy."""
    args = parse_args()
    build_training.check_bank(args)
    faiss_library.load("k-means")  # an epoch would be over before it is needed
    train, val = build_training.read_training_data(args)
    if args.num_clusters > len(train):
        reason = f"above the {len(train)} training images, each of which becomes a cluster"
        print(f"WARNING --num_clusters {args.num_clusters}: {reason}", flush=True)
    loader = build_training.build_loader(args, train)
    model = CMSFKM(
        build_training.build_encoders(args),
        len(train),
        mem_bank_size=args.mem_bank_size,
        topk=args.topk,
        num_clusters=args.num_clusters,
        topk_plain=args.topk_plain,
    )
    model = build_training.place(args, model)
    optimizer = build_training.build_optimizer(args, model)

    with build_training.build_run(args, model, optimizer, loader=loader, val=val) as run:
        for batch in run.batches(loader):
            loss, stats = run.forward(batch)
            run.step(loss, stats)
            if run.epoch_step == run.epoch_steps:
                run.note(model.refit(seed=[args.seed, run.total_steps]))
        run.finish("CMSF-KM")


if __name__ == "__main__":
    script.run_script(main)
