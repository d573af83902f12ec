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


def test_an_error_is_one_line(capsys):
    parser = arguments.Parser(prog="script.py")
    parser.add_argument("--epochs", type=arguments.positive)
    for text, shown in (("1\n2", r"1\n2"), ("\x1b[2J", r"\x1b[2J"), ("\udce9", r"\xe9")):
        with pytest.raises(SystemExit) as end:
            parser.parse_args(["--epochs", text])
        expected = f"script.py: error: argument --epochs: {shown} is no int\n"
        assert (end.value.code, capsys.readouterr().err) == (2, expected)


def test_devices():
    assert arguments.device("cpu") == torch.device("cpu")
    for text in ("meta", "cuda:99", "gpu", "xla"):
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            arguments.device(text)
