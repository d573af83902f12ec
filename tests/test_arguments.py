"""Types of flags' values: what they take, and errors that name it."""

import argparse
import ast
import importlib
import os

import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from utils.cli import arguments

FOLDERS = ("self_supervised", "supervised", "semi_supervised", "eval")
SCRIPTS = [
    f"{folder}.{path.stem}"
    for folder in FOLDERS
    for path in sorted((ROOT / folder).glob("*.py"))
    if "def parse_args" in path.read_text()
]
# Flags without a type: names that are no paths of the system, and what has a name before it.
PLAIN_TEXT = {"arch", "classes", "images", "image_size", "prefix", "use_target", "small_stem"}


@pytest.fixture(scope="module")
def actions():
    """Every flag of every script, as argparse holds it."""
    found = []

    class Parser(arguments.Parser):
        def parse_args(self):
            found.extend(self._actions)
            raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments, "Parser", Parser)
        for name in SCRIPTS:
            with pytest.raises(SystemExit):
                importlib.import_module(name).parse_args()
    return found


@pytest.fixture(scope="module")
def types(actions):
    """The types of all flags, each once."""
    return list({action.type for action in actions if action.type})


@pytest.mark.parametrize("text", ["x", "0", "-3", "1.5", "inf", "nan", ""])
def test_numbers_out_of_range(text):
    with pytest.raises(argparse.ArgumentTypeError, match=text or "is no int"):
        arguments.positive(text)
    if text not in ("0", "1.5"):
        with pytest.raises(argparse.ArgumentTypeError):
            arguments.not_negative(text)


NUMBERS = st.one_of(
    st.floats().map(repr),
    st.integers().map(str),
    st.integers(0, 40).map(lambda power: str(10**power)),
    st.sampled_from(["9" * 5000, "-0.0", "1e300", "1e39", "-inf", "", "1_0", "\u0663"]),
)
GROUPS = st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS).map("{0[0]}x{0[1]}:{0[2]}-{0[3]}".format)
TEXTS = st.lists(NUMBERS | GROUPS | st.text(max_size=5), min_size=1, max_size=3).map(",".join)


@given(text=TEXTS)
def test_a_value_is_one_that_a_tensor_holds_or_an_error_in_words(types, text):
    """All flags of all scripts; argparse would say nothing of a plain ValueError's reason."""
    for parse in types:
        try:
            value = parse(text)
        except argparse.ArgumentTypeError as error:
            assert len(str(error)) < 250
            continue
        values = value if isinstance(value, list) else [value]
        if isinstance(value, list) and hasattr(value[0], "count") and hasattr(value[0], "size"):
            assert sum(group.count for group in value) <= 100
            values = [number for group in value for number in (group.size, *group.scale)]
        for number in values:
            if isinstance(number, int):
                torch.tensor(number, dtype=torch.int64)
            elif isinstance(number, float):
                assert torch.tensor(number, dtype=torch.float32).isfinite()
                assert not (number == 0 and str(number).startswith("-"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2x16:0.2-1,100000000x8:0.1-0.2", ("100000000x8:0.1-0.2", "100000000 is out of range")),
        ("2x16:0.2-1,60x8:0.1-0.2,60x8:0.1-0.2", ("more than 100 crops",)),
        ("2x10000:0.2-1", ("10000 is out of range (1 to 8192)",)),
        ("2x16:0.2.1-1", ("2x16:0.2.1-1",)),
        ("1x16:0.2-1", ("2x",)),
    ],
)
def test_crops_without_end_are_refused(text, words):
    with pytest.raises(argparse.ArgumentTypeError) as error:
        arguments.crop_groups(text)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("text", ["0", "-3,4", "120,90", "15,15", "1,x", "", "3,"])
def test_epochs_ascend_from_one(text):
    assert arguments.epoch_list("15,30,40") == [15, 30, 40]
    with pytest.raises(argparse.ArgumentTypeError, match="epochs like 90,120"):
        arguments.epoch_list(text)


def test_an_error_is_one_line_that_can_be_seen(capsys):
    parser = arguments.Parser(prog="script.py")
    parser.add_argument("--seed", type=arguments.seed)
    with pytest.raises(SystemExit) as code:
        parser.parse_args(["--seed", "a\nb\x1b[31m\udcff"])
    assert code.value.code == 2
    line = "script.py: error: argument --seed: a\\nb\\x1b[31m\\xff is no int\n"
    assert capsys.readouterr().err == line


def test_the_home_folder_in_every_path(actions, monkeypatch):
    """bash leaves it to the program in --flag=~/x."""
    monkeypatch.setenv("HOME", "/home/of/somebody")
    expanded = set()
    for action in actions:
        if action.type is None:
            options = action.choices or action.nargs == 0 or action.dest in PLAIN_TEXT
            assert options or isinstance(action, argparse._HelpAction), action
            continue
        try:
            value = action.type("~/a/./x")
        except argparse.ArgumentTypeError:
            continue
        assert os.fspath(value) in ("/home/of/somebody/a/x", "/home/of/somebody/a/./x")
        expanded.add(action.dest)
        for text, words in (("", "empty"), ("~no_such_user/x", "not known")):
            with pytest.raises(argparse.ArgumentTypeError, match=words):
                action.type(text)
    assert expanded == {
        *("data", "weights", "resume", "checkpoint_path", "train_file", "sup_split_file"),
        *("label_file", "save", "save_acc", "load_cache", "cache_dir", "root", "output"),
        "features",
        *("run", "runs", "results", "neighbors"),
    }


def test_words_that_are_no_path_stay(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert arguments.path_or("auto")("auto") == "auto"
    assert arguments.path_text("./a/../x") == "./a/../x"
    assert arguments.path("~") == tmp_path
    assert arguments.named_path("name=~/run") == f"name={tmp_path}/run"
    assert arguments.named_path("~/run") == f"{tmp_path}/run"
    (tmp_path / "a=~").mkdir()
    assert arguments.named_path(f"{tmp_path}/a=~") == f"{tmp_path}/a=~"  # a folder's own name
    with pytest.raises(argparse.ArgumentTypeError, match="name= has no path behind ="):
        arguments.named_path("name=")


def test_no_flag_is_a_bare_path():
    """The source says so too of parsers that no script is known to have."""
    for path in [*ROOT.glob("*/*.py"), *ROOT.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "type":
                assert ast.unparse(node.value) not in ("Path", "pathlib.Path"), path


def test_devices():
    assert arguments.device("cpu") == torch.device("cpu")
    for text in ("meta", "cuda:99", "gpu", "xla", f"cuda:{10**30}"):
        with pytest.raises(argparse.ArgumentTypeError, match=text):
            arguments.device(text)
