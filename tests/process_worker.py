"""What `test_distributed` starts under torchrun: runs of regimes in float64 on real image files.

    torchrun --nproc_per_node=2 tests/process_worker.py REGIME,... DATA FOLDER BN,... [FLAG ...]

Flags: --resume, --corrupt, --spoil. The main process writes FOLDER/BN/REGIME/record.pth: losses of
the global batch, the order of the images, and the bank and previous embeddings at the end.
"""

import itertools
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import tiny

from self_supervised.train_msf import MSF
from self_supervised.train_msf_2q import CMSF2Q
from self_supervised.train_msf_km import CMSFKM
from semi_supervised.pseudo_label import PseudoLabelHead, train_head
from semi_supervised.train_pseudo_cmsf import PseudoCMSF
from supervised.train_sup_msf import SupervisedCMSF
from supervised.train_sup_xent import CrossEntropy
from utils.data.cropping import CropGroup
from utils.data.datasets import ImageSet, read_split
from utils.data.train_loader import TwoViewLoader
from utils.method import batch_norm
from utils.method.encoders import QueryTargetEncoders, SoleBackbone
from utils.runtime import distributed, script
from utils.training.engine import Run

SIZE, BATCH, STEPS = 8, 6, 30


def build_backbone() -> nn.Module:
    """A small convolutional network."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.BatchNorm2d(4), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(4 * 4 * 4, 8), nn.BatchNorm1d(8), nn.ReLU()),
    )


def build_encoders(bn: str, *, sole: bool) -> QueryTargetEncoders | SoleBackbone:
    """Encoders on that network, or the network alone."""
    backbone, shuffle = build_backbone(), bn == "shuffle" and distributed.world_size() > 1
    if sole:
        encoders = SoleBackbone(backbone)
    else:
        sizes = {"proj_dim": 4, "momentum": 0.9, "shuffle_target": shuffle}
        encoders = QueryTargetEncoders(backbone, 8, **sizes)
    return batch_norm.synchronized(encoders, torch.device("cpu")) if bn == "sync" else encoders


def build_model(regime: str, images: ImageSet, bn: str) -> nn.Module:
    """A regime's method with a bank of a size that no batch divides."""
    encoders = build_encoders(bn, sole=regime == "cross-entropy")
    if regime == "cross-entropy":
        model = CrossEntropy(encoders, 8, 3)
    elif regime == "MSF":
        model = MSF(encoders, mem_bank_size=19, topk=3)
    elif regime == "2Q of more crops":  # a bank of whole pairs: their previous embeddings tie
        model = CMSF2Q(encoders, len(images), mem_bank_size=24, topk=3, topkp=4)
    elif regime == "2Q":
        model = CMSF2Q(encoders, len(images), mem_bank_size=19, topk=3, topkp=4)
    elif regime == "KM":
        model = CMSFKM(encoders, len(images), mem_bank_size=19, topk=3, num_clusters=6)
    elif regime == "supervised":
        model = SupervisedCMSF(encoders, 3, mem_bank_size=19, topk=3)
    else:
        labeled = torch.arange(len(images)) % 2 == 0
        sizes = {"mem_bank_size": 19, "topk": 3, "cache_size": 11, "conf_th": 0.4}
        model = PseudoCMSF(encoders, PseudoLabelHead("mlp", 4, 3), labeled, **sizes)
    return model.double()


def train(
    run: Run, loader: TwoViewLoader, *, record: dict[str, list[Tensor]], flags: list[str]
) -> None:
    """All steps, in float64; clusters and the semi-supervised head follow at each epoch's end.

    --corrupt: one number of one process' bank changes, as by a fault of memory. --spoil: one of its
    targets is nan.
    """
    for batch in run.batches(loader):
        names = ("query_view", "target_view")
        views = {name: getattr(batch, name).double() for name in names}
        small = tuple(view.double() for view in batch.small_views)
        if "--spoil" in flags and run.total_steps == 7 and distributed.rank() == 1:
            views["target_view"][0] = torch.nan
        loss, stats = run.forward(batch._replace(small_views=small, **views))
        run.step(loss, stats)
        if "--corrupt" in flags and run.total_steps == 8 and distributed.rank() == 1:
            run.model.bank.features[2, 1] += 1e-12
        record["losses"].append(sum(distributed.gather(loss[None])[0]) / distributed.world_size())
        record["order"].append(distributed.gather(batch.index)[0])
        at_end = run.epoch_step == run.epoch_steps
        if hasattr(run.model, "refit") and at_end:
            run.model.refit(seed=[run.total_steps])
        if hasattr(run.model, "head") and at_end:
            rows, labels = run.model.cache.in_use("features", "label")
            train_head(
                *(run.model.head, rows, labels),
                **{"epochs": 2, "batch_size": 4, "learning_rate": 0.1, "decay_epochs": []},
                **{"momentum": 0.9, "weight_decay": 0, "seed": [run.total_steps]},
            )


def run_regime(regime: str, images: ImageSet, folder: Path, bn: str, flags: list[str]) -> None:
    """One run."""
    crops = {
        "cross-entropy": {"single": "weak"},
        "2Q of more crops": {"symmetric": True, "small": [CropGroup(2, SIZE, (0.1, 0.4))]},
    }.get(regime, {})
    loader = TwoViewLoader(
        images, batch_size=BATCH, image_size=SIZE, weak_strong=True, seed=1, **crops
    )
    model = build_model(regime, images, bn)
    trained = [p for p in model.parameters() if p.requires_grad]
    args = tiny.run_args(
        folder,
        **{"epochs": STEPS // len(loader), "learning_rate": 0.1, "lr_decay_epochs": [1, 2, 3]},
        **{"save_minutes": 1e-6, "resume": "auto" if "--resume" in flags else None},
        print_freq=2,
    )
    run = Run(args, model, torch.optim.SGD(trained, lr=0.1, momentum=0.9))
    record = {"losses": [], "order": []}
    with run:
        train(run, loader, record=record, flags=flags)
    kept = model.bank.buffers() if hasattr(model, "bank") else model.parameters()
    own_bank = torch.cat([value.double().flatten() for value in kept])
    (banks,) = distributed.gather(own_bank[None])
    state = model.state_dict()
    if distributed.is_main():
        kinds = ("bank", "previous", "clusters", "cache", "running", "weight")
        names = [name for name in state if any(kind in name for kind in kinds)]
        record = {name: torch.stack(values) for name, values in record.items() if values}
        record |= {name: state[name] for name in names} | {"banks": banks}
        torch.save(record, folder / "record.pth")


def main() -> None:
    """A run of each regime with each batch norm."""
    regimes, data, folder, norms, *flags = sys.argv[1:]
    distributed.start(torch.device("cpu"))
    images = read_split(Path(data), "train")
    for bn, regime in itertools.product(norms.split(","), regimes.split(",")):
        run_regime(regime, images, Path(folder) / bn / regime, bn, flags)


if __name__ == "__main__":
    script.run_script(main)
