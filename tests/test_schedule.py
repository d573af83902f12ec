"""Learning rates at epochs where the formula is known by hand."""

from argparse import Namespace

import pytest

from utils.training.schedule import learning_rate


def test_cosine():
    args = Namespace(learning_rate=0.05, epochs=200, cos=True)

    def rate(epoch):
        return learning_rate(args, epoch)

    assert rate(1) == pytest.approx(0.05)
    assert rate(101) == pytest.approx(0.025)
    assert rate(51) == pytest.approx(0.05 / 2 * (1 + 2**-0.5))
    assert 0 < rate(200) < 1e-5
    assert all(rate(epoch) > rate(epoch + 1) for epoch in range(1, 200))


def test_steps():
    decay = {"lr_decay_epochs": [90, 120], "lr_decay_rate": 0.2}
    args = Namespace(learning_rate=0.01, cos=False, **decay)
    rates = [learning_rate(args, epoch) for epoch in (1, 90, 91, 120, 121, 200)]
    assert rates == pytest.approx([0.01, 0.01, 0.002, 0.002, 0.0004, 0.0004])
