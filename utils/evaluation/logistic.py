"""L2-regularized multinomial logistic regression, solved to a tolerance.

N images, F feature size, C classes. The objective is scikit-learn's with C = 1 / l2 (from three
classes on; for two, scikit-learn has one weight vector where this has two of half its length):

    sum over images of the cross-entropy of softmax(W x + b)  +  l2 / 2 * sum of squares of W

The bias is not penalized. L-BFGS over all images at once, in float64 where the device has it.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.runtime.errors import RunError

# Kornblith et al., "Do better ImageNet models transfer better?", 2019: 45 values, 1e-6 to 1e5.
STRENGTHS = tuple(10 ** (quarter / 4) for quarter in range(-24, 21))
TOLERANCE = 1e-4  # of the gradient, relative to that of a classifier with weights 0
MAX_ITERATIONS = 1000  # for one strength
_LEAST_GRADIENT = 1e-7  # where rounding of the objective begins to hide progress
_HISTORY = 20  # steps from which L-BFGS knows the curvature


class Fit(NamedTuple):
    """A classifier: weight (C, F), bias (C,), both on the features' device.

    A class without a training image has weights 0 and bias -inf, the limit of the optimum. l2: its
    regularization. converged: whether the gradient reached the tolerance. iterations: of L-BFGS.
    """

    weight: Tensor
    bias: Tensor
    l2: float
    converged: bool
    iterations: int

    def predict(self, features: Tensor) -> Tensor:
        """The most likely class, (N,) int64, of features (N, F) on the classifier's device."""
        return F.linear(features.to(self.weight), self.weight, self.bias).argmax(dim=1)


def objective(fit: Fit, features: Tensor, labels: Tensor) -> Tensor:
    """The module's objective at a fit, a scalar that can be differentiated."""
    logits = F.linear(features.to(fit.weight), fit.weight, fit.bias)
    penalty = fit.l2 / 2 * fit.weight.square().sum()
    return F.cross_entropy(logits, labels, reduction="sum") + penalty


class Problem:
    """A training set, turned so that L-BFGS converges in tens of steps on correlated features.

    Features are moved to mean 0, which the free bias makes up for, and turned to their principal
    axes, which changes no length. In these coordinates each weight has a unit of its own, in which
    the objective / N has a second derivative of about one where all classes are likely (a bound in
    the manner of Boehning, "Multinomial logistic regression algorithm", 1992). It is the same
    problem with the same optimum.

    features: (N, F), any scale, on the device to compute on. labels: (N,) int64 in 0 to C - 1, not
    all of which need an image. Raises RunError for features that are not finite.
    """

    def __init__(self, features: Tensor, labels: Tensor, *, num_classes: int) -> None:
        if not features.isfinite().all():
            raise RunError("features that are not finite; are the network's weights finite?")
        dtype = torch.float32 if features.device.type == "mps" else torch.float64
        features = features.to(dtype)
        self._mean = features.mean(dim=0)
        features = features - self._mean
        variances, axes = torch.linalg.eigh(features.T @ features / len(features))
        rank = min(features.shape)  # along the other axes there is nothing, so weights are 0
        self._variances, self._axes = variances[-rank:].clamp(min=0), axes[:, -rank:]
        self._x = features @ self._axes
        self._present, self._y = labels.to(features.device).unique(return_inverse=True)
        members = F.one_hot(self._y).to(dtype).T / len(self._y)  # (C, N)
        self._priors = members.sum(dim=1)
        self._first_gradient = members @ self._x  # of the weights where all are 0, but for the sign
        self._num_classes = num_classes

    def path(
        self,
        strengths: Iterable[float],
        *,
        tolerance: float = TOLERANCE,
        max_iterations: int = MAX_ITERATIONS,
    ) -> Iterator[Fit]:
        """A `Fit` for each l2 > 0 of strengths, in their order, each started from the one before.

        From strong to weak is the fast order. tolerance: of the largest component of the gradient,
        in the units of the class's docstring, relative to the weights' largest where weights are 0
        and the bias is the best for that; where that asks for less than 1e-7, 1e-7 will do.
        """
        weight, bias = torch.zeros_like(self._first_gradient), self._priors.log()
        bias -= bias.mean()
        for l2 in strengths:
            weight, bias, converged, iterations = self._minimize(
                weight, bias, l2, tolerance=tolerance, max_iterations=max_iterations
            )
            yield self._fit(weight, bias, l2, converged, iterations)

    def _minimize(
        self, weight: Tensor, bias: Tensor, l2: float, *, tolerance: float, max_iterations: int
    ) -> tuple[Tensor, Tensor, bool, int]:
        """The optimum, from a start; whether it was reached, and the steps made."""
        share = 1 / max(2, len(bias))
        curvature = share * (1 - share)  # of the cross-entropy in a logit
        penalty = l2 / len(self._y)
        unit = (curvature * self._variances + penalty).rsqrt()
        bias_unit = curvature**-0.5
        first = (self._first_gradient * unit).abs().max().item()
        tolerance = max(tolerance * first, _LEAST_GRADIENT)
        w, b = (weight / unit).requires_grad_(), (bias / bias_unit).requires_grad_()

        def closure() -> Tensor:
            """The objective, with its gradient."""
            optimizer.zero_grad()
            weight = w * unit
            loss = F.cross_entropy(F.linear(self._x, weight, b * bias_unit), self._y)
            loss = loss + penalty / 2 * weight.square().sum()
            loss.backward()
            return loss

        optimizer = torch.optim.LBFGS(
            [w, b],
            max_iter=max_iterations,
            max_eval=2 * max_iterations,
            tolerance_grad=tolerance,
            tolerance_change=torch.finfo(w.dtype).eps ** 2,  # only the gradient says when
            history_size=_HISTORY,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(closure)
        closure()
        gradient = max(w.grad.abs().max().item(), b.grad.abs().max().item())
        steps = optimizer.state[w]["n_iter"]
        return w.detach() * unit, b.detach() * bias_unit, gradient <= tolerance, steps

    def _fit(
        self, weight: Tensor, bias: Tensor, l2: float, converged: bool, iterations: int
    ) -> Fit:
        """The classifier of the features as they were given, with a row for every class."""
        weight = weight @ self._axes.T
        whole_weight = weight.new_zeros(self._num_classes, weight.shape[1])
        whole_bias = bias.new_full((self._num_classes,), -torch.inf)
        whole_weight[self._present] = weight
        whole_bias[self._present] = bias - weight @ self._mean
        return Fit(whole_weight, whole_bias, l2, converged, iterations)
