"""From compare.py's flags to encoders: settings of each row, opened networks, kept features."""

import argparse
import hashlib
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from utils.cli import arguments, build_evaluation
from utils.data.bad_images import BadImages
from utils.data.datasets import ImageSet
from utils.data.eval_loader import LabeledLoader
from utils.data.splits import check_every_class, unreadable_classes
from utils.evaluation import comparison, feature_cache, knn, linear_probe, result_files
from utils.evaluation.comparison_table import Row
from utils.evaluation.feature_cache import Features
from utils.evaluation.linear_run import FromFeatures, Recipe
from utils.evaluation.result_files import ValImages
from utils.method.encoders import Backbone
from utils.runtime.errors import InputError, RunError

PIXELS_SIZE = 32  # of the row of raw pixels
_PLAIN_NAME = "[a-z0-9][a-z0-9_-]{0,59}"  # of a row, which then is its folder's too
CROPS_FILE = "crops.pth"


class Opened(NamedTuple):
    """An encoder that is a row: its settings, all of them known by now, network and folder.

    state: what results say of the checkpoint; its weights are in the network.
    """

    name: str
    args: argparse.Namespace
    backbone: Backbone
    state: dict
    folder: Path


class Data(NamedTuple):
    """The images that all rows are measured on, their digests, and the broken ones."""

    train: ImageSet
    val: ImageSet
    digests: dict[str, str]
    bad_images: BadImages


def row_settings(
    texts: Iterable[str] | None, names: Iterable[str], *, flag: str, parse: Callable = str
) -> dict[str, Any]:
    """Each row's value of a flag that was given as VALUE, for all, or NAME=VALUE, for one row.

    None: left open. InputError for a name that is no row, for a second value of the same rows, and
    for what `parse`, a type of `arguments`, refuses.
    """
    given: dict[str | None, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        name, value = (name, value) if equals else (None, text)
        if name is not None and name not in names:
            raise InputError(f"{flag} {text}: no row {name!r} (rows: {', '.join(names)})")
        if name in given:
            raise InputError(f"{flag} {text}: {given[name]} is given too, for the same rows")
        try:
            given[name] = parse(value)
        except argparse.ArgumentTypeError as error:
            raise InputError(f"{flag} {text}: {error}") from None
    return {name: given.get(name, given.get(None)) for name in names}


def chosen_rows(texts: list[str] | None, names: Iterable[str], *, flag: str) -> set[str]:
    """The rows of a flag that takes names: none without it, all if it names none."""
    if unknown := [text for text in texts or () if text not in names]:
        raise InputError(f"{flag} {unknown[0]}: no row of this name (rows: {', '.join(names)})")
    return set(names if texts == [] else texts or ())


def _row_args(args: argparse.Namespace) -> dict[str, argparse.Namespace]:
    """The settings of each row of --weights, as those of a script that evaluates one encoder."""
    files = {}
    for text in args.weights:
        name, equals, file = text.partition("=")
        if not (name and equals):
            raise InputError(f"--weights {text}: not NAME=FILE")
        if name in files:
            raise InputError(f"--weights {text}: there is a row of the name {name!r} already")
        files[name] = file
    own = {
        "weights": files,
        "arch": row_settings(args.arch, files, flag="--arch"),
        "image_size": row_settings(
            args.image_size, files, flag="--image_size", parse=arguments.side
        ),
        "prefix": row_settings(args.prefix, files, flag="--prefix"),
    }
    given = {text.partition("=")[0] for text in args.prefix or () if "=" in text}
    for name, file in files.items():  # a prefix for all is one for all files
        if file in result_files.NAMED and name not in given:
            own["prefix"][name] = None
    for flag in ("use_target", "small_stem"):
        chosen = chosen_rows(getattr(args, flag), files, flag=f"--{flag}")
        own[flag] = {name: name in chosen for name in files}
    return {
        name: _with(args, {flag: values[name] for flag, values in own.items()}) for name in files
    }


def _with(args: argparse.Namespace, settings: dict[str, Any]) -> argparse.Namespace:
    """The flags, some of them otherwise."""
    return argparse.Namespace(**(vars(args) | settings))


def _baselines(args: argparse.Namespace, opened: list[Opened]) -> dict[str, argparse.Namespace]:
    """The settings of the rows of --baselines: pixels, and a random network for each network."""
    plain = {"prefix": None, "use_target": False, "small_stem": False, "arch": None}
    rows = {}
    if "pixels" in args.baselines:
        pixels = {"weights": "pixels", "image_size": PIXELS_SIZE}
        rows["raw pixels"] = _with(args, plain | pixels)
    own = [row.args for row in opened if row.args.weights not in result_files.NAMED]
    networks = dict.fromkeys((row.arch, row.image_size, row.small_stem) for row in own)
    for arch, size, small in networks if "random" in args.baselines else ():
        about = f" ({arch}, {size} px{', small stem' * small})" if len(networks) > 1 else ""
        network = {"arch": arch, "image_size": size, "small_stem": small, "weights": "random"}
        rows[f"random network{about}"] = _with(args, plain | network)
    return rows


def _open(name: str, args: argparse.Namespace, *, images: int) -> Opened:
    """Build a row's network and load its weights; InputError for what does not fit."""
    backbone, state = build_evaluation.evaluated_backbone(args)
    build_evaluation.check_view_memory(args, min(args.batch_size, images), views=1)
    # Not its weights, nor a memory bank: all rows are open at a time.
    state = {key: state[key] for key in ("format", "epoch", "metadata") if key in state}
    return Opened(name, args, backbone, state, args.save / folder_name(name))


def open_rows(args: argparse.Namespace, *, taken: Iterable[str], images: int) -> list[Opened]:
    """The rows of --baselines and --weights, opened and checked before any work.

    taken: names of other rows. images: most of a split. InputError for a row that cannot be.
    """
    own = _row_args(args)
    if twice := [name for name in own if name in taken]:
        raise InputError(f"--weights: there is a row of the name {twice[0]!r} in --results too")
    opened = [_open(name, settings, images=images) for name, settings in own.items()]
    named = [row.name for row in opened]
    for name, settings in _baselines(args, opened).items():
        if name in (*named, *taken):
            raise InputError(f"--baselines {settings.weights}: there is a row {name!r} already")
        opened.insert(len(opened) - len(named), _open(name, settings, images=images))
    for row in opened:
        result_files.make_folder(row.folder, flag="--save")
    return opened


def folder_name(name: str) -> str:
    """A folder's name for a row's name, any text: of two names never the same.

    A plain name stands for itself; of any other what can be read of it, and its digest. Letters
    have one case, as some file systems see only one.
    """
    if re.fullmatch(_PLAIN_NAME, name):
        return name
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:16]
    return f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')[:30]}~{digest}"


def _kept(row: Opened, data: Data) -> dict[str, dict[str, Any]]:
    """The files of a row's features by name, each with what `feature_cache.load` is to be told."""
    key = build_evaluation.feature_key(row.args, row.state, data.digests)
    of_val = {part: value for part, value in key.items() if part != "train images"}
    crops = f"random crops and flips of {comparison.MOST} val images at most, seed {row.args.seed}"
    about = {
        "flag": "--save",
        "bad_images": data.bad_images,
        "feature_dim": row.backbone.feature_dim,
        "num_classes": len(data.train.classes),
    }
    return {
        feature_cache.NAME: about | {"key": key},
        CROPS_FILE: about | {"key": of_val | {"view": crops}, "splits": comparison.CROPS},
    }


def keep_features(row: Opened, data: Data, *, check: bool) -> None:
    """See that a row's folder has its features, of all images and of crops of val images.

    What is there of the same checkpoint, settings and images stays. All processes call it. check:
    InputError for a class without a readable training image, a warning for one without a val image.
    """
    backbone = row.backbone._replace(module=build_evaluation.place(row.args, row.backbone.module))
    both = (data.train, data.val)
    loaders = build_evaluation.eval_loaders(row.args, *both, bad_images=data.bad_images)

    def of_crops() -> Features | None:
        settings = ("image_size", "batch_size", "seed", "num_workers", "device")
        how = {name: getattr(row.args, name) for name in settings}
        images = comparison.evenly_taken(data.val)
        views = LabeledLoader(images, bad_images=data.bad_images, fewest=1, **how)
        return comparison.extract_crops(backbone, views, row.name)

    of_images, crops = _kept(row, data).items()
    features = _keep(row, *of_images, lambda: feature_cache.extract(backbone.module, *loaders))
    if check and features:
        what = f"data {row.args.data}, as far as it can be read"
        check_every_class(features["train"][1], data.train.classes, what=what)
        unreadable_classes(features["val"][1], data.val.classes, what=f"data {data.val.root}")
    del features  # they may be as large as memory
    _keep(row, *crops, of_crops)


def _keep(row: Opened, name: str, about: dict[str, Any], make: Callable) -> Features | None:
    return feature_cache.load_or_make(row.folder / name, make=make, **about)


def _sweep(
    row: Opened, features: Features, recipe: Recipe, *, num_classes: int, epochs: int
) -> tuple[dict, dict[str, str]]:
    """`comparison.linear_sweep`, {} where all rates diverge, and why it is left out."""
    how = {"num_classes": num_classes, "epochs": epochs, "device": row.args.device}
    data = FromFeatures(
        features, batch_size=recipe.batch_size, seed=recipe.seed, device=row.args.device
    )
    try:
        text = f"{row.name}, linear"
        return comparison.linear_sweep(recipe, row.backbone, data, text=text, **how), {}
    except RunError as error:  # the other figures stand
        return {}, {"linear": str(error)}


def _reasons(figures: dict[str, float | None], counts: dict[str, int]) -> dict[str, str]:
    """Why figures are left out; such as are no number are taken out for it."""
    reasons = {}
    for name, value in figures.items():
        if value is None and "NN" in name:
            reasons[name] = f"only {counts['train']} training images"
        elif value is None and name != "linear":
            reasons[name] = "only one val image"
        elif value is not None and not math.isfinite(value):
            figures[name], reasons[name] = None, "all features are zero"
    return reasons


def measure(row: Opened, data: Data, recipe: Recipe, *, epochs: int) -> Row:
    """The figures of a row from its kept features and its network."""
    files, classes = _kept(row, data), len(data.train.classes)
    features, crops = (feature_cache.load(row.folder / name, **files[name]) for name in files)
    counts = {split: len(labels) for split, (_, labels) in features.items()}
    sweep, left_out = _sweep(row, features, recipe, num_classes=classes, epochs=epochs)
    best = linear_probe.best_rate(sweep) if sweep else None
    # They are normalized here, so the probe has had them before.
    figures = comparison.feature_figures(features, num_classes=classes)
    figures |= comparison.crop_figures(crops) | {"linear": sweep[best]["top1"] if best else None}
    network, batch = row.backbone.module, None
    left_out |= _reasons(figures, counts)
    figures |= {"images/s": None, "parameters": comparison.num_parameters(network)}
    if figures["parameters"]:
        sizes = {"batch_size": row.args.batch_size, "image_size": row.args.image_size}
        speed = comparison.images_per_second(network, device=row.args.device, **sizes)
        figures["images/s"], batch = speed
    record = build_evaluation.result_record(
        *(row.args, row.state),
        counts=counts | {"classes": classes},
        bad_images=data.bad_images,
        images={"train": data.train, "val": data.val},
    )
    encoder = result_files.encoder_of(record, what=row.name)
    more = {"lr": sweep, "best_lr": best, "epochs": epochs, "protocol": recipe.protocol}
    more |= {"k-NN": f"{knn.CMSF.words}; weighted: temperature {knn.CMSF.temperature}"}
    more |= {"images/s with batches of": batch}
    more |= {name: value for name, value in record.items() if name not in encoder._fields}
    images = ValImages(data.digests["val"], counts["val"], classes)
    return Row(figures, encoder, images, left_out, more)
