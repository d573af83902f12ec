"""Logistic regression against scikit-learn, closed forms and the gradient of its objective."""

import math

import numpy as np
import pytest
import torch
from torch.autograd.functional import jacobian

from utils.evaluation import logistic
from utils.evaluation.logistic import Fit, fit_path


def overlapping(
    n: int = 200, *, features: int = 6, classes: int = 4, seed: int = 0, scale: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Classes that overlap, correlated features far from 0; float32, as extracted ones are."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, n)
    means, mix = rng.normal(size=(classes, features)), rng.normal(size=(features, features))
    x = (means[labels] + rng.normal(size=(n, features))) @ mix + 5
    return torch.tensor(scale * x, dtype=torch.float32), torch.tensor(labels)


def solve(x, y, l2: float, *, num_classes: int, tolerance: float = 1e-7) -> Fit:
    (fit,) = fit_path(x, y, [l2], num_classes=num_classes, tolerance=tolerance)
    return fit


@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_coefficients_and_predictions_of_scikit_learn(scale):
    """Over 10 decades of strengths, cold and along the path; C is 1 / l2."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = overlapping(scale=scale)
    new, _ = overlapping(500, seed=0, scale=scale)
    strengths = [1e4, 1e2, 1.0, 1e-2, 1e-4, 1e-6]
    path = fit_path(x, y, strengths, num_classes=4, tolerance=1e-7)
    for l2, fit in zip(strengths, path, strict=True):
        theirs = linear_model.LogisticRegression(
            C=1 / l2, solver="newton-cholesky", tol=1e-12, max_iter=1000
        ).fit(x.double().numpy(), y.numpy())
        assert fit.converged and fit.l2 == l2
        size = np.abs(theirs.coef_).max()
        np.testing.assert_allclose(fit.weight, theirs.coef_, rtol=0, atol=2e-5 * size)
        np.testing.assert_allclose(fit.bias, theirs.intercept_, rtol=1e-4, atol=1e-4)
        assert fit.predict(new).tolist() == theirs.predict(new.double().numpy()).tolist()
        torch.testing.assert_close(
            solve(x, y, l2, num_classes=4).weight, fit.weight, rtol=0, atol=2e-5 * size
        )


def test_two_classes_are_scikit_learns_with_half_the_strength():
    """Two opposite weight vectors of half the length: l2/2 (|w/2|^2 + |w/2|^2) = l2/2 |w|^2 / 2."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = overlapping(classes=2)
    fit = solve(x, y, 3.0, num_classes=2)
    theirs = linear_model.LogisticRegression(C=2 / 3.0, tol=1e-12, solver="newton-cholesky")
    theirs.fit(x.double().numpy(), y.numpy())
    np.testing.assert_allclose(fit.weight[1] - fit.weight[0], theirs.coef_[0], rtol=1e-5)
    torch.testing.assert_close(fit.weight[1], -fit.weight[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("l2", [1e3, 1.0, 1e-3])
def test_the_default_tolerance_predicts_as_scikit_learn_does(l2):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = overlapping(400, features=20, classes=5)
    (fit,) = fit_path(x, y, [l2], num_classes=5)
    theirs = linear_model.LogisticRegression(C=1 / l2, solver="newton-cholesky", tol=1e-12)
    expected = theirs.fit(x.double().numpy(), y.numpy()).predict_proba(x.double().numpy())
    ours = torch.softmax(x.double() @ fit.weight.T + fit.bias, dim=1)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=5e-3)


@pytest.mark.parametrize(("n", "features"), [(200, 6), (12, 30)])
@pytest.mark.parametrize("l2", [100.0, 0.1])
def test_the_gradient_of_the_objective_is_zero_at_the_solution(n, features, l2):
    """By autograd of the objective written out; also with fewer images than features."""
    x, y = overlapping(n, features=features)
    fit = solve(x, y, l2, num_classes=4)
    x = x.double()

    def written_out(weight, bias):
        logits = x @ weight.T + bias
        chosen = logits[torch.arange(n), y]
        return (logits.exp().sum(dim=1).log() - chosen).sum() + l2 / 2 * (weight**2).sum()

    gradients = jacobian(written_out, (fit.weight, fit.bias))
    at_zero = jacobian(written_out, (torch.zeros_like(fit.weight), torch.zeros_like(fit.bias)))
    for gradient, first in zip(gradients, at_zero, strict=True):
        assert gradient.abs().max() < 1e-6 * first.abs().max()
    for _ in range(20):  # and it is the minimum
        step = 0.01 * torch.randn_like(fit.weight)
        assert written_out(fit.weight + step, fit.bias) > written_out(fit.weight, fit.bias)


def test_one_dimension_by_hand():
    """x = -1 and 1, a class each: the optimum solves l2 w = 2 sigmoid(-2 w), W = (-w, w)."""
    fit = solve(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]), 0.5, num_classes=2)
    w = fit.weight[1].item()
    assert 0.5 * w == pytest.approx(2 / (1 + math.exp(2 * w)), rel=1e-6)
    assert fit.weight[0].item() == pytest.approx(-w)


def test_separable_classes_stay_finite_and_are_told_apart():
    """Without regularization the weights would be infinite."""
    centers = 10 * torch.eye(3)
    y = torch.arange(30) % 3
    x = centers[y] + torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    fits = list(fit_path(x, y, sorted(logistic.STRENGTHS, reverse=True), num_classes=3))
    assert len(fits) == 45 and all(fit.converged for fit in fits)
    assert all(fit.weight.isfinite().all() for fit in fits)
    assert (fits[-1].predict(x) == y).all() and fits[-1].weight.norm() > fits[0].weight.norm()


def test_fewer_images_than_classes():
    """Classes without an image are never predicted; the others are fitted as if they were all."""
    x, _ = overlapping(5)
    y = torch.tensor([7, 2, 2, 4, 7])
    fit = solve(x, y, 1.0, num_classes=9)
    assert fit.weight.shape == (9, 6) and fit.bias.shape == (9,)
    absent = [label for label in range(9) if label not in (2, 4, 7)]
    assert (fit.weight[absent] == 0).all() and (fit.bias[absent] == -torch.inf).all()
    assert set(fit.predict(overlapping(300)[0]).tolist()) <= {2, 4, 7}
    alone = solve(x, torch.tensor([2, 0, 0, 1, 2]), 1.0, num_classes=3)
    torch.testing.assert_close(fit.weight[[2, 4, 7]], alone.weight)
    torch.testing.assert_close(fit.bias[[2, 4, 7]], alone.bias)


def test_features_without_any_difference_leave_the_frequencies():
    y = torch.tensor([0, 1, 1, 1])
    fit = solve(torch.ones(4, 3), y, 1.0, num_classes=2)
    shares = torch.softmax(fit.bias + fit.weight @ torch.ones(3).double(), dim=0)
    assert shares.tolist() == pytest.approx([0.25, 0.75])


def test_too_few_iterations_are_said_to_be():
    x, y = overlapping()
    (fit,) = fit_path(x, y, [1e-3], num_classes=4, max_iterations=2)
    assert not fit.converged and fit.iterations == 2


def test_the_grid_is_that_of_kornblith_et_al():
    assert len(logistic.STRENGTHS) == 45
    np.testing.assert_allclose(logistic.STRENGTHS, np.logspace(-6, 5, 45), rtol=1e-12)
