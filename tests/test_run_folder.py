"""The folder of a run: which checkpoints stay, parts of the previous embeddings, falling back."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn

from utils.method import checkpoint
from utils.method.previous_embeddings import PreviousEmbeddings
from utils.runtime import files
from utils.runtime.errors import InputError, RunError
from utils.training.run_folder import RunFolder


class Model(nn.Module):
    def __init__(self, num_images=50):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.previous = PreviousEmbeddings(num_images, 4)


def state(model, epoch, step=None):
    weights = model.state_dict()
    return {"format": checkpoint.FORMAT, "epoch": epoch, "step": step, "state_dict": weights}


def visit(model, index):
    """Images get new embeddings."""
    index = torch.as_tensor(index)
    model.previous.swap(index, torch.randn(len(index), 4))


def names(folder):
    return sorted(path.name for path in folder.path.glob("*.pth"))


def loaded(path):
    """What a new process finds in a checkpoint."""
    model = Model()
    folder = RunFolder(path.parent, {"previous": model.previous})
    model.load_state_dict(folder.load(path)["state_dict"])
    return model


def assert_same(one, two):
    assert torch.equal(one.previous.embeddings, two.previous.embeddings)
    assert torch.equal(one.previous.seen, two.previous.seen)


def test_newest_two_and_those_of_epochs_stay(tmp_path):
    folder, model = RunFolder(tmp_path), Model()
    folder.save(state(model, 9))
    for step in (2, 10, 30):
        folder.save(state(model, 10, step))
    assert names(folder) == [
        "ckpt_epoch_10_step_10.pth",
        "ckpt_epoch_10_step_30.pth",
        "ckpt_epoch_9.pth",
    ]
    folder.save(state(model, 10))
    assert names(folder) == ["ckpt_epoch_10.pth", "ckpt_epoch_10_step_30.pth", "ckpt_epoch_9.pth"]
    folder.save(state(model, 11))
    assert names(folder) == ["ckpt_epoch_10.pth", "ckpt_epoch_11.pth", "ckpt_epoch_9.pth"]
    assert [path.name for path in folder.checkpoints()] == [
        "ckpt_epoch_11.pth",
        "ckpt_epoch_10.pth",
        "ckpt_epoch_9.pth",
    ]


def test_a_renamed_checkpoint_is_refused(tmp_path):
    folder, model = RunFolder(tmp_path), Model()
    path = folder.save(state(model, 1)).rename(tmp_path / "ckpt_epoch_9.pth")
    with pytest.raises(InputError, match="ckpt_epoch_9.pth: holds epoch 1, unlike its name"):
        folder.newest_good()
    other = path.rename(tmp_path / "best.pth")
    assert folder.load(other)["epoch"] == 1


def test_two_runs_cannot_share_a_folder(tmp_path):
    """Another process is refused as long as the first one has the folder."""
    code = (
        "import sys; from utils.runtime.errors import InputError; "
        "from utils.training.run_folder import RunFolder\n"
        "try: RunFolder(sys.argv[1])\n"
        "except InputError as error: print(error, flush=True)\n"
        "else: print('not refused', flush=True)\n"
        "sys.stdin.readline(); RunFolder(sys.argv[1]); print('opened')\n"
    )
    folder = RunFolder(tmp_path)
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    other = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, **pipes)
    refused = other.stdout.readline()
    assert f"--checkpoint_path {tmp_path}: a run is going on there" in refused
    folder.close()
    assert other.communicate("go on\n", timeout=60)[0] == "opened\n"
    assert other.returncode == 0


def test_newest_good_falls_back_and_says_so(tmp_path):
    said = []
    folder, model = RunFolder(tmp_path, say=said.append), Model()
    assert folder.newest_good() == (None, None)
    visit(model, range(10))
    good = folder.save(state(model, 1, 1))
    visit(model, range(5, 20))
    broken = folder.save(state(model, 1, 2))
    broken.write_bytes(broken.read_bytes()[:-100])
    path, _ = folder.newest_good()
    assert path == good
    assert str(broken) in said[0] and "falling back" in said[0]
    good.write_bytes(b"")
    with pytest.raises(InputError, match="no whole checkpoint in .*, of 2"):
        folder.newest_good()


def test_no_older_checkpoint_takes_the_place_of_one_that_is_not_let_in(tmp_path):
    """Whoever put a pickled object there is told of it."""
    said = []
    folder, model = RunFolder(tmp_path, say=said.append), Model()
    folder.save(state(model, 1))
    torch.save({"format": checkpoint.FORMAT, "model": nn.ReLU()}, tmp_path / "ckpt_epoch_2.pth")
    with pytest.raises(InputError, match="ckpt_epoch_2.pth: holds torch.nn.*ReLU, a pickled"):
        folder.newest_good()
    assert not said


def save_as_before(folder, model, *, step, parts):
    """A checkpoint within an epoch of older versions: previous embeddings in files beside it.

    parts: number -> images whose rows the file of that number holds.
    """
    (folder / "previous_embeddings").mkdir(exist_ok=True)
    for number, index in parts.items():
        index = torch.as_tensor(index)
        part = {"index": index, "embeddings": model.previous.embeddings[index]}
        part["format"] = "cmsf-previous-1"
        files.save(folder / "previous_embeddings" / f"part_{number}.pth", part)
    before = state(model, 1, step)
    for name in ("embeddings", "seen"):
        del before["state_dict"][f"previous.{name}"]
    path = folder / f"ckpt_epoch_1_step_{step}.pth"
    files.save(path, before | {"parts": {"previous": {n: len(i) for n, i in parts.items()}}})
    return path


def test_parts_of_older_versions(tmp_path):
    """They are read, and move aside with the run."""
    folder, model = RunFolder(tmp_path, say=lambda text: None), Model()
    visit(model, range(10))
    path = save_as_before(tmp_path, model, step=1, parts={2: range(10)})
    assert_same(loaded(path), model)
    visit(model, range(5, 20))
    path = save_as_before(tmp_path, model, step=2, parts={11: range(5, 20)})
    model.previous.embeddings[:5] = 0  # of these step 2 below has part 2
    files.save(path, torch.load(path) | {"parts": {"previous": {11: 15, 2: 10}}})
    there = loaded(path)
    assert torch.equal(there.previous.embeddings[5:], model.previous.embeddings[5:])
    assert there.previous.embeddings[:5].all() and int(there.previous.seen.sum()) == 20
    aside = folder.move_aside([folder.checkpoints()[1]])
    assert int(loaded(aside / "ckpt_epoch_1_step_1.pth").previous.seen.sum()) == 10
    folder.start_anew()
    assert loaded(tmp_path / "earlier_2" / path.name).previous.seen.sum() == 20
    assert not (tmp_path / "previous_embeddings").exists()


def test_parts_of_older_versions_that_are_damaged_or_none(tmp_path):
    said = []
    model = Model()
    folder = RunFolder(tmp_path, {"previous": model.previous}, say=said.append)
    good = folder.save(state(model, 1, 1))
    visit(model, range(10))
    path = save_as_before(tmp_path, model, step=2, parts={1: range(10)})
    for other in (PreviousEmbeddings(5, 4), PreviousEmbeddings(50, 7)):
        with pytest.raises(InputError, match="step_2.pth: holds previous embeddings that are none"):
            RunFolder(tmp_path, {"previous": other}).load(path)
    (tmp_path / "previous_embeddings" / "part_1.pth").write_bytes(b"cut")
    assert folder.newest_good()[0] == good and "part_1.pth: not a readable" in said[0]


def test_starting_anew_moves_all_of_a_run_aside(tmp_path):
    folder, model = RunFolder(tmp_path), Model()
    visit(model, range(30))
    path = folder.save(state(model, 1, 1))
    folder.log.write_text('{"epoch": 1, "step": 1}\n')
    folder.start_anew()
    assert folder.checkpoints() == [] and folder.log.read_text() == ""
    aside = tmp_path / "earlier_1"
    assert_same(loaded(aside / path.name), model)
    assert (aside / "log.jsonl").read_text()
    folder.start_anew()
    assert not (tmp_path / "earlier_2").exists()


def test_going_on_from_an_older_checkpoint_keeps_the_newer_ones_aside(tmp_path):
    folder, model = RunFolder(tmp_path), Model()
    for epoch in (1, 2, 3):
        visit(model, range(10 * epoch))
        folder.save(state(model, epoch))
    later = folder.save(state(model, 4, 1))
    folder.continue_from(2, None)
    assert names(folder) == ["ckpt_epoch_1.pth", "ckpt_epoch_2.pth"]
    aside = tmp_path / "earlier_1"
    assert_same(loaded(aside / later.name), model)
    folder.continue_from(2, None)
    assert not (tmp_path / "earlier_2").exists()


def test_what_a_killed_save_left_is_removed(tmp_path):
    folder, model = RunFolder(tmp_path), Model()
    visit(model, [0])
    folder.save(state(model, 1, 1))
    (tmp_path / ".ckpt_epoch_2.pth.123.tmp").write_bytes(b"half")
    RunFolder(tmp_path)
    left = [name for _, _, files in os.walk(tmp_path) for name in files]
    assert not [name for name in left if name.endswith(".tmp")]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--checkpoint_path .*file"):
        RunFolder(tmp_path / "file")
    with pytest.raises(RunError, match="could not be written: No such file"):
        files.save(tmp_path / "no" / "x.pth", {})


def test_a_damaged_run_json_is_begun_anew(tmp_path):
    said = []
    folder = RunFolder(tmp_path, say=said.append)
    (tmp_path / "run.json").write_text('{"starts": [{"a": 1')
    folder.describe({"a": 2})
    assert json.loads((tmp_path / "run.json").read_text())["starts"] == [{"a": 2}]
    assert said == [f"WARNING {tmp_path / 'run.json'} is damaged: it is begun anew"]


def test_run_json_is_at_any_moment_whole(tmp_path, monkeypatch):
    """A disk that is full when the new one is to take its place leaves the old one."""
    folder = RunFolder(tmp_path)
    folder.describe({"a": 1})
    before = (tmp_path / "run.json").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="run.json could not be written: No space left on device"):
        folder.describe({"a": 2})
    assert (tmp_path / "run.json").read_bytes() == before
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))
