"""From an evaluation script's flags to the encoder."""

import argparse
import copy
import importlib
import sys

import torch
import torchvision

from utils.cli import build_evaluation
from utils.method.encoders import QueryTargetEncoders, build_backbone

KNN = importlib.import_module("eval.eval_knn")


def test_evaluated_backbones(monkeypatch, tmp_path):
    def evaluated(*flags):
        monkeypatch.setattr(sys, "argv", ["eval_knn.py", *map(str, flags), str(tmp_path)])
        return build_evaluation.evaluated_backbone(KNN.parse_args())

    torch.manual_seed(0)
    state = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(state, tmp_path / "plain.pth")
    flags = ("--arch", "resnet18", "--image_size", 32)
    backbone, checkpoint = evaluated(*flags, "--weights", tmp_path / "plain.pth")
    assert torch.equal(backbone.module.conv1.weight, state["conv1.weight"]) and checkpoint
    one, other = (evaluated(*flags, "--weights", "random", "--seed", seed) for seed in (1, 2))
    assert not torch.equal(one[0].module.conv1.weight, other[0].module.conv1.weight)
    pixels, nothing = evaluated(*flags, "--weights", "pixels")
    assert pixels.module(torch.zeros(2, 3, 32, 32)).shape == (2, pixels.feature_dim)
    assert nothing == {}


def test_a_backbone_lies_as_in_training():
    """On a CPU, so that features have the bits of those in training; elsewhere as it is."""
    torch.manual_seed(0)
    alone = build_backbone("conv4").module
    encoders = QueryTargetEncoders(copy.deepcopy(alone), 128, channels_last=True)
    trained, images = encoders.query_encoder.backbone.eval(), torch.randn(8, 3, 32, 32)
    placed = build_evaluation.place(argparse.Namespace(device=torch.device("cpu")), alone.eval())
    with torch.no_grad():
        assert torch.equal(placed(images), trained(images))
    layout = {"memory_format": torch.channels_last}
    assert placed.features[4].weight.is_contiguous(**layout)
    other = copy.deepcopy(build_backbone("conv4").module)
    there = build_evaluation.place(argparse.Namespace(device=torch.device("meta")), other)
    assert not there.features[4].weight.is_contiguous(**layout)
