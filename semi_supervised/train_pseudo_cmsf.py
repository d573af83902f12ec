"""Semi-supervised CMSF: the constraint is the label or a confident pseudo-label (CMSF sec. 3.2).

    python semi_supervised/train_pseudo_cmsf.py --cos --weak_strong --learning_rate 0.05 \
        --epochs 200 --arch resnet50 --topk 10 --momentum 0.99 --mem_bank_size 128000 \
        --sup_mem_bank_size 128000 --mlp_xent mlp --pseudo_lbl_epochs 10 --use_conf --conf_th 0.85 \
        --cache_sup --sup-split-file <SPLIT FILE> --checkpoint_path <CHECKPOINT PATH> <DATASET PATH>

    python semi_supervised/train_pseudo_cmsf.py --demo

A classifier head on the target embeddings, trained on those of the labeled images, predicts a label
for each unlabeled one. A query is pulled to the rows of the bank with its label; without a
confident label, to plain neighbors.

The head has a round of training after the middle step of an epoch and after the last, whatever the
batch size (the published code has the one in the middle below a batch size of 1024 only); an epoch
of one step has the last alone. With `--cache_conf_unsup` the cache is emptied at the start of each
epoch, as published, so that the head never trains on pseudo-labels of an earlier one.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from semi_supervised.pseudo_label import PseudoLabelHead, train_head
from utils.cli import arguments, build_evaluation, build_training, options
from utils.data.batches import Batch
from utils.data.eval_loader import EvalLoader
from utils.data.splits import labeled_index, unreadable_classes, write_split_file
from utils.evaluation.features import extract_features
from utils.method.collapse import embedding_health
from utils.method.encoders import QueryTargetEncoders
from utils.method.memory_bank import MemoryBank
from utils.method.neighbors import mean_shift_loss, nearest, nearest_with_label, purity
from utils.method.ranks import constrained_ranks
from utils.runtime import script
from utils.runtime.distributed import gather, is_main
from utils.runtime.errors import InputError
from utils.runtime.streams import upload

DEMO = options.demo(
    "demo_semi",
    topk=50,
    topk_plain=1,
    constraint_start=20,
    label_fraction=0.1,
    use_conf=True,
    conf_th=0.95,
    cache_sup=True,
    sup_mem_bank_size=512,
    mlp_xent="mlp",
    pseudo_lbl_epochs=10,
)


class PseudoCMSF(nn.Module):
    """The method as one module: a batch in, the loss out.

    labeled: (N,) bool, on the host, the images whose label may be used. mem_bank_size: K. topk: k
    with a label; topk_plain: k without. conf_th: confidence from which a prediction counts.
    cache_size: rows of the cache of labeled embeddings, or None: they are made of the images.
    cache_confident: unlabeled ones with a confident label enter the cache too; `start_epoch` then
    empties it.
    """

    constraint = "pseudo-label"  # neighbors have it in the bank: for `show_neighbors.py`

    def __init__(
        self,
        encoders: QueryTargetEncoders,
        head: PseudoLabelHead,
        labeled: Tensor,
        *,
        mem_bank_size: int,
        topk: int,
        topk_plain: int | None = None,
        conf_th: float = 0,
        cache_size: int | None = None,
        cache_confident: bool = False,
    ) -> None:
        super().__init__()
        self.encoders, self.head = encoders, head.requires_grad_(False)  # until `train_head`
        self.labeled = labeled
        self.topk, self.topk_plain = topk, topk_plain or topk
        self.conf_th, self.cache_confident = conf_th, cache_confident
        self.bank = MemoryBank(mem_bank_size, encoders.proj_dim, with_true_label=True)
        self.cache = MemoryBank(cache_size, encoders.proj_dim) if cache_size else None

    def forward(
        self, batch: Batch, *, constrained: bool = True
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """One step: the loss (scalar, 0 to 4, with gradient) and figures in percent.

        constrained: False searches plain neighbors for every image.
        """
        q = self.encoders.query(batch.query_view, *batch.small_views)  # ([V,] B, D)
        self.encoders.update_target()
        t = self.encoders.target(batch.target_view)  # (B, D), without gradient

        known = upload(self.labeled[batch.index], t.device)  # (B,) bool
        guess, confidence = self.head.predict(t)  # (B,), (B,)
        counts = known | (confidence >= self.conf_th) if constrained else known
        label = torch.where(known, batch.label, guess).masked_fill(~counts, -1)

        # Targets enter the bank before the search: each is its own nearest neighbor.
        self.bank.enqueue(t, index=batch.index, label=label, true_label=batch.label)
        if self.cache is not None:
            # The host knows what is labeled; to learn what else counts it waits for a GPU.
            kept = counts.cpu() if self.cache_confident else self.labeled[batch.index]
            self.cache.enqueue(t, index=batch.index, label=label, where=kept)
        rows, row_labels, row_truth = self.bank.in_use("features", "label", "true_label")
        wanted = label if constrained else torch.full_like(label, -1)
        near = self._neighbors(t, rows, wanted, row_labels)
        has_label = wanted >= 0
        constrained_rows = near._replace(valid=near.valid & has_label.unsqueeze(1))
        self.latest = t, constrained_rows  # for `diagnostics`
        return mean_shift_loss(q, rows, near), {
            "purity_constrained": purity(batch.label.masked_fill(~has_label, -1), row_truth, near),
            "fewer_than_k": _percent(~near.valid[:, : self.topk].all(dim=1), has_label),
            "confident": _percent(counts, ~known),
            "accuracy_confident": _percent(guess == batch.label, counts & ~known),
            "accuracy_all": _percent(guess == batch.label, ~known),
        }

    def _neighbors(self, t: Tensor, rows: Tensor, wanted: Tensor, row_labels: Tensor):
        """The topk nearest rows of the wanted label, or the topk_plain nearest where it is -1."""
        k = max(self.topk, self.topk_plain)
        near = nearest_with_label(t, rows, k=k, labels=wanted, row_labels=row_labels)
        allowance = torch.where(wanted < 0, self.topk_plain, self.topk).unsqueeze(1)  # (B, 1)
        place = torch.arange(near.rows.shape[1], device=t.device)
        return near._replace(valid=near.valid & (place < allowance))

    def start_epoch(self) -> None:
        """To be called before the first step of each epoch: pseudo-labels of the last one go."""
        if self.cache_confident:
            self.cache.clear()

    def diagnostics(self) -> dict[str, Tensor]:
        """Health of the embeddings, purity of plain neighbors, ranks of the constrained ones."""
        rows, truth = self.bank.in_use("features", "true_label")
        newest = self.bank.newest(256)
        plain = purity(truth[newest], truth, nearest(rows[newest], rows, k=self.topk))
        t, constrained = self.latest
        ranks = constrained_ranks(t, rows, constrained)
        return {"purity_plain": plain, "constrained_ranks": ranks, **embedding_health(rows)}

    def labeled_embeddings(self, images: EvalLoader) -> tuple[Tensor, Tensor]:
        """Embeddings (n, D) and labels (n,) to train the head on: the cache, or of the images."""
        if self.cache is not None:
            return tuple(self.cache.in_use("features", "label"))
        encoder = self.encoders.target_encoder
        features, labels = extract_features(
            nn.Sequential(encoder.backbone, encoder.projector),  # not compiled: of other sizes
            images,
            everywhere=True,  # each process trains the head as the others do
        )
        return nn.functional.normalize(features, dim=1), labels


def _percent(hits: Tensor, among: Tensor) -> Tensor:
    """Share of hits (B,) bool among some, (B,) bool, in percent; nan without any."""
    hits, among = gather(hits, among)
    return 100 * (hits & among).sum() / among.sum()


def parse_args() -> argparse.Namespace:
    """The flags of this script."""
    parser = arguments.Parser(description="Train semi-supervised CMSF with pseudo-labels.")
    options.add_training_options(parser)
    options.add_crop_options(parser)
    options.add_split_options(parser, "--sup_split_file", "--sup-split-file")
    add = parser.add_argument_group("pseudo-labels").add_argument
    add("--mlp_xent", choices=["linear", "mlp", "mlp_3l"], default="linear")
    add("--pseudo_batch_size", type=arguments.positive, default=256)
    add("--pseudo_lbl_epochs", type=arguments.positive, default=40)
    add("--pseudo_lbl_lr", type=arguments.not_negative, default=0.01)
    add("--pseudo_lbl_lr_schedule", type=arguments.epoch_list, default="15,30,40")
    add("--pseudo_lbl_momentum", type=arguments.share, default=0.9)
    add("--pseudo_lbl_weight_decay", type=arguments.not_negative, default=1e-4)
    add("--use_conf", action="store_true", help="only confident labels count")
    add("--conf_th", type=arguments.share, default=0.85, help="confidence that counts")
    kept = "train the head on embeddings kept from training"
    add("--cache_sup", action="store_true", help=kept)
    confident = "and on those of confident pseudo-labels (each step then waits for a GPU once)"
    add("--cache_conf_unsup", action="store_true", help=confident)
    add("--sup_mem_bank_size", type=arguments.positive, default=128000)
    plain = "k without a confident label; default: --topk"
    add("--topk_plain", type=arguments.positive, help=plain)
    start = "epoch from which the head is trained and the constraint counts"
    add("--constraint_start", type=arguments.positive, default=1, help=start)
    return options.parse(parser, demo=DEMO)


def main() -> None:
    """Train, save, and report k-NN accuracy."""
    args = parse_args()
    if args.cache_conf_unsup and not (args.cache_sup and args.use_conf):
        raise InputError("--cache_conf_unsup: only with --cache_sup and --use_conf")
    if args.pseudo_batch_size == 1 and args.mlp_xent != "linear":
        reason = f"--mlp_xent {args.mlp_xent} has batch norm, which cannot train on one row"
        raise InputError(f"--pseudo_batch_size 1: {reason}")
    train, val = build_training.read_training_data(args, labeled=True)
    index = labeled_index(
        train,
        file=args.sup_split_file,
        flag="--sup_split_file",
        fraction=args.label_fraction,
        seed=args.split_seed,
    )
    if args.cache_sup and args.sup_mem_bank_size < len(index):
        so = f"below the {len(index)} labeled images: the head is trained on the latest only"
        print(f"WARNING --sup_mem_bank_size {args.sup_mem_bank_size}: {so}", flush=True)
    labeled = torch.zeros(len(train), dtype=torch.bool)
    labeled[index] = True
    encoders = build_training.build_encoders(args)
    model = PseudoCMSF(
        encoders,
        PseudoLabelHead(args.mlp_xent, encoders.proj_dim, len(train.classes)),
        labeled,
        mem_bank_size=args.mem_bank_size,
        topk=args.topk,
        topk_plain=args.topk_plain,
        conf_th=args.conf_th if args.use_conf else 0,
        cache_size=args.sup_mem_bank_size if args.cache_sup else None,
        cache_confident=args.cache_conf_unsup,
    )
    run, loader = build_training.start_run(args, model, train, val, labeled=index)
    with run:
        if is_main():
            write_split_file(args.checkpoint_path / "labeled.txt", train, index)
        (labeled_images,) = build_evaluation.eval_loaders(
            args, loader.images.take(index), bad_images=loader.bad_images
        )
        for batch in run.batches(loader):
            if run.epoch_step == 1:
                model.start_epoch()
            constrained = run.epoch >= args.constraint_start
            loss, stats = run.forward(batch, constrained=constrained)
            run.step(loss, stats)
            if constrained and run.epoch_step in (run.epoch_steps // 2, run.epoch_steps):
                run.check_loss()
                seed = [args.seed, run.total_steps]
                run.note(train_round(model, labeled_images, args, seed=seed))
        run.finish("semi-supervised CMSF")


def train_round(
    model: PseudoCMSF, images: EvalLoader, args: argparse.Namespace, *, seed: list[int]
) -> dict[str, float]:
    """Train the head on what is labeled so far; the figures of the round, none below two rows.

    Warns where there are fewer, and of classes that are not learned as no image can be read.
    """
    embeddings, labels = model.labeled_embeddings(images)
    if broken := set(images.bad_images.names):
        of = images.images
        kept = [number for number in range(len(of)) if of.path(number) not in broken]
        so = "the classifier head does not learn it"
        unreadable_classes(of.labels[kept], of.classes, what="labeled images", so=so)
    if len(labels) < 2:
        found = f"{len(labels)} labeled embeddings, and it needs 2"
        print(f"WARNING the classifier head was not trained: {found}", flush=True)
        return {"head_rows": len(labels)}
    return train_head(
        model.head,
        embeddings,
        labels,
        epochs=args.pseudo_lbl_epochs,
        batch_size=args.pseudo_batch_size,
        learning_rate=args.pseudo_lbl_lr,
        decay_epochs=args.pseudo_lbl_lr_schedule,
        momentum=args.pseudo_lbl_momentum,
        weight_decay=args.pseudo_lbl_weight_decay,
        seed=seed,
    )


if __name__ == "__main__":
    script.run_script(main)
