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
from utils.training.run_folder import PARTS, RunFolder, apart


class Model(nn.Module):
    def __init__(self, num_images=50):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.previous = PreviousEmbeddings(num_images, 4)

    @property
    def stores(self):
        return {"previous": self.previous}


def state(model, epoch, step=None):
    with apart(model.stores.values(), are_apart=step is not None):
        weights = model.state_dict()
    return {"format": checkpoint.FORMAT, "epoch": epoch, "step": step, "state_dict": weights}


def visit(model, index):
    """Images get new embeddings."""
    index = torch.as_tensor(index)
    model.previous.swap(index, torch.randn(len(index), 4))


def names(folder):
    return sorted(path.name for path in folder.path.glob("*.pth"))


def loaded(folder, path, num_images=50):
    """What a new process finds in a checkpoint."""
    model = Model(num_images)
    state = folder.load(path, model.stores)
    with apart(model.stores.values(), are_apart="parts" in state):
        model.load_state_dict(state["state_dict"])
    return model


def assert_same(one, two):
    assert torch.equal(one.previous.embeddings, two.previous.embeddings)
    assert torch.equal(one.previous.seen, two.previous.seen)


def test_newest_two_and_those_of_epochs_stay(tmp_path):
    folder, model = RunFolder(tmp_path), Model()
    folder.save_epoch(state(model, 9))
    for step in (2, 10, 30):
        folder.save_step(state(model, 10, step), model.stores)
    assert names(folder) == [
        "ckpt_epoch_10_step_10.pth",
        "ckpt_epoch_10_step_30.pth",
        "ckpt_epoch_9.pth",
    ]
    folder.save_epoch(state(model, 10))
    assert names(folder) == ["ckpt_epoch_10.pth", "ckpt_epoch_10_step_30.pth", "ckpt_epoch_9.pth"]
    folder.save_epoch(state(model, 11))
    assert names(folder) == ["ckpt_epoch_10.pth", "ckpt_epoch_11.pth", "ckpt_epoch_9.pth"]
    assert [path.name for path in folder.checkpoints()] == [
        "ckpt_epoch_11.pth",
        "ckpt_epoch_10.pth",
        "ckpt_epoch_9.pth",
    ]


def test_previous_embeddings_come_back_from_parts(tmp_path):
    """Whatever was visited between saves, both checkpoints kept hold what the model held."""
    torch.manual_seed(0)
    folder, model, saved = RunFolder(tmp_path), Model(), {}
    generator = torch.Generator().manual_seed(1)
    for step in range(1, 40):
        count = int(torch.randint(0, 12, (1,), generator=generator))
        visit(model, torch.randperm(50, generator=generator)[:count])
        path = folder.save_step(state(model, 1, step), model.stores)
        saved[path] = {name: value.clone() for name, value in model.state_dict().items()}
        for kept in folder.checkpoints():
            there = loaded(RunFolder(tmp_path), kept).state_dict()
            assert all(torch.equal(there[name], saved[kept][name]) for name in there)
        if step in (13, 20):  # a new process goes on
            model = loaded(folder := RunFolder(tmp_path), path)


@pytest.mark.parametrize("seed", range(20))
def test_no_row_is_lost_however_saves_alternate(tmp_path, seed):
    """Saves within and after epochs in any order, parts that go with the last who needs them."""
    generator = torch.Generator().manual_seed(seed)
    folder, model, saved = RunFolder(tmp_path), Model(30), {}
    epoch = step = 1
    for _ in range(40):
        count = int(torch.randint(0, 25, (1,), generator=generator))
        visit(model, torch.randperm(30, generator=generator)[:count])
        kind = float(torch.rand(1, generator=generator))
        if kind < 0.4:
            path, step = folder.save_step(state(model, epoch, step), model.stores), step + 1
        elif kind < 0.8:
            path, epoch, step = folder.save_epoch(state(model, epoch)), epoch + 1, 1
        else:  # a new process goes on
            if saved:
                newest = RunFolder(tmp_path).checkpoints()[0]
                model, epoch, step = loaded(folder := RunFolder(tmp_path), newest, 30), epoch + 1, 1
            continue
        saved[path] = {name: value.clone() for name, value in model.state_dict().items()}
        for kept in folder.checkpoints():
            there = loaded(RunFolder(tmp_path), kept, 30).state_dict()
            assert all(torch.equal(there[name], saved[kept][name]) for name in there)


def test_a_renamed_checkpoint_is_refused(tmp_path):
    folder, model = RunFolder(tmp_path), Model()
    path = folder.save_epoch(state(model, 1)).rename(tmp_path / "ckpt_epoch_9.pth")
    with pytest.raises(InputError, match="ckpt_epoch_9.pth: holds epoch 1, unlike its name"):
        folder.newest_good(model.stores)
    other = path.rename(tmp_path / "best.pth")
    assert folder.load(other, model.stores)["epoch"] == 1


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


def test_what_is_not_wanted_is_no_damage(tmp_path):
    """A state that is refused is not passed over as a damaged one would be."""
    folder, model = RunFolder(tmp_path), Model()
    visit(model, range(30))
    folder.save_step(state(model, 1, 1), model.stores)
    folder.save_step(state(model, 1, 2), model.stores)

    def refuse(state, what, parts_fit):
        raise InputError(f"{what}: step {state['step']}, fits: {parts_fit()}")

    with pytest.raises(InputError, match="--resume .*step_2.pth: step 2, fits: False"):
        folder.newest_good(Model(7).stores, accept=refuse)


def test_an_epoch_writes_each_row_about_once(tmp_path):
    folder, model, written = RunFolder(tmp_path), Model(1000), 0
    before, order = set(), torch.randperm(1000)
    for step in range(300):  # three epochs of 100 steps
        place = step % 100
        order = order if place else torch.randperm(1000)
        visit(model, order[10 * place : 10 * place + 10])
        folder.save_step(state(model, 1 + step // 100, place), model.stores)
        parts = set((tmp_path / PARTS).iterdir())
        written += sum(len(torch.load(path)["index"]) for path in parts - before)
        before = parts
    assert 3000 <= written <= 3.5 * 1000
    assert len(before) <= 250
    assert_same(loaded(RunFolder(tmp_path), folder.checkpoints()[0], 1000), model)


def test_checkpoint_of_an_epoch_needs_nothing_else(tmp_path):
    folder, model = RunFolder(tmp_path / "here"), Model()
    visit(model, range(30))
    folder.save_step(state(model, 1, 3), model.stores)
    path = folder.save_epoch(state(model, 1))
    copy = tmp_path / "copy.pth"
    copy.write_bytes(path.read_bytes())
    assert_same(loaded(RunFolder(tmp_path / "there"), copy), model)


def test_a_run_that_goes_on_elsewhere_is_complete_there(tmp_path):
    here, there = RunFolder(tmp_path / "here"), RunFolder(tmp_path / "there")
    model = Model()
    visit(model, range(30))
    path = here.save_step(state(model, 1, 3), model.stores)
    model = loaded(there, path)
    visit(model, [3, 40])
    path = there.save_step(state(model, 1, 4), model.stores)
    for part in (here.path / PARTS).iterdir():
        part.unlink()
    assert_same(loaded(RunFolder(there.path), path), model)


def test_newest_good_falls_back_and_says_so(tmp_path):
    said = []
    folder, model = RunFolder(tmp_path, say=said.append), Model()
    assert folder.newest_good(model.stores) == (None, None)
    visit(model, range(10))
    good = folder.save_step(state(model, 1, 1), model.stores)
    visit(model, range(5, 20))
    broken = folder.save_step(state(model, 1, 2), model.stores)
    broken.write_bytes(broken.read_bytes()[:-100])
    path, _ = folder.newest_good(model.stores)
    assert path == good
    assert str(broken) in said[0] and "falling back" in said[0]
    assert model.previous.seen.tolist() == [True] * 10 + [False] * 40
    good.write_bytes(b"")
    with pytest.raises(InputError, match="no whole checkpoint in .*, of 2"):
        folder.newest_good(model.stores)


def test_no_older_checkpoint_takes_the_place_of_one_that_is_not_let_in(tmp_path):
    """Whoever put a pickled object there is told of it."""
    said = []
    folder, model = RunFolder(tmp_path, say=said.append), Model()
    folder.save_epoch(state(model, 1))
    torch.save({"format": checkpoint.FORMAT, "model": nn.ReLU()}, tmp_path / "ckpt_epoch_2.pth")
    with pytest.raises(InputError, match="ckpt_epoch_2.pth: holds torch.nn.*ReLU, a pickled"):
        folder.newest_good(model.stores)
    assert not said


def test_a_damaged_part_makes_its_checkpoint_fall_back(tmp_path):
    folder, model = RunFolder(tmp_path, say=lambda text: None), Model()
    visit(model, range(10))
    first = folder.save_step(state(model, 1, 1), model.stores)
    visit(model, range(5, 20))
    folder.save_step(state(model, 1, 2), model.stores)
    part = tmp_path / PARTS / "part_2.pth"
    data = bytearray(part.read_bytes())
    data[len(data) // 2] ^= 1
    part.write_bytes(data)
    path, _ = folder.newest_good(model.stores)
    assert path == first
    assert model.previous.seen.sum() == 10
    part.unlink()
    with pytest.raises(InputError, match="part_2.pth: no such file"):
        folder.load(folder.checkpoints()[0], model.stores)


@pytest.mark.parametrize("store", [PreviousEmbeddings(5, 4), PreviousEmbeddings(50, 7)])
def test_parts_of_another_run_are_refused(tmp_path, store):
    folder, model = RunFolder(tmp_path), Model()
    visit(model, range(30))
    path = folder.save_step(state(model, 1, 1), model.stores)
    with pytest.raises(InputError, match="part_1.pth: .*previous embeddings"):
        folder.load(path, {"previous": store})
    with pytest.raises(InputError, match="a run that has previous, unlike this one"):
        folder.load(path, {})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"index": torch.tensor([0, 1, -1])}, "other images than 0 to 49, or of one twice"),
        ({"index": torch.tensor([0, 1, 50])}, "other images than 0 to 49"),
        ({"index": torch.tensor([0, 1, 1])}, "or of one twice"),
        ({"index": torch.tensor([0, 1])}, r"index is a Tensor, not int64 \(3,\)"),
        ({"index": torch.tensor([0.0, 1, 2])}, "index is a Tensor, not int64"),
        ({"embeddings": torch.zeros(2, 4)}, r"embeddings is a Tensor, not floating \(3, 4\)"),
        ({"embeddings": torch.full((3, 4), torch.nan)}, "finite previous embeddings"),
        ({"embeddings": None}, "embeddings is None"),
    ],
)
def test_a_part_that_cannot_be(tmp_path, change, words):
    folder, model = RunFolder(tmp_path), Model()
    visit(model, range(3))
    path = folder.save_step(state(model, 1, 1), model.stores)
    part = tmp_path / PARTS / "part_1.pth"
    files.save(part, torch.load(part, weights_only=True) | change)
    with pytest.raises(InputError, match=f"--resume {part}: .*{words}"):
        loaded(RunFolder(tmp_path), path)


def test_a_checkpoint_whose_parts_are_gone_from_it(tmp_path):
    folder, model = RunFolder(tmp_path), Model()
    path = folder.save_step(state(model, 1, 1), model.stores)
    files.save(path, torch.load(path, weights_only=True) | {"parts": {}})
    with pytest.raises(InputError, match="a run that lacks previous, unlike this one"):
        folder.load(path, model.stores)


def test_starting_anew_moves_all_of_a_run_aside(tmp_path):
    folder, model = RunFolder(tmp_path), Model()
    visit(model, range(30))
    path = folder.save_step(state(model, 1, 1), model.stores)
    folder.log.write_text('{"epoch": 1, "step": 1}\n')
    folder.start_anew()
    assert folder.checkpoints() == [] and folder.log.read_text() == ""
    assert not (tmp_path / PARTS).exists()
    aside = tmp_path / "earlier_1"
    assert_same(loaded(RunFolder(aside), aside / path.name), model)
    assert (aside / "log.jsonl").read_text()
    folder.start_anew()
    assert not (tmp_path / "earlier_2").exists()


def test_going_on_from_an_older_checkpoint_keeps_the_newer_ones_aside(tmp_path):
    folder, model = RunFolder(tmp_path), Model()
    for epoch in (1, 2, 3):
        visit(model, range(10 * epoch))
        folder.save_epoch(state(model, epoch))
    later = folder.save_step(state(model, 4, 1), model.stores)
    folder.continue_from(2, None)
    assert names(folder) == ["ckpt_epoch_1.pth", "ckpt_epoch_2.pth"]
    aside = tmp_path / "earlier_1"
    assert_same(loaded(RunFolder(aside), aside / later.name), model)
    folder.continue_from(2, None)
    assert not (tmp_path / "earlier_2").exists()


def test_what_a_killed_save_left_is_removed(tmp_path):
    folder, model = RunFolder(tmp_path), Model()
    visit(model, [0])
    folder.save_step(state(model, 1, 1), model.stores)
    for place in (tmp_path, tmp_path / PARTS):
        (place / ".ckpt_epoch_2.pth.123.tmp").write_bytes(b"half")
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
