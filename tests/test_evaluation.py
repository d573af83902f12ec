"""From an evaluation script's flags to the encoder."""

import importlib
import sys

import torch
import torchvision

from utils import evaluation

KNN = importlib.import_module("eval.eval_knn")


def test_evaluated_backbones(monkeypatch, tmp_path):
    def evaluated(*flags):
        monkeypatch.setattr(sys, "argv", ["eval_knn.py", *map(str, flags), str(tmp_path)])
        return evaluation.evaluated_backbone(KNN.parse_args())

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
