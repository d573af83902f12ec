"""Features land in the row of their image, and every row is filled exactly once."""

import pytest
import torch
from torch import nn

from utils.data.batches import EvalBatch
from utils.data.datasets import ImageSet
from utils.evaluation.features import extract_features
from utils.runtime.errors import RunError


class Loader:
    """So many images x/0, x/1, ... in batches of these numbers; some cannot be read."""

    def __init__(self, count, *index_lists, left_out=()):
        self.images = ImageSet("x", [str(number) for number in range(count)], [0] * count, ["a"])
        self.index_lists, self.left_out = index_lists, left_out

    def __iter__(self):
        for index in self.index_lists:
            number = torch.tensor(index)
            images = number.float()[:, None, None, None].expand(-1, 3, 2, 2)
            yield EvalBatch(images, number, number * 10)


def test_rows_follow_the_index_in_any_order():
    features, labels = extract_features(nn.Flatten(), Loader(4, [2, 0], [3, 1]))
    assert features.shape == (4, 12)
    assert features[:, 0].tolist() == [0, 1, 2, 3]
    assert labels.tolist() == [0, 10, 20, 30]


@pytest.mark.parametrize("visits", [([0, 1],), ([0, 1], [1, 2]), ([0, 1, 2], [2])])
def test_missing_and_repeated_images_are_an_error(visits):
    with pytest.raises(RuntimeError, match="of 3 images not visited exactly once"):
        extract_features(nn.Flatten(), Loader(3, *visits))


@pytest.mark.parametrize("chunk", [1, 2, 100])
def test_rows_of_images_left_out_are_taken_out(monkeypatch, chunk):
    monkeypatch.setattr("utils.evaluation.features._CHUNK", chunk)
    loader = Loader(8, [5, 1], [3, 2, 7], left_out={0, 4, 6})
    rows, labels = extract_features(nn.Flatten(), loader)
    assert rows[:, 0].tolist() == [1, 2, 3, 5, 7]
    assert labels.tolist() == [10, 20, 30, 50, 70]


def test_only_the_images_left_out_may_be_missing():
    for left_out in (set(), {0}, {1, 2}):
        with pytest.raises(RuntimeError, match="of 3 images not visited exactly once"):
            extract_features(nn.Flatten(), Loader(3, [0, 2], left_out=left_out))


def test_eval_mode_inside_and_mode_restored():
    module = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(12))
    extract_features(module, Loader(4, [0, 1], [2, 3]))
    assert module.training
    assert module[1].num_batches_tracked == 0
    module.eval()
    extract_features(module, Loader(2, [0, 1]))
    assert not module.training


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), 1e25])
def test_features_that_are_not_finite_are_named(value):
    """1e25 is finite, but not the length of such a row: normalized it would be zero."""

    class Broken(nn.Flatten):
        def forward(self, images):
            rows = super().forward(images)
            rows[(rows[:, 0] == 1) | (rows[:, 0] == 3), 2] = value
            return rows

    with pytest.raises(RunError, match="2 of 4 images.*first image x/1.*weights are finite"):
        extract_features(Broken(), Loader(4, [2, 3], [0, 1]))
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    network[1].bias.data[4] = torch.tensor(value) ** 9
    with pytest.raises(RunError, match="4 of 4 images.*first image x/0.*weights are not finite"):
        extract_features(network, Loader(4, [2, 3], [0, 1]))
