"""Cross-entropy: what supervised CMSF is compared with (CMSF sec. 4.3).

    python supervised/train_sup_xent.py --cos --learning_rate 0.05 --epochs 200 --arch resnet50 \
        --checkpoint_path <CHECKPOINT PATH> <DATASET PATH>

    python supervised/train_sup_xent.py --demo

A linear classifier on the backbone, trained with it; backbone, views, optimizer and schedule are
those of the other methods. `--label_noise` and `--label_file` give images other labels than those
of their folders.
"""

import argparse
import sys
from pathlib import Path

from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import arguments, build_evaluation, build_training, options
from utils.data.batches import Batch
from utils.data.eval_loader import EvalLoader
from utils.data.label_noise import as_tensor, given_labels, labels_to_use, write_changes
from utils.evaluation.features import extract_features
from utils.method.collapse import embedding_health
from utils.method.encoders import SoleBackbone
from utils.runtime import script
from utils.runtime.distributed import is_main

DEMO = options.demo("demo_xent")


class CrossEntropy(nn.Module):
    """The method as one module: a batch in, the loss out.

    given: (N,) int64, on the host, labels to use instead of the images' own.
    """

    can_collapse = False  # features that tell no classes apart have a high loss

    def __init__(
        self,
        encoders: SoleBackbone,
        feature_dim: int,
        num_classes: int,
        *,
        given: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.encoders = encoders
        self.classifier = nn.Linear(feature_dim, num_classes)
        self.given = given
        self.features: Tensor | None = None  # (B, F), unit norm, of the last batch

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """One step: the loss (scalar, with gradient) and the accuracy on the batch in percent."""
        label = labels_to_use(batch, self.given)  # (B,)
        features = self.encoders(batch.query_view)  # (B, F)
        logits = self.classifier(features)  # (B, C)
        self.features = normalize(features.detach(), dim=1)
        hits = logits.argmax(dim=1) == label
        return cross_entropy(logits, label), {"accuracy": 100 * hits.float().mean()}

    def diagnostics(self) -> dict[str, Tensor]:
        """Health of the last batch's features."""
        return embedding_health(self.features)

    def val_accuracy(self, images: EvalLoader) -> dict[str, float]:
        """The classifier's own accuracy on images, in percent; on the main process alone."""
        whole = nn.Sequential(self.encoders.query_encoder.backbone, self.classifier)
        found = extract_features(whole, images)
        if found is None:
            return {}
        logits, labels = found
        return {"val_accuracy": 100 * (logits.argmax(dim=1) == labels).float().mean().item()}


def parse_args() -> argparse.Namespace:
    """The flags of this script."""
    parser = arguments.Parser(description="Train a backbone and classifier by cross-entropy.")
    options.add_training_options(parser, mean_shift=False)
    options.add_label_options(parser)
    views, help_text = ["strong", "weak"], "augmentation of the images"
    parser.add_argument("--view", choices=views, default="strong", help=help_text)
    return options.parse(parser, demo=DEMO)


def main() -> None:
    """Train, save, and report k-NN accuracy and that of the classifier."""
    args = parse_args()
    train, val = build_training.read_training_data(args, labeled=True)
    given = given_labels(train, file=args.label_file, noise=args.label_noise, seed=args.noise_seed)
    backbone, feature_dim = build_training.build_sole_backbone(args)
    model = CrossEntropy(backbone, feature_dim, len(train.classes), given=as_tensor(given))
    run, loader = build_training.start_run(args, model, train, val, single=args.view, given=given)
    with run:
        if is_main():
            write_changes(args.checkpoint_path / "label_noise.txt", train, given)
        for batch in run.batches(loader):
            loss, stats = run.forward(batch)
            run.step(loss, stats)
            at_end = run.epoch_step == run.epoch_steps and run.epoch == run.epochs
            if at_end and val is not None:
                bad = loader.bad_images
                (val_images,) = build_evaluation.eval_loaders(args, val, bad_images=bad)
                run.note(model.val_accuracy(val_images))
        run.finish("cross-entropy")


if __name__ == "__main__":
    script.run_script(main)
