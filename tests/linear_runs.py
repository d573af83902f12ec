"""A checkpoint to evaluate, and what eval_linear saved, for the tests of several files."""

import torch

from utils.method.encoders import QueryTargetEncoders, build_backbone

QUICK = ("-j", 0, "-b", 9, "--epochs", 3, "--lr", 0.1, "--lr_schedule", "1,2")


def write_checkpoint(path, *, seed=0):
    """A checkpoint as training writes it, whose target encoder is not the query encoder."""
    torch.manual_seed(seed)
    encoders = QueryTargetEncoders(build_backbone("conv4").module, 128)
    for parameter in encoders.target_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state = {f"encoders.{name}": value for name, value in encoders.state_dict().items()}
    settings = {"arch": "conv4", "image_size": 16}
    torch.save({"state_dict": state, "epoch": 7, "args": settings}, path)
    return path


def load(folder):
    return torch.load(folder / "linear.pth", weights_only=True)


def tensors(value, name=""):
    """Every leaf of a saved run by its place in it."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in items for k, v in tensors(part, f"{name}/{key}").items()}
    return {name: value}


def assert_same_bits(one, two):
    one, two = tensors(one), tensors(two)
    assert one.keys() == two.keys()
    for name, value in one.items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(value, two[name]), name
