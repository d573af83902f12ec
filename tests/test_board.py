"""TensorBoard on demand: what is written, from which step on, and what is said without it."""

import importlib

import numpy as np
import pytest
import tiny
import torch
from test_engine import Loader, Method, make_run, train

from utils.data.augment import IMAGENET_MEAN, IMAGENET_STD
from utils.data.batches import Batch
from utils.runtime.errors import InputError
from utils.training import tensorboard

TRAIN = importlib.import_module("self_supervised.train_msf_2q")


def events(folder):
    """What TensorBoard itself reads: scalars name -> [(step, value), ...] and pictures' steps."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"))
    read.Reload()
    tags = read.Tags()
    scalars = {n: [(e.step, e.value) for e in read.Scalars(n)] for n in tags["scalars"]}
    return scalars, {n: [e.step for e in read.Images(n)] for n in tags["images"]}


def views(count=10, size=4):
    """Normalized views of a known look."""
    looks = torch.rand(2, count, 3, size, size, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    normalized = (looks - mean) / std
    index = torch.arange(count)
    return looks, Batch(*normalized, index, index)


def test_the_picture_shows_views_as_they_look():
    looks, batch = views()
    picture = tensorboard.views_picture(batch)
    assert picture.shape == (3, 8, 32)
    for place in range(8):
        for row in range(2):
            tile = picture[:, 4 * row : 4 * row + 4, 4 * place : 4 * place + 4]
            torch.testing.assert_close(tile, looks[row, place], atol=1e-6, rtol=0)
    bright = batch._replace(query_view=batch.query_view + 9)
    assert tensorboard.views_picture(bright).max() == 1


def test_scalars_of_each_record_and_views_of_each_saved_epoch(tmp_path):
    pytest.importorskip("tensorboard")
    loader = Loader()
    plain = loader.epoch
    _, batch = views(2)

    def with_views(epoch, *, start=0):
        for one in plain(epoch, start=start):
            one.query_view, one.target_view = batch.query_view, batch.target_view
            yield one

    loader.epoch = with_views
    knn = {1: {"accuracy": 40.0, "top5": None}}
    run = make_run(
        tmp_path, save_freq=2, print_freq=2, knn_freq=3, evaluate=lambda: knn, tensorboard=True
    )
    train(run, loader)
    scalars, pictures = events(tmp_path)
    assert [step for step, _ in scalars["loss"]] == [2, 4, 6, 8, 10, 12]
    rates = [value for _, value in scalars["lr"]]
    assert rates == pytest.approx([0.1, 0.1, 0.05, 0.05, 0.025, 0.025])
    assert scalars["knn/1/accuracy"] == [(12, 40.0)] and "knn/1/top5" not in scalars
    assert not {"epoch", "step"} & set(scalars)
    assert pictures == {"views/query above target": [8, 12]}


def test_a_run_that_goes_on_writes_no_step_twice(tmp_path):
    pytest.importorskip("tensorboard")
    looks = views(2)[1]
    train_on = {"print_freq": 1, "save_freq": 1, "tensorboard": True}

    class WithViews(Loader):
        def epoch(self, epoch, *, start=0):
            for one in super().epoch(epoch, start=start):
                one.query_view, one.target_view = looks.query_view, looks.target_view
                yield one

    run = make_run(tmp_path, epochs=2, **train_on)
    train(run, WithViews())
    run._files.close()
    again = make_run(tmp_path, epochs=2, resume=str(tmp_path / "ckpt_epoch_1.pth"), **train_on)
    train(again, WithViews())
    scalars, pictures = events(tmp_path)
    assert [step for step, _ in scalars["loss"]] == list(range(1, 9))
    assert pictures["views/query above target"] == [4, 8]


def test_without_the_flag_nothing_is_written(tmp_path):
    train(make_run(tmp_path))
    assert not (tmp_path / "tensorboard").exists()


def test_a_new_run_moves_the_board_aside(tmp_path):
    """Its steps would mix with those of the new one."""
    run = train(make_run(tmp_path))
    run._files.close()
    (tmp_path / "tensorboard").mkdir()
    (tmp_path / "tensorboard" / "events").touch()
    train(make_run(tmp_path))
    assert (tmp_path / "earlier_1" / "tensorboard" / "events").exists()
    assert not (tmp_path / "tensorboard").exists()


def test_without_tensorboard_a_run_does_not_begin(
    without_package, call_script, image_tree, tmp_path
):
    without_package("tensorboard")
    flags = (*tiny.FLAGS, "--knn_freq", -1, "--epochs", 1, "--checkpoint_path", tmp_path / "run")
    code, _, err = call_script(TRAIN, *flags, "--tensorboard", image_tree)
    assert code == 2 and "--tensorboard: it is not installed (pip install tensorboard)" in err
    assert err.count("\n") == 1 and not (tmp_path / "run").exists()
    code, _, _ = call_script(TRAIN, *flags, image_tree)  # nothing of it is imported
    assert code == 0
    with pytest.raises(InputError, match="--tensorboard"):
        make_run(tmp_path / "other", model=Method(), tensorboard=True)


def test_the_real_thing(call_script, image_tree, tmp_path):
    pytest.importorskip("tensorboard")
    flags = (*tiny.FLAGS, "--knn_freq", -1, "--epochs", 2, "--save_freq", 1, "--tensorboard")
    code, _, err = call_script(TRAIN, *flags, "--checkpoint_path", tmp_path, image_tree)
    assert (code, err) == (0, "")
    scalars, pictures = events(tmp_path)
    assert len(scalars["purity_plain"]) == 4 and np.isfinite([v for _, v in scalars["loss"]]).all()
    assert pictures == {"views/query above target": [3, 6]}
