"""The linear probe against torch's own layers and optimizer, by hand, and against slow loops."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from utils.evaluation import linear_probe
from utils.runtime.errors import RunError

F, C = 6, 7


def hand_made_data(count=23, *, seed=0):
    """Features (count, F) float64 in clusters that overlap, labels (count,)."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % C
    centers = torch.randn(C, F, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, F, generator=generator, dtype=torch.float64)
    return 3 * (centers[labels] + noise), labels


def make_probe(*, num_rates=1, hidden=False, seed=1):
    """A probe in float64 whose statistics are those of `hand_made_data`."""
    torch.manual_seed(seed)
    probe = linear_probe.LinearProbe(F, C, num_rates=num_rates, hidden=hidden).double()
    probe.standardize.measure([hand_made_data()[0]])
    return probe


def sgd(probe, rates):
    return linear_probe.build_optimizer(probe, rates, momentum=0.9, weight_decay=1e-2)


def batches(epoch, *, size=5):
    features, labels = hand_made_data()
    order = np.random.default_rng([9, epoch]).permutation(len(labels))
    for start in range(0, len(order), size):
        rows = torch.from_numpy(order[start : start + size])
        yield features[rows], labels[rows]


def test_standardization_by_hand():
    """Rows (3, 4), (1, 0), (0, 2) have the unit vectors (.6, .8), (1, 0), (0, 1)."""
    layer = linear_probe.Standardize(2).double()
    rows = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    assert layer.measure([rows]) == 3
    mean = [(0.6 + 1 + 0) / 3, (0.8 + 0 + 1) / 3]
    var = [
        ((0.6 - mean[0]) ** 2 + (1 - mean[0]) ** 2 + mean[0] ** 2) / 2,  # unbiased: 3 - 1
        ((0.8 - mean[1]) ** 2 + mean[1] ** 2 + (1 - mean[1]) ** 2) / 2,
    ]
    assert layer.mean.tolist() == pytest.approx(mean, rel=1e-14)
    assert layer.var.tolist() == pytest.approx(var, rel=1e-14)
    expected = [(x - mean[i]) / math.sqrt(var[i] + 1e-5) for i, x in enumerate((0.6, 0.8))]
    assert layer(torch.tensor([[30.0, 40.0]]).double())[0].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("sizes", [(23,), (1, 22), (10, 10, 3), (1,) * 23])
def test_statistics_do_not_depend_on_the_batches(sizes):
    features, _ = hand_made_data()
    layer = linear_probe.Standardize(F).double()
    assert layer.measure(features.split(sizes)) == 23
    unit = features.numpy() / np.linalg.norm(features.numpy(), axis=1, keepdims=True)
    np.testing.assert_allclose(layer.mean, unit.mean(axis=0), rtol=0, atol=1e-14)
    np.testing.assert_allclose(layer.var, unit.var(axis=0, ddof=1), rtol=0, atol=1e-14)


def test_a_dimension_that_never_varies_stays_finite():
    layer = linear_probe.Standardize(2)
    layer.measure([torch.tensor([[1.0, 0.0], [2.0, 0.0]])])
    assert layer(torch.tensor([[5.0, 0.0]])).abs().max() < 1e-3


def test_statistics_need_two_rows():
    with pytest.raises(ValueError, match="two rows, not 1"):
        linear_probe.Standardize(2).measure([torch.ones(1, 2)])


def test_features_that_are_not_finite():
    with pytest.raises(RunError, match="not finite"):
        linear_probe.Standardize(2).measure([torch.ones(2, 2), torch.tensor([[1.0, math.nan]])])


def test_each_epoch_equals_torchs_own_layer_and_optimizer():
    """nn.Linear and torch.optim.SGD alone, on features standardized with numpy."""
    probe = make_probe()
    optimizer = sgd(probe, [0.3])
    features, _ = hand_made_data()
    unit = features / features.norm(dim=1, keepdim=True)
    mean, var = unit.numpy().mean(axis=0), unit.numpy().var(axis=0, ddof=1)

    torch.manual_seed(1)
    plain = nn.Linear(F, C).double()
    reference = torch.optim.SGD(plain.parameters(), lr=0.3, momentum=0.9, weight_decay=1e-2)
    for epoch in range(1, 9):
        loss = linear_probe.train_epoch(probe, batches(epoch), optimizer)
        summed = 0.0
        for x, y in batches(epoch):
            x = x / x.norm(dim=1, keepdim=True)
            x = (x - torch.from_numpy(mean)) / torch.from_numpy(np.sqrt(var + 1e-5))
            reference.zero_grad()
            value = nn.functional.cross_entropy(plain(x), y)
            value.backward()
            reference.step()
            summed += value.item() * len(y)
        assert loss.tolist() == pytest.approx([summed / 23], abs=1e-12)
        torch.testing.assert_close(probe.heads[0].weight, plain.weight, rtol=0, atol=1e-12)
        torch.testing.assert_close(probe.heads[0].bias, plain.bias, rtol=0, atol=1e-12)


def test_the_sweep_equals_separate_runs():
    rates = [0.01, 0.1, 1.0]
    together = make_probe(num_rates=3)
    optimizer = sgd(together, rates)
    losses = [
        linear_probe.train_epoch(together, batches(epoch), optimizer) for epoch in range(1, 7)
    ]
    for number, rate in enumerate(rates):
        alone = make_probe()
        optimizer = sgd(alone, [rate])
        own = [linear_probe.train_epoch(alone, batches(epoch), optimizer) for epoch in range(1, 7)]
        for ours, theirs in zip(losses, own, strict=True):
            assert ours[number].item() == pytest.approx(theirs.item(), abs=1e-9)
        for name in ("weight", "bias"):
            one, other = (getattr(p, name) for p in (together.heads[number], alone.heads[0]))
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    assert not torch.allclose(together.heads[0].weight, together.heads[1].weight)


def test_a_rate_that_diverges_leaves_the_others_alone():
    rates, features = [0.1, 1e300], hand_made_data()
    probe, alone = make_probe(num_rates=2), make_probe()
    optimizers = sgd(probe, rates), sgd(alone, rates[:1])
    for epoch in (1, 2, 3):
        losses = linear_probe.train_epoch(probe, batches(epoch), optimizers[0])
        expected = linear_probe.train_epoch(alone, batches(epoch), optimizers[1])
    assert losses[0].item() == pytest.approx(expected.item(), abs=1e-12)
    assert not losses[1].isfinite()
    figures = linear_probe.accuracy(probe, *features)
    assert figures[0] == linear_probe.accuracy(alone, *features)[0]
    assert figures[1] == {"top1": None, "top5": None}
    (one,) = linear_probe.accuracy(alone, *features)
    row = {name: [of_rate[name] for of_rate in figures] for name in ("top1", "top5")}
    row["loss"] = [losses[0].item(), None]
    summary = linear_probe.summarize(rates, [row] * 2)
    assert summary["1e+300"] == dict.fromkeys(("top1", "top5", "best_top1", "best_epoch", "loss"))
    _, best, diverged = linear_probe.format_table(summary).splitlines()
    assert best.split()[1] == f"{one['top1']:.2f}" and diverged.split()[1:] == ["-"] * 3 + ["(-)"]
    alone.heads[0].load_state_dict(probe.heads[1].state_dict())
    with pytest.raises(RunError, match="--lr"):
        linear_probe.accuracy(alone, *features)


def test_accuracy_against_sorting():
    """Percent of rows whose label is first, or among the first five, of the sorted logits."""
    probe = make_probe(num_rates=2)
    optimizer = sgd(probe, [0.05, 0.5])
    linear_probe.train_epoch(probe, batches(1), optimizer)
    features, labels = hand_made_data(40, seed=5)
    figures = linear_probe.accuracy(probe, features, labels, chunk=7)
    with torch.no_grad():
        logits = probe(features)
    for number in range(2):
        hits = {1: 0, 5: 0}
        for row, label in zip(logits[:, number].tolist(), labels.tolist(), strict=True):
            order = sorted(range(C), key=lambda c, row=row: -row[c])
            for k in hits:
                hits[k] += label in order[:k]
        assert 0 < hits[1] < hits[5] < 40
        assert figures[number] == {"top1": 100 * hits[1] / 40, "top5": 100 * hits[5] / 40}


def test_ranks_of_ties_and_nan_count_against_the_probe():
    nan = math.nan
    logits = torch.tensor([[3.0, 1, 2], [2, 2, 1], [nan, 1, 0], [nan, nan, nan], [0, 0, 0]])
    ranks = linear_probe.true_class_rank(logits[:, None], torch.tensor([0, 1, 1, 2, 0]))
    assert ranks[:, 0].tolist() == [0, 1, 1, 2, 2]


def test_no_top5_of_five_classes():
    features, labels = torch.randn(4, F), torch.zeros(4, dtype=torch.int64)
    for classes, there in ((5, False), (6, True)):
        (figures,) = linear_probe.accuracy(linear_probe.LinearProbe(F, classes), features, labels)
        assert (figures["top5"] is not None) == there


def test_hidden_layer_trains_and_is_still_when_measured():
    """Linear-BN-ReLU before the classifier against the same layers written out."""
    probe = make_probe(hidden=True)
    features, labels = hand_made_data()
    before = copy.deepcopy(probe.state_dict())
    first, norm, relu = probe.hidden
    assert (type(first), type(norm), type(relu)) == (nn.Linear, nn.BatchNorm1d, nn.ReLU)
    with torch.no_grad():
        x = first(probe.standardize(features))
        x = (x - x.mean(dim=0)) / (x.var(dim=0, unbiased=False) + norm.eps).sqrt()
        torch.testing.assert_close(probe(features)[:, 0], probe.heads[0](x.clamp(min=0)))
    linear_probe.train_epoch(probe, batches(1, size=23), sgd(probe, [0.1]))
    after = copy.deepcopy(probe.state_dict())
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged == {"standardize.mean", "standardize.var"}
    linear_probe.accuracy(probe, features, labels)
    assert all(torch.equal(after[name], value) for name, value in probe.state_dict().items())


def test_optimizer_holds_every_parameter_once():
    encoder = nn.Linear(2, 2)
    probe = linear_probe.LinearProbe(F, C, hidden=True)
    optimizer = linear_probe.build_optimizer(
        probe, [0.5], momentum=0.8, weight_decay=0.1, also=encoder.parameters()
    )
    (group,) = optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.5, 0.8, 0.1)
    wanted = {id(p) for module in (probe, encoder) for p in module.parameters()}
    assert len(group["params"]) == len(wanted) and {id(p) for p in group["params"]} == wanted


def test_summary_by_hand():
    history = [
        {"loss": [2.0, None], "top1": [50.0, 10.0], "top5": [90.0, 50.0]},
        {"loss": [1.0, None], "top1": [70.0, 0.0], "top5": [95.0, 0.0]},
        {"loss": [0.5, None], "top1": [70.0, 0.0], "top5": [94.0, 0.0]},
    ]
    summary = linear_probe.summarize([0.01, 3.0], history)
    assert summary == {
        "0.01": {"top1": 70.0, "top5": 94.0, "best_top1": 70.0, "best_epoch": 2, "loss": 0.5},
        "3.0": {"top1": 0.0, "top5": 0.0, "best_top1": 10.0, "best_epoch": 1, "loss": None},
    }
    history[1] = {"loss": [1.0, None], "top1": [None] * 2, "top5": [None] * 2}  # not measured
    gap = linear_probe.summarize([0.01, 3.0], history)
    assert [gap[rate]["best_epoch"] for rate in ("0.01", "3.0")] == [3, 1]
    table = linear_probe.format_table(summary).splitlines()
    assert table[1].split() == ["0.01", "70.00", "94.00", "70.00", "(2)"]
    without = {"0.01": {"top1": 70.0, "top5": None}}
    assert linear_probe.format_table(without).splitlines()[1].split() == ["0.01", "70.00"]
