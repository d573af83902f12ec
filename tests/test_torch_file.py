"""Files of torch.save: what is read, and what is said of what is not, in one plain line."""

import collections
import os
import pickle
import re

import numpy as np
import pytest
import torch
import torchvision

from utils.method import checkpoint
from utils.runtime import torch_file
from utils.runtime.errors import DamagedError, InputError


class Own:
    """A class that no other process knows."""


@pytest.mark.parametrize(
    ("content", "name"),
    [
        (torchvision.models.resnet18(), "torchvision.models.resnet.ResNet"),
        ({"state_dict": {}, "best_acc1": np.float64(71.3)}, "numpy._core.multiarray.scalar"),
        ({"opt": Own()}, f"{__name__}.Own"),
        ({"opt": eval}, "eval"),
        ({"opt": collections.defaultdict(int)}, "collections.defaultdict"),
        ({"opt": os.getcwd}, "posix.getcwd"),
    ],
)
def test_what_is_not_let_in_is_named(tmp_path, content, name):
    path = tmp_path / "whole.pth"
    torch.save(content, path)
    with pytest.raises(InputError) as error:
        checkpoint.load(path, flag="--weights")
    assert str(error.value).replace("numpy.core", "numpy._core") == (
        f"--weights {path}: holds {name}, a pickled object; only tensors and plain values are read "
        "(save its state_dict())"
    )
    assert not isinstance(error.value, DamagedError)  # no older file may silently take its place


# What torch says, as 2.11 and 2.14 word it, behind its advice.
ADVICE = "Weights only load failed. This file can still be loaded, \x1b[1mdo those steps\x1b[0m. "
WORDS = [
    ("GLOBAL a.B was not an allowed global by default. Please use", "a.B"),
    ("Trying to load unsupported GLOBAL os.system whose module os is blocked.", "os.system"),
    ("Unsupported class a.B", "a.B"),
    (
        "Can only create new object for nn.Parameter or classes allowlisted via "
        "`add_safe_globals` but got <class 'a.B'>",
        "a.B",
    ),
    (
        "Can only build Tensor, Parameter, OrderedDict or types allowlisted via "
        "`add_safe_globals`, but got <class 'a.B'>",
        "a.B",
    ),
    ("Trying to call reduce for unrecognized function a.b", "a.b"),
    ("``torch.distributed.tensor`` must be imported to load DTensors", "DTensors"),
    ("Unsupported operand 149", None),
]


@pytest.mark.parametrize(("words", "name"), WORDS)
def test_words_of_torch(tmp_path, monkeypatch, words, name):
    path = tmp_path / "x.pth"
    torch.save({}, path)

    def fail(*_, **__):
        raise pickle.UnpicklingError(
            f"{ADVICE}\n\t(1) In PyTorch 2.6\n\tWeightsUnpickler error: {words}\n\nCheck the doc"
        )

    monkeypatch.setattr(torch, "load", fail)
    with pytest.raises(InputError) as error:
        checkpoint.load(path, flag="--weights")
    expected = f"holds {name}, a pickled" if name else f"not a readable checkpoint ({words})"
    assert str(error.value).startswith(f"--weights {path}: {expected}")
    assert str(error.value).isprintable()


def test_a_name_out_of_a_file_is_one_short_line():
    assert torch_file.one_line("layer1.0.conv1.weight") == "layer1.0.conv1.weight"
    assert torch_file.one_line("a\nb\x1b[1m") == r"a\nb\x1b[1m"
    assert torch_file.one_line("é") == "é"
    assert torch_file.one_line("x" * 100) == "x" * 77 + "..."


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda v: v.to_sparse(), "sparse"),
        (lambda v: v.to_sparse_csr(), "sparse"),
        (lambda v: v.to("meta"), r"without data (meta)"),
        (lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8), "quantized"),
        (lambda v: torch.nested.nested_tensor([v, v[:1]]), "nested"),
        (lambda v: v.to(torch.complex64), "complex64"),
        (lambda v: v.to(torch.float8_e4m3fn), "float8_e4m3fn"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_weights_that_no_network_takes_are_named(tmp_path, make, words):
    path = tmp_path / "odd.pth"
    weights = torchvision.models.resnet18().state_dict()
    torch.save(dict(weights) | {"fc.weight": make(weights["fc.weight"])}, path)
    state = checkpoint.load(path, flag="--weights")
    with pytest.raises(InputError, match=re.escape(f"x: weight fc.weight is {words}")):
        checkpoint.encoder_weights(state, "fc", what="x")


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
