"""A picture of an encoder's features: maps of the val images, and what k-NN takes for what.

    python eval/show_features.py --weights <CHECKPOINT> --output features.svg <DATASET PATH>

    python eval/show_features.py --demo

The features are those of `eval_knn.py`, L2-normalized. They are mapped by PCA and, where
scikit-learn is installed, by t-SNE. The confusions are those of k-NN's majority vote among the
train images. The picture is an SVG file for any browser, which names a point's file where the mouse
is. A JSON file beside it holds all confusions.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import arguments, build_evaluation, options
from utils.data.datasets import ImageSet
from utils.data.splits import check_every_class, unreadable_classes
from utils.evaluation import feature_cache, feature_space, knn, result_files
from utils.reporting import feature_map
from utils.reporting.feature_map import MOST_COLORED, Knn, Map, Points
from utils.runtime import faiss_library, files, script
from utils.runtime.errors import InputError

DEMO = {"weights": options.DEMO_CHECKPOINT, "num_workers": 1}
PICTURE = {"ending": ".svg", "of": "features", "key": "confusions"}
OWN = "<!-- by show_features.py -->\n"  # how its pictures begin, by which they are known
K = 20
MOST_POINTS = 10_000
NO_TSNE = "t-SNE needs scikit-learn, which is not installed"


def parse_args() -> argparse.Namespace:
    """The flags of this script."""
    parser = arguments.Parser(description="Draw an encoder's features.")
    options.add_data_options(parser)
    options.add_checkpoint_options(parser)
    group = parser.add_argument_group("picture")
    text = "draw one map only; default: both, t-SNE where scikit-learn is installed"
    group.add_argument("--map", choices=["pca", "tsne"], help=text)
    number = arguments.number(int, low=2, high=MOST_POINTS)
    text = "at most so many val images in the maps, evenly taken"
    group.add_argument("--points", type=number, default=2000, help=text)
    text = f"classes with a color, with commas; default: the first {MOST_COLORED}"
    group.add_argument("--classes", help=text)
    text = "SVG file to write, with a JSON file beside it; replaces no files but its own"
    path = Path("output/features.svg")
    group.add_argument("--output", type=arguments.path, default=path, help=text)
    return options.parse(parser, demo=DEMO)


def is_own_picture(path: Path) -> bool:
    """Whether a file is a picture of this script."""
    return path.read_text().startswith(OWN)


def choose_maps(named: str | None) -> list[str]:
    """The maps to draw; InputError for t-SNE alone without scikit-learn."""
    if named == "pca" or feature_space.has_tsne():
        return [named] if named else ["pca", "tsne"]
    if named:
        raise InputError(f"--map {named}: {NO_TSNE}")
    print(f"{NO_TSNE}: the map is by PCA alone", flush=True)
    return ["pca"]


def choose_classes(named: str | None, classes: list[str]) -> list[int]:
    """The classes with a color; InputError for unknown or too many ones."""
    if named is None:
        return list(range(min(len(classes), MOST_COLORED)))
    names = [named] if named in classes else list(dict.fromkeys(named.split(",")))
    if unknown := [name for name in names if name not in classes]:
        raise InputError(f"--classes {','.join(unknown[:5])}: no such class")
    if len(names) > MOST_COLORED:
        raise InputError(f"--classes: {len(names)} classes, {MOST_COLORED} at most")
    return [classes.index(name) for name in names]


def build_map(kind: str, features: np.ndarray, *, seed: int) -> tuple[Map, list[float] | None]:
    """The map of features (n, F), and in percent what PCA's axes explain."""
    if kind == "tsne":
        print(f"t-SNE of {len(features)} images, which takes up to some minutes", flush=True)
        places, perplexity = feature_space.tsne(features, seed=seed)
        title = f"t-SNE (perplexity {perplexity:.3g}, seed {seed})"
        axes = ("no scale: only what lies close is alike", "")
        return Map(title, places, axes, has_ticks=False), None
    places, explained = feature_space.principal_axes(features)
    axes = [f"axis {i}: {share:.1f}% of the variance" for i, share in enumerate(explained, 1)]
    return Map("PCA", places, tuple(axes)), explained.tolist()


def find_confusions(
    features: feature_cache.Features, *, num_classes: int
) -> tuple[Knn, np.ndarray]:
    """What k-NN says of all val images, and of each (N,); normalizes the features in place."""
    (base, base_labels), (queries, labels) = features.values()
    unit = (normalize(part, dim=1, out=part).numpy() for part in (base, queries))
    k = min(K, len(base))
    predicted = knn.majority_vote(base_labels.numpy()[knn.search(*unit, k=k)[0]])
    counts = feature_space.confusions(labels.numpy(), predicted, num_classes=num_classes)
    accuracy = 100 * float(counts.trace() / counts.sum())
    return Knn(k, counts, accuracy, feature_space.most_frequent(counts, most=5)), predicted


def name_points(
    val: ImageSet, left_out: set[int], predicted: np.ndarray, rows: np.ndarray
) -> Points:
    """The points of some rows of the features, which images that are left out have none of."""
    numbers = np.delete(np.arange(len(val)), sorted(left_out))[rows]
    labels = val.labels[numbers]
    words = [
        f"{val.name(number)}: {val.classes[label]}, for k-NN {val.classes[guess]}"
        for number, label, guess in zip(numbers, labels, predicted[rows], strict=True)
    ]
    return Points(labels, words)


def describe(
    args: argparse.Namespace,
    state: dict,
    *,
    points: int,
    of: int,
    colored: list[int],
    classes: list[str],
) -> list[str]:
    """Lines for the picture: which encoder, which of so many images, which classes have a color."""
    evenly = ", evenly taken" if points < of else ""
    images = f"L2-normalized features of {points} of {of} val images{evenly}"
    if len(colored) < len(classes):
        which = f"the first {len(colored)}" if args.classes is None else f"{len(colored)} named"
        images += f"; with a color: {which} of {len(classes)} classes"
    return [str(result_files.Encoder(**build_evaluation.encoder_record(args, state))), images]


def by_name(counts: np.ndarray, classes: list[str]) -> dict[str, dict[str, int]]:
    """Class -> class taken for -> images; what is 0 is left out."""
    rows = zip(classes, counts, strict=True)
    return {name: {classes[j]: int(row[j]) for j in np.flatnonzero(row)} for name, row in rows}


def main() -> None:
    """Extract, map, vote, draw; write picture and JSON."""
    args = parse_args()
    result_files.check_picture(args.output, **PICTURE, is_own=is_own_picture)
    result_files.make_folder(args.output.parent, flag="--output")
    faiss_library.load("k-NN")
    kinds = choose_maps(args.map)
    train, val = build_evaluation.read_labeled(args, only_labeled=False)
    colored = choose_classes(args.classes, val.classes)
    backbone, state = build_evaluation.evaluated_backbone(args)
    bad_images = build_evaluation.build_bad_images(args)
    loaders = build_evaluation.eval_loaders(args, train, val, bad_images=bad_images)
    features = feature_cache.extract(build_evaluation.place(args, backbone.module), *loaders)
    if features is None:  # not the main process
        return
    check_every_class(features["train"][1], val.classes, what=f"data {train.root}")
    unreadable_classes(features["val"][1], val.classes, what=f"data {val.root}")
    found, predicted = find_confusions(features, num_classes=len(val.classes))
    count = len(predicted)
    rows = np.linspace(0, count - 1, min(args.points, count)).round().astype(int)
    shown = features["val"][0].numpy()[rows]
    maps, explained = zip(*(build_map(kind, shown, seed=args.seed) for kind in kinds), strict=True)
    notes = describe(args, state, points=len(rows), of=count, colored=colored, classes=val.classes)
    notes += [NO_TSNE] * (args.map is None and "tsne" not in kinds)
    picture = feature_map.sheet_svg(
        list(maps),
        name_points(val, loaders[1].left_out, predicted, rows),
        found,
        classes=val.classes,
        colored=colored,
        notes=notes,
    )
    files.replace_text(args.output, OWN + picture, flag="--output")
    record = {
        "maps": kinds,
        "explained_variance": explained[0],
        "points": len(rows),
        "colored": [val.classes[label] for label in colored],
        "notes": notes,
        "k": found.k,
        "accuracy": found.accuracy,
        "confusions": by_name(found.counts, val.classes),
    }
    counts = {"train": len(features["train"][1]), "val": count, "classes": len(val.classes)}
    record |= build_evaluation.result_record(
        args, state, counts=counts, bad_images=bad_images, images={"train": train, "val": val}
    )
    name = args.output.with_suffix(".json").name
    path = result_files.write_json(args.output.parent, name, record, flag="--output")
    print(f"{args.output}\n{path}\n{found.k}-NN accuracy {found.accuracy:.2f}%")
    for one in found.most_frequent:
        print(feature_map.confusion(one, found.counts, val.classes, most=60))


if __name__ == "__main__":
    script.run_script(main)
