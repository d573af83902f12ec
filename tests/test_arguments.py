"""Types of flags' values: what they take, and errors that name it."""

import argparse

import pytest
import torch

from utils import arguments


@pytest.mark.parametrize("text", ["x", "0", "-3", "1.5", "inf", "nan", ""])
def test_numbers_out_of_range(text):
    with pytest.raises(argparse.ArgumentTypeError, match=text or "is no int"):
        arguments.positive(text)
    if text not in ("0", "1.5"):
        with pytest.raises(argparse.ArgumentTypeError):
            arguments.not_negative(text)


def test_devices():
    assert arguments.device("cpu") == torch.device("cpu")
    for text in ("meta", "cuda:99", "gpu", "xla"):
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            arguments.device(text)
