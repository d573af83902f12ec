"""Where in the networks the classes are: through which part labels reach the features.

    python tests/benchmarks/stages.py <DATASET PATH> <CHECKPOINT> ...

For each checkpoint of a mean-shift script, and each stage that an image passes (backbone, projector
and predictor of the query side, backbone and projector of the target side): the share of the
variance of its unit vectors that lies between classes (percent), the effective rank of the vectors
and of the class means, and 20-NN accuracy of the val images among the training images. Networks are
in eval mode. The share is corrected for the chance that finite groups differ, so it is 0 for
classes drawn at random.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from utils.data.datasets import read_split
from utils.data.eval_loader import EvalLoader
from utils.evaluation.features import extract_features
from utils.evaluation.knn import knn_figures
from utils.method import checkpoint
from utils.method.collapse import effective_rank
from utils.method.encoders import QueryTargetEncoders, build_backbone


def share_between(vectors: Tensor, labels: Tensor) -> float:
    """Percent of the variance of vectors (N, D) that lies between classes; labels: (N,) int64."""
    vectors = vectors.double()
    classes, labels = labels.unique(return_inverse=True)
    sums = torch.zeros(len(classes), vectors.shape[1], dtype=torch.float64)
    means = sums.index_add(0, labels, vectors) / labels.bincount().unsqueeze(1)
    within = (vectors - means[labels]).square().sum() / (len(vectors) - len(classes))
    total = (vectors - vectors.mean(dim=0)).square().sum() / (len(vectors) - 1)
    return 100 * float(1 - within / total)


def rank_of_means(vectors: Tensor, labels: Tensor) -> float:
    """Effective rank of the class means around the mean of all, at most the classes less one."""
    means = torch.stack([vectors[labels == label].mean(dim=0) for label in labels.unique()])
    return float(effective_rank(means - means.mean(dim=0)))


def stages_of(path: str) -> tuple[dict[str, nn.Module], int]:
    """The networks up to each stage of a checkpoint, and the side of the images they take."""
    state = checkpoint.load(path, flag="checkpoint")
    flags = checkpoint.settings(state)
    side = {"image_size": flags["image_size"]}
    backbone = build_backbone(flags["arch"], small_stem=flags["small_stem"], **side)
    sizes = {name: flags[name] for name in ("proj_dim", "hidden_dim", "proj_bn")}
    encoders = QueryTargetEncoders(backbone.module, backbone.feature_dim, **sizes)
    checkpoint.load_initial_weights(encoders, backbone, state, what=path)
    query, target = encoders.query_encoder, encoders.target_encoder
    return {
        "query backbone": query.backbone,
        "query projector": query,
        "query predictor": nn.Sequential(query, encoders.predictor),
        "target backbone": target.backbone,
        "target projector": target,
    }, flags["image_size"]


def main() -> None:
    """Measure each checkpoint, stage by stage."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("checkpoints", nargs="+")
    args = parser.parse_args()
    splits = [read_split(args.data, split) for split in ("train", "val")]
    print(f"{'':50}{'between classes':>16}{'rank':>8}{'of means':>10}{'20-NN':>8}")
    for path in args.checkpoints:
        stages, side = stages_of(path)
        for stage, network in stages.items():
            train, val = (
                extract_features(
                    network.to(memory_format=torch.channels_last),
                    EvalLoader(images, batch_size=500, image_size=side),
                )
                for images in splits
            )
            unit = normalize(val[0], dim=1)
            between, rank = share_between(unit, val[1]), float(effective_rank(unit))
            of_means = rank_of_means(unit, val[1])
            knn = knn_figures(train, val, ks=(20,), num_classes=len(splits[0].classes))
            name = f"{'/'.join(Path(path).parts[-2:])}, {stage}"
            print(f"{name:50}{between:16.1f}{rank:8.1f}{of_means:10.1f}{knn[20]['accuracy']:8.1f}")


if __name__ == "__main__":
    main()
