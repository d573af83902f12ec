"""What a step of each method costs, relative to MSF.

    python tests/benchmarks/cost.py [--rounds 20]
    python tests/benchmarks/cost.py --arch resnet18 --image_size 64 --bank 16000 --rounds 5

The methods' own modules and `Run`'s update, on views that are ready; of the demo's sizes unless
told otherwise. All methods take a step in turn, so that what else the machine does falls on all;
medians of each round's ratio to MSF, with the lowest and the highest. Not in it: loading images
(further crops cost there too), k-means and head rounds between steps.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import normalize

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from self_supervised.train_msf import MSF
from self_supervised.train_msf_2q import CMSF2Q
from self_supervised.train_msf_km import CMSFKM
from semi_supervised.pseudo_label import PseudoLabelHead
from semi_supervised.train_pseudo_cmsf import PseudoCMSF
from supervised.train_sup_msf import SupervisedCMSF
from supervised.train_sup_xent import CrossEntropy
from utils.cli import options
from utils.data.batches import Batch
from utils.method.encoders import QueryTargetEncoders, SoleBackbone, build_backbone

IMAGES, CLASSES = 2000, 10
SMALL_CROPS = 4  # of half the size


def encoders(args: argparse.Namespace) -> QueryTargetEncoders:
    backbone = build_backbone(args.arch, image_size=args.image_size)
    sizes = {"proj_dim": args.proj_dim, "hidden_dim": args.hidden_dim}
    sizes["channels_last"] = True  # as the scripts on a CPU
    return QueryTargetEncoders(backbone.module, backbone.feature_dim, **sizes)


def build_2q(args: argparse.Namespace) -> nn.Module:
    model = CMSF2Q(encoders(args), IMAGES, mem_bank_size=args.bank, topk=5, topkp=5)
    model.previous.seen.fill_(True)
    model.previous.embeddings.copy_(normalize(torch.randn(IMAGES, model.encoders.proj_dim), dim=1))
    return model


def build_km(args: argparse.Namespace) -> nn.Module:
    model = CMSFKM(encoders(args), IMAGES, mem_bank_size=args.bank, topk=5, num_clusters=100)
    model.clusters.copy_(torch.randint(100, (IMAGES,)))
    return model


def build_pseudo(args: argparse.Namespace) -> nn.Module:
    both = encoders(args)
    head = PseudoLabelHead("mlp", both.proj_dim, CLASSES)
    labeled = torch.arange(IMAGES) % 10 == 0
    flags = {"topk": 50, "topk_plain": 1, "conf_th": 0.5, "cache_size": 512}
    return PseudoCMSF(both, head, labeled, mem_bank_size=args.bank, **flags)


def build_xent(args: argparse.Namespace) -> nn.Module:
    backbone = build_backbone(args.arch, image_size=args.image_size)
    sole = SoleBackbone(backbone.module, channels_last=True)
    return CrossEntropy(sole, backbone.feature_dim, CLASSES)


METHODS: dict[str, Callable[[argparse.Namespace], nn.Module]] = {
    "MSF": lambda args: MSF(encoders(args), mem_bank_size=args.bank, topk=5),
    "BYOL, one-sided": lambda args: MSF(encoders(args), mem_bank_size=args.bank, topk=1),
    "CMSF-KM": build_km,
    "CMSF-2Q": build_2q,
    "CMSF-2Q, symmetric": build_2q,
    "CMSF-2Q, multi-crop": build_2q,
    "semi-supervised": build_pseudo,
    "supervised": lambda args: SupervisedCMSF(
        encoders(args), CLASSES, mem_bank_size=args.bank, topk=20
    ),
    "supervised, top-all": lambda args: SupervisedCMSF(
        encoders(args), CLASSES, mem_bank_size=args.bank, topk=None
    ),
    "cross-entropy": build_xent,
}


def make_batch(name: str, args: argparse.Namespace) -> Batch:
    """Views of noise as the loader would give them for a method."""
    count = args.batch * (2 if "symmetric" in name else 1)
    index = torch.randperm(IMAGES)[: args.batch].repeat_interleave(count // args.batch)
    views = (torch.randn(count, 3, args.image_size, args.image_size) for _ in "qt")
    small = ()
    if "multi-crop" in name:
        side = args.image_size // 2
        small = (torch.randn(SMALL_CROPS, args.batch, 3, side, side),)
    return Batch(*views, index, index % CLASSES, small)


def step_of(name: str, args: argparse.Namespace) -> Callable[[], None]:
    """A whole step of a method whose bank is full."""
    model, batch = METHODS[name](args), make_batch(name, args)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.01, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        loss, _ = model(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    if hasattr(model, "bank"):
        fill(model, args)
    return step


def fill(model: nn.Module, args: argparse.Namespace) -> None:
    """Random unit vectors in every row of the bank, with labels and previous embeddings."""
    bank = model.bank
    rows = normalize(torch.randn(args.bank, model.encoders.proj_dim), dim=1)
    index = torch.randint(IMAGES, (args.bank,))
    columns = {"index": index, "label": index % CLASSES, "true_label": index % CLASSES}
    columns |= {"previous": rows.flip(0), "has_previous": torch.ones(args.bank, dtype=torch.bool)}
    own = dict(bank.named_buffers()).keys()
    bank.enqueue(rows, **{name: column for name, column in columns.items() if name in own})


def main() -> None:
    """Print a line for each method."""
    demo = options.DEMO
    parser = argparse.ArgumentParser()
    parser.add_argument("--arch", default=demo["arch"])
    for name, default in (
        ("image_size", demo["image_size"]),
        ("batch", demo["batch_size"]),
        ("bank", demo["mem_bank_size"]),
        ("rounds", 20),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    is_demo = args.arch == demo["arch"]
    args.proj_dim = demo["proj_dim"] if is_demo else None
    args.hidden_dim = demo["hidden_dim"] if is_demo else None
    torch.set_num_threads(1)
    torch.manual_seed(0)
    steps = {name: step_of(name, args) for name in METHODS}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(args.rounds + 1):
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name].append(time.process_time() - start)
    print(
        f"{args.arch}, {args.image_size} px, B {args.batch}, K {args.bank}, n {args.rounds}, "
        "CPU seconds of one thread"
    )
    base = seconds["MSF"][1:]
    for name, times in seconds.items():
        ratios = [own / msf for own, msf in zip(times[1:], base, strict=True)]
        middle = 1000 * statistics.median(times[1:])
        print(
            f"{name:22}{middle:9.1f} ms  {statistics.median(ratios):5.2f} x MSF "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
