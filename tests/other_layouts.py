"""Checkpoints as other methods and libraries lay them out, made of small networks."""

from functools import cache

import torch
import torchvision
from torch import nn
from torch.optim.swa_utils import AveragedModel

from utils.method import checkpoint
from utils.method.encoders import build_backbone


@cache
def network(seed=1, *, small_stem=False, arch="resnet18"):
    """A ResNet whose batch norms have statistics of their own; without its last layer."""
    torch.manual_seed(seed)
    module = build_backbone(arch, small_stem=small_stem).module
    for name, value in module.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            value.normal_(std=0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2)
    return module


def named(module, prefix=""):
    return {prefix + name: value for name, value in module.state_dict().items()}


def head(prefix, *sizes):
    """A multilayer perceptron with batch norm, as projectors, predictors and classifiers are."""
    layers = [layer for n in sizes for layer in (nn.Linear(n, n), nn.BatchNorm1d(n), nn.ReLU())]
    return named(nn.Sequential(*layers), prefix)


def numbered(module, prefix=""):
    return named(nn.Sequential(*list(module.children())[:-1]), prefix)


def without_pooling(module, prefix=""):
    """As SimCLR for CIFAR takes the children of a network."""
    some = [layer for layer in module.children() if not isinstance(layer, nn.Identity)]
    return named(nn.Sequential(*some), prefix)


def as_for_cifar(module, prefix=""):
    return {name.replace("downsample", "shortcut"): v for name, v in named(module, prefix).items()}


def vissl(student):
    trunk = named(student, "_feature_blocks.")
    model = {"trunk": trunk, "heads": head("0.clf.", 4)}
    return {"phase_idx": 3, "classy_state_dict": {"base_model": {"model": model, "meta": {}}}}


def simsiam(student):
    """https://github.com/facebookresearch/simsiam: DistributedDataParallel, projector as fc."""
    state = named(student, "module.encoder.") | head("module.encoder.fc.", 8, 8)
    state |= head("module.predictor.", 8)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1).state_dict()
    return {"epoch": 100, "arch": "resnet18", "state_dict": state, "optimizer": optimizer}


def dino(student, teacher):
    state = {"student": named(student, "module.backbone.") | head("module.head.mlp.", 8)}
    state["teacher"] = named(teacher, "backbone.") | head("head.mlp.", 8)
    return state | {"epoch": 7, "dino_loss": {"center": torch.zeros(1, 8)}}


def moco(student, teacher):
    state = named(student, "module.encoder_q.") | named(teacher, "module.encoder_k.")
    state |= head("module.encoder_q.fc.", 8) | head("module.encoder_k.fc.", 8)
    return {"state_dict": state | {"module.queue": torch.zeros(8, 64)}}


def moco_v3(student, teacher):
    state = named(student, "module.base_encoder.") | named(teacher, "module.momentum_encoder.")
    return {"state_dict": state | head("module.base_encoder.fc.", 8) | head("module.predictor.", 8)}


def byol(student, teacher):
    """lucidrains' byol-pytorch: the network stands there twice, alone and in the online encoder."""
    state = named(student, "net.") | named(student, "online_encoder.net.")
    state |= named(teacher, "target_encoder.net.") | head("online_encoder.projector.", 8)
    return state | head("target_encoder.projector.", 8) | head("online_predictor.", 8)


def solo_learn(student, teacher):
    state = named(student, "backbone.") | named(teacher, "momentum_backbone.")
    state |= head("projector.", 8) | head("momentum_projector.", 8) | head("classifier.", 8)
    loops = {"fit_loop": {"state_dict": {}}}
    about = {"pytorch-lightning_version": "1.9.0", "global_step": 10, "loops": loops}
    return about | {"state_dict": state | {"queue": torch.zeros(2, 8, 64)}}


def with_average(student, teacher):
    """What torch.optim.swa_utils.AveragedModel gives, beside the model."""
    return {"model": named(student), "model_ema": AveragedModel(teacher).state_dict()}


# By name: what makes the file of a network, the prefix it then has, and what is left aside.
ONE = {
    "torchvision": (lambda m: torchvision_file(m), "", ["fc"]),
    "torch.compile": (lambda m: torch.compile(m).state_dict(), "", []),
    "SimSiam": (simsiam, "state_dict.encoder", ["fc"]),
    "SwAV": (
        lambda m: (
            named(m, "module.")
            | head("module.projection_head.", 8)
            | {"module.prototypes.weight": HEAD}
        ),
        "",
        ["projection_head", "prototypes"],
    ),
    "VISSL": (vissl, "classy_state_dict.base_model.model.trunk._feature_blocks", []),
    "numbered": (lambda m: {"net": numbered(m, "f.") | head("g.", 8)}, "net.f", []),
    "SupCon": (
        lambda m: {"model": as_for_cifar(m, "encoder.module.") | head("head.", 8), "epoch": 3},
        "model.encoder",
        [],
    ),
    "SimCLR for CIFAR": (lambda m: without_pooling(m, "f.") | head("g.", 8), "f", []),
}
# By name: what makes the file of a student and a teacher, and the prefixes of both.
TWO = {
    "DINO": (dino, "student.backbone", "teacher.backbone"),
    "MoCo": (moco, "state_dict.encoder_q", "state_dict.encoder_k"),
    "MoCo v3": (moco_v3, "state_dict.base_encoder", "state_dict.momentum_encoder"),
    "BYOL": (byol, "net", "target_encoder.net"),
    "solo-learn": (solo_learn, "state_dict.backbone", "state_dict.momentum_backbone"),
    "averaged": (with_average, "model", "model_ema"),
}
SMALL_STEM = ("SupCon", "SimCLR for CIFAR")
HEAD = torch.ones(5, 8)


def changed(table, change):
    """The tables with every tensor changed by its name, or without it if that gives None."""
    inner = {
        name: changed(value, change) if isinstance(value, dict) else change(str(name), value)
        for name, value in table.items()
    }
    return {name: value for name, value in inner.items() if value is not None}


def torchvision_file(module):
    model = torchvision.models.resnet18()
    model.load_state_dict(named(module) | named(model.fc, "fc."))
    return model.state_dict()


@cache
def _backbone(*, small_stem):
    return build_backbone("resnet18", small_stem=small_stem)


def read(state, module, **which):
    """The weights that are loaded of a checkpoint, and where they stood."""
    backbone = _backbone(small_stem=module.conv1.kernel_size == (3, 3))
    for value in backbone.module.state_dict().values():
        value.zero_()
    found = checkpoint.load_backbone(backbone, state, what="--weights x", **which)
    return {name: value.clone() for name, value in backbone.module.state_dict().items()}, found


def assert_same(weights, module):
    expected = module.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())
