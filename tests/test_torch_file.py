"""Files of torch.save: what is read, and what is said of what is not, in one plain line."""

import collections
import os
import re

import numpy as np
import pytest
import torch
import torchvision

from utils.method import checkpoint
from utils.method.encoders import build_backbone
from utils.runtime import torch_file
from utils.runtime.errors import DamagedError, InputError


class Own:
    """A class that no other process knows."""


@pytest.mark.parametrize(
    "content",
    [
        torchvision.models.resnet18(),
        {"state_dict": {}, "best_acc1": np.float64(71.3)},
        {"opt": Own()},
        {"opt": eval},
        {"opt": collections.defaultdict(int)},
        {"opt": os.getcwd},
    ],
)
def test_what_is_not_let_in(tmp_path, content):
    path = tmp_path / "whole.pth"
    torch.save(content, path)
    with pytest.raises(InputError) as error:
        checkpoint.load(path, flag="--weights")
    reason = (
        r"a pickled object; only tensors and plain values are read\. If you trust it, save its "
    )
    assert re.match(rf"--weights {path}: holds ([\w.]+, )?{reason}weights: ", str(error.value))
    assert str(error.value).isprintable()
    assert not isinstance(error.value, DamagedError)  # no older file may silently take its place


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_refused(tmp_path):
    path = tmp_path / "script.pth"
    torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.zeros(1, 2)), path)
    with pytest.raises(InputError, match=f"--weights {path}: a TorchScript program; .*jit.load"):
        checkpoint.load(path, flag="--weights")


def test_a_name_out_of_a_file_is_one_short_line():
    assert torch_file.one_line("layer1.0.conv1.weight") == "layer1.0.conv1.weight"
    assert torch_file.one_line("a\nb\x1b[1m") == r"a\nb\x1b[1m"
    assert torch_file.one_line("é") == "é"
    assert torch_file.one_line("x" * 100) == "x" * 77 + "..."


@pytest.mark.parametrize(
    "make",
    [
        lambda v: v.to_sparse(),
        lambda v: v[None].to_sparse_csr(),
        lambda v: v.to("meta"),
        lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8),
        lambda v: torch.nested.nested_tensor([v, v[:1]]),
        lambda v: v.to(torch.complex64),
        lambda v: v.to(torch.float8_e4m3fn),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_weights_that_no_network_takes_are_named(tmp_path, make):
    path = tmp_path / "odd.pth"
    weights = torchvision.models.resnet18().state_dict()
    torch.save(dict(weights) | {"bn1.weight": make(weights["bn1.weight"])}, path)
    state = checkpoint.load(path, flag="--weights")
    with pytest.raises(InputError, match="x: .* 1 weights of another type, first bn1.weight"):
        checkpoint.load_backbone(build_backbone("resnet18"), state, what="x")


def test_what_is_finite():
    for right in (torch.full((9,), 3e38), torch.full((9,), 6e4).half(), torch.zeros(0), [1, 2]):
        assert torch_file.is_finite(torch.as_tensor(right))
    for wrong in ([torch.inf, 0], [torch.inf, -torch.inf], [3e38, 3e38, torch.nan]):
        assert not torch_file.is_finite(torch.tensor(wrong))


def test_kinds_of_tensors():
    rows = torch_file.tensor("(n,)", torch_file.between(-1, 2), dims=1, dtype=torch.int64)
    assert rows.holds(torch.tensor([-1, 2])) and rows.holds(torch.zeros(0, dtype=torch.int64))
    for wrong in ([3], [-2], [[1]], [1.0], [True]):
        assert not rows.holds(torch.tensor(wrong))
    assert not rows.holds([1])
    finite = torch_file.tensor("(n, D)", torch_file.is_finite, dims=2)
    assert finite.holds(torch.zeros(2, 3).half())
    for wrong in (torch.full((2, 2), torch.inf), torch.zeros(2), torch.zeros(1, 1).expand(9, 9)):
        assert not finite.holds(wrong)
