"""From a training script's flags to the objects it works with.

Each training script builds its run of these parts; what is its own (method, constraint) stays in
the script.
"""

import argparse
import hashlib
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from utils.cli import options
from utils.cli.build_evaluation import (
    build_bad_images,
    check_view_memory,
    eval_loaders,
    weights_flags,
)
from utils.data import archives
from utils.data.datasets import ImageSet, check_classes, read_split
from utils.data.image_cache import cache_images, check_memory
from utils.data.listing import is_folder
from utils.data.train_loader import TwoViewLoader
from utils.evaluation.knn import evaluate_knn, ks_for
from utils.method import batch_norm, checkpoint
from utils.method.encoders import (
    Backbone,
    QueryTargetEncoders,
    SoleBackbone,
    build_backbone,
    check_image_size,
)
from utils.method.memory_bank import MemoryBank
from utils.runtime import distributed, faiss_library, origin
from utils.runtime.errors import InputError, printable
from utils.training import run_folder
from utils.training.engine import Run


def _check_sizes(args: argparse.Namespace) -> None:
    """InputError for a batch without statistics, a bank too small for it or the neighbors."""
    each = args.batch_size // distributed.world_size()
    if args.batch_size < 2 or (each < 2 and args.bn != "sync"):
        of = f" of each of {distributed.world_size()} processes" if each < args.batch_size else ""
        raise InputError(f"--batch_size {args.batch_size}: batch norm needs at least 2 images{of}")
    bank = getattr(args, "mem_bank_size", None)
    if bank is None:
        return
    twice = getattr(args, "symmetric", False)
    if bank < args.batch_size * (1 + twice):
        raise InputError(
            f"--mem_bank_size {bank}: below {'twice ' * twice}--batch_size {args.batch_size}, so "
            "not every target would be in the bank"
        )
    for flag, value in vars(args).items():
        if flag.startswith("topk") and isinstance(value, int) and value > bank:
            raise InputError(f"--{flag} {value}: above --mem_bank_size {bank}")


def read_training_data(
    args: argparse.Namespace, *, labeled: bool = False
) -> tuple[ImageSet, ImageSet | None]:
    """The training images, and those of val/ for k-NN figures, None where there can be none.

    labeled: the method needs labels; otherwise images without one are added, where a set has such.
    InputError for flags that do not fit each other or the images: sizes of batch and bank, labels
    or k-NN figures that cannot be had, a run's folder among the images.
    """
    _check_sizes(args)
    _check_run_folder(args)
    train = read_split(args.data, "train", dataset=args.dataset, unlabeled=not labeled)
    if labeled and not train.classes:
        raise InputError(f"data {args.data}: labels need class folders in train/")
    if labeled and len(train.classes) == 1:
        raise InputError(f"data {args.data}: one class only, {train.classes[0]}; labels need two")
    if args.knn_freq < 0:
        return train, None
    reason = f"the training images have {'one class only' if train.classes else 'no classes'}"
    if len(train.classes) > 1:
        reason = f"{args.data} has no folder val/ with classes"
        if args.dataset in archives.NAMES or is_folder(args.data / "val"):
            val = read_split(args.data, "val", dataset=args.dataset)
            if val.classes:
                check_classes(train, val)
                user = f"--knn_freq {args.knn_freq} (k-NN figures)"
                faiss_library.load(user, otherwise="; --knn_freq -1 trains without k-NN figures")
                return train, val
    if args.knn_freq > 0:
        raise InputError(f"--knn_freq {args.knn_freq}: {reason}")
    print(f"no k-NN figures: {reason}", flush=True)
    return train, None


def _check_run_folder(args: argparse.Namespace) -> None:
    """InputError for a --checkpoint_path that the next reading of the images would find."""
    folder = Path(os.path.realpath(args.checkpoint_path))
    for images in (args.data / "train", args.data / "val"):
        inside = folder.is_relative_to(os.path.realpath(images))
        if inside and args.dataset not in archives.NAMES:
            flag = f"--checkpoint_path {args.checkpoint_path}"
            raise InputError(f"{flag}: lies in {images}, whose folders are classes of images")


def build_loader(
    args: argparse.Namespace, images: ImageSet, *, single: str | None = None
) -> TwoViewLoader:
    """The two-view loader of the training images, which are cached first if flags say so.

    single: "strong" or "weak" for one view of each image only. InputError for images that cannot be
    cached. Warns of a bank that is larger than what an epoch brings into it.
    """
    twice = getattr(args, "symmetric", False)
    if getattr(args, "mem_bank_size", 0) > len(images) * (1 + twice):
        above = f"above {'twice ' * twice}the {len(images)} training images"
        old = "some have several rows in the bank, the older ones of an earlier encoder"
        print(f"WARNING --mem_bank_size {args.mem_bank_size}: {above}: {old}", flush=True)
    bad_images = build_bad_images(args)
    batch = min(args.batch_size, len(images)) // distributed.world_size()
    check_view_memory(args, batch, views=1 if single else 2)
    if args.cache_images != "none":
        images = cache_images(
            images,
            args.cache_images,
            size=args.cache_size,
            num_workers=args.num_workers,
            device=args.device,
            bad_images=bad_images,
        )
    elif args.cache_size:
        raise InputError(f"--cache_size {args.cache_size}: only with --cache_images ram or device")
    groups = getattr(args, "multi_crop", None)
    return TwoViewLoader(
        images,
        batch_size=args.batch_size,
        image_size=args.image_size,
        weak_strong=getattr(args, "weak_strong", False),
        blur=args.blur,
        seed=args.seed,
        num_workers=args.num_workers,
        device=args.device,
        bad_images=bad_images,
        cut_on_device=args.cache_images == "device",
        single=single,
        symmetric=twice,
        **({"scale": groups[0].scale, "small": groups[1:]} if groups else {}),
    )


def build_encoders(args: argparse.Namespace) -> QueryTargetEncoders:
    """The encoders, seeded by --seed, filled from --weights if given; sets TF32 by --tf32.

    InputError for speed flags that the device cannot serve, or a --compile that does not work here.
    """
    backbone = _seeded_backbone(args)
    _say_without_batch_norm(args, backbone, has_heads=True)
    _check_encoder_memory(args, backbone.feature_dim)
    encoders = QueryTargetEncoders(
        backbone.module,
        backbone.feature_dim,
        proj_dim=args.proj_dim,
        hidden_dim=args.hidden_dim,
        proj_bn=args.proj_bn,
        momentum=args.momentum,
        shuffle_target=args.bn == "shuffle" and distributed.world_size() > 1,
        autocast=options.PRECISIONS[args.precision],
        channels_last=args.channels_last,
    )

    def fill(encoders: nn.Module, state: dict, what: str) -> str:
        which = {"prefix": args.prefix, "what": what}
        return checkpoint.load_initial_weights(encoders, backbone, state, **which)

    return _finished(args, encoders, fill)


def build_sole_backbone(args: argparse.Namespace) -> tuple[SoleBackbone, int]:
    """A backbone without projector and target, and its feature size; as `build_encoders`.

    Of a --weights checkpoint with a query encoder, that one's backbone is taken.
    """
    backbone = _seeded_backbone(args)
    _say_without_batch_norm(args, backbone, has_heads=False)
    sole = SoleBackbone(
        backbone.module,
        autocast=options.PRECISIONS[args.precision],
        channels_last=args.channels_last,
    )

    def fill(sole: nn.Module, state: dict, what: str) -> str:
        found = checkpoint.load_backbone(backbone, state, prefix=args.prefix, what=what)
        return f"backbone only ({found.words}); the classifier starts at random"

    return _finished(args, sole, fill), backbone.feature_dim


def _seeded_backbone(args: argparse.Namespace) -> Backbone:
    """The backbone with random weights by --seed; sets TF32 by --tf32, and checks speed flags."""
    _check_speed(args)
    # PyTorch's own default is TF32 for convolutions but not for products; here it is both or none.
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = args.tf32
    # All training steps have the same sizes, so that trying out kernels in the first one pays.
    torch.backends.cudnn.benchmark = not args.deterministic
    torch.manual_seed(args.seed)
    size = {"image_size": args.image_size}
    backbone = build_backbone(args.arch, small_stem=args.small_stem, **size)
    for group in getattr(args, "multi_crop", None) or []:
        check_image_size(backbone, args.arch, group.size, flag="--multi_crop: crops of side")
    check_image_size(backbone, args.arch, args.image_size)
    return backbone


def _say_without_batch_norm(
    args: argparse.Namespace, backbone: Backbone, *, has_heads: bool
) -> None:
    """Say so where the backbone has no batch norm, and what --bn is about then."""
    if batch_norm.is_in(backbone.module):
        return
    several = distributed.world_size() > 1
    if has_heads:
        said = "no batch norm in the backbone, only in projector and predictor"
        about = f", which is what --bn {args.bn} is about" * several
    else:
        said, about = "no batch norm in it", f", so --bn {args.bn} changes nothing" * several
    print(f"--arch {args.arch}: {said}{about}", flush=True)


def _check_speed(args: argparse.Namespace) -> None:
    """InputError for speed flags that do not go together or that this machine cannot serve."""
    can_bf16 = args.device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    if args.precision == "bf16" and not can_bf16:
        raise InputError("--precision bf16: this GPU has no instructions for bfloat16")
    if args.cuda_graphs and not (args.compile and args.device.type == "cuda"):
        missing = f"on a GPU, not on {args.device}" if args.compile else "with --compile"
        raise InputError(f"--cuda_graphs: only {missing}")
    if not args.compile:
        return
    try:
        torch.compile(torch.cos)(torch.zeros(2, device=args.device))
    except Exception as error:  # a compiler can fail in about any way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"--compile: does not work here ({reason})") from error


def _check_encoder_memory(args: argparse.Namespace, feature_dim: int) -> None:
    """InputError for a projector and predictor, or a bank, that do not fit into the memory."""
    dim = args.proj_dim or feature_dim // 4
    hidden = args.hidden_dim or 2 * feature_dim
    projector, predictor = hidden * (feature_dim + dim), 2 * hidden * dim
    check_memory(4 * (2 * projector + predictor), flags=f"--hidden_dim {hidden}, --proj_dim {dim}")
    for flag in ["mem_bank_size"] + ["sup_mem_bank_size"] * getattr(args, "cache_sup", False):
        rows = getattr(args, flag)
        check_memory(4 * rows * dim, flags=f"--{flag} {rows} (rows of {dim} numbers)")


def _finished(
    args: argparse.Namespace, network: nn.Module, fill: Callable[[nn.Module, dict, str], str]
) -> nn.Module:
    """The network with its batch norm, its weights by `fill`, which says what it took; compiled.

    A run that goes on from a checkpoint of its own needs no --weights.
    """
    if args.prefix is not None and not args.weights:
        raise InputError(f"--prefix {args.prefix}: no --weights is given")
    if args.bn == "sync":
        network = batch_norm.synchronized(network, args.device)
    goes_on = args.resume
    if goes_on == "auto":
        folder = args.checkpoint_path
        goes_on = folder.is_dir() and run_folder.checkpoints_in(folder)
    if args.weights and goes_on:
        print(f"--weights {args.weights}: not read, as --resume {args.resume} goes on", flush=True)
    elif args.weights:
        state = checkpoint.load(args.weights, flag="--weights")
        loaded = fill(network, state, weights_flags(args, state))
        print(printable(f"{args.weights}: {loaded}"), flush=True)
    if args.compile:
        network.compile(cuda_graphs=args.cuda_graphs)
    return network


def place(args: argparse.Namespace, model: nn.Module) -> nn.Module:
    """The method on the device of the flags, its bank in the precision that they ask for."""
    for module in model.modules():
        if isinstance(module, MemoryBank):
            module.store_as(options.BANK_PRECISIONS[args.bank_precision])
    return model.to(args.device)


def build_optimizer(args: argparse.Namespace, model: nn.Module) -> torch.optim.SGD:
    """SGD over everything that has a gradient, weight decay on all of it, as published.

    On a GPU all of it is one kernel.
    """
    return torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad],
        lr=args.learning_rate,
        momentum=args.sgd_momentum,
        weight_decay=args.weight_decay,
        fused=True if args.device.type == "cuda" else None,
    )


def build_run(
    args: argparse.Namespace,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    loader: TwoViewLoader,
    val: ImageSet | None,
    labeled: np.ndarray | None = None,
    given: np.ndarray | None = None,
) -> Run:
    """The run that the flags describe on the loader's images; val: for k-NN figures, or None.

    labeled: numbers of the images whose labels are used, where it is not all or none. given: labels
    to train with, where they are not those of the images. For the demo data the untrained network
    and raw pixels are measured first, to compare with.
    """
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
        torch.use_deterministic_algorithms(True)
    if distributed.rank():  # dropout; what has been drawn so far is the same in all processes
        torch.manual_seed(args.seed + distributed.rank())
    evaluate, untrained = None, {}
    if val is not None:
        backbone = model.encoders.query_encoder.backbone
        evaluate, untrained = _build_evaluation(args, backbone, loader, val)
    images, data = loader.images, {"training images or classes": loader.images.digest()}
    for name, values in (("labeled images", labeled), ("given labels", given)):
        if values is not None:
            data[name] = hashlib.sha256(values.tobytes()).hexdigest()
    return Run(
        args,
        model,
        optimizer,
        data=data,
        about=origin.of_start(args.device) | _about_images(images, val, labeled),
        evaluate=evaluate,
        compare_with=untrained,
        num_images=len(images),
        num_classes=len(images.classes),
    )


def _build_evaluation(
    args: argparse.Namespace, backbone: nn.Module, loader: TwoViewLoader, val: ImageSet
) -> tuple[Callable[[], dict | None], dict[str, dict]]:
    """What measures the backbone's k-NN figures, and for the demo data those to compare with."""
    train = loader.images
    if (train.labels < 0).any():
        train = train.take(np.flatnonzero(train.labels >= 0))
    train_loader, val_loader = eval_loaders(args, train, val, bad_images=loader.bad_images)
    knn = partial(evaluate_knn, train=train_loader, val=val_loader, ks=ks_for(len(train)))
    untrained = {}
    if args.demo and not args.weights:
        untrained = {"raw pixels": knn(nn.Flatten()), "random network": knn(backbone)}
    found = {name: figures for name, figures in untrained.items() if figures}  # the main process'
    return partial(knn, backbone), found


def _about_images(train: ImageSet, val: ImageSet | None, labeled: np.ndarray | None) -> dict:
    """How many images and classes there are, and what lies among the files and is not used."""
    sets = {"train": train} | ({} if val is None else {"val": val})
    counts = {"classes": len(train.classes)} | {name: len(images) for name, images in sets.items()}
    if labeled is not None:
        counts["labeled"] = len(labeled)
    left_out = {name: images.left_out.record() for name, images in sets.items()}
    return {"counts": counts, "left_out": left_out}


def start_run(
    args: argparse.Namespace,
    model: nn.Module,
    images: ImageSet,
    val: ImageSet | None,
    *,
    single: str | None = None,
    **labels: np.ndarray | None,
) -> tuple[Run, TwoViewLoader]:
    """The run of a method and its loader; single as of `build_loader`, labels as of `build_run`."""
    loader = build_loader(args, images, single=single)
    model = place(args, model)
    optimizer = build_optimizer(args, model)
    return build_run(args, model, optimizer, loader=loader, val=val, **labels), loader
