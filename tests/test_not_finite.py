"""Whatever becomes nan or infinite, with every method: the run stops and nothing of it is saved."""

import math
import re
from functools import partial

import pytest
import test_engine
import tiny
import torch
from every_method import METHODS, Sizes

from utils.data.bad_images import BadImages
from utils.runtime.errors import RunError

PLACE = (2, 2)  # epoch and step at which it happens; an epoch has three


class Loader:
    """Two epochs of a method's batches."""

    batch_size = 4

    def __init__(self, method):
        crops = {"small": method.small, "symmetric": method.symmetric}
        self.batches = list(tiny.random_batches(6, **crops))
        self.bad_images = BadImages()

    def __len__(self):
        return 3

    def epoch(self, epoch, *, start=0):
        yield from self.batches[3 * (epoch - 1) + start : 3 * epoch]


def query_weights(model, batch, bad):
    next(model.encoders.query_encoder.parameters())[0, 0] = bad


def target_weights(model, batch, bad):
    next(model.encoders.target_encoder.parameters())[0, 0] = bad


def images(model, batch, bad, *, which):
    batch.query_view[which] = bad
    batch.target_view[which] = bad


def targets(model, batch, bad, *, which):
    """As if the target encoder had no batch norm, by which one bad image spoils the others."""
    own = model.encoders.target

    def target(view):
        t = own(view)
        t[which] = bad
        return t

    model.encoders.target = target


STOPS = {
    "query weights": query_weights,
    "target weights": target_weights,
    "one image": partial(images, which=1),
    "all images": partial(images, which=slice(None)),
    "one target": partial(targets, which=1),
    "all targets": partial(targets, which=slice(None)),
}
WITHOUT_TARGET = {"query weights", "one image", "all images"}
NAMES = [
    (name, what)
    for name in METHODS
    for what in STOPS
    if name != "cross-entropy" or what in WITHOUT_TARGET
]


def train(folder, name, spoil):
    """A run that spoils something at PLACE; the weights before that and after, and the error."""
    method, weights = METHODS[name], []
    model = method.build(tiny.encoders(), Sizes()).double()
    run = test_engine.make_run(folder, model=model, save_freq=1, epochs=2)
    with pytest.raises(RunError) as error, run:
        for batch in run.batches(Loader(method)):
            if (run.epoch, run.epoch_step) == PLACE:
                with torch.no_grad():
                    spoil(model, batch)
                weights = [p.clone() for p in model.parameters() if p.requires_grad]
            run.step(*run.model(batch, **method.arguments))
    kept = test_engine.names(folder)
    assert kept == ["ckpt_epoch_1.pth"] and "last checkpoint: " in str(error.value)
    assert all(v.isfinite().all() for v in tiny.tensors(tiny.state(folder / kept[0])).values())
    after = [p for p in model.parameters() if p.requires_grad]
    return weights, after, str(error.value)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("name", "what"), NAMES)
def test_the_step_is_named_and_not_taken(tmp_path, name, what, bad):
    before, after, error = train(tmp_path, name, partial(STOPS[what], bad=bad))
    assert re.match(
        r"the loss is (nan|inf|-inf) in epoch 2, step 2, learning rate 0.05, images \[\d", error
    )
    torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    line = test_engine.log(tmp_path)[-1]
    assert (line["epoch"], line["step"]) == PLACE and line["error"].startswith("loss ")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", [name for name in METHODS if name != "cross-entropy"])
def test_what_no_loss_depends_on_is_found_when_saving(tmp_path, name, bad):
    """Statistics of the target's batch norm, which training does not use."""

    def spoil(model, batch):
        model.encoders.target_encoder.backbone[2].running_mean[0] = bad

    _, _, error = train(tmp_path, name, spoil)
    assert "not saved: encoders.target_encoder.backbone.2.running_mean is not finite" in error
