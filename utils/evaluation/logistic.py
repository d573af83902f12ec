"""L2-regularized multinomial logistic regression, solved to a tolerance.

N images, F feature size, C classes. The objective is scikit-learn's with C = 1 / l2 (from three
classes on; for two, scikit-learn has one weight vector where this has two of half its length):

    sum over images of the cross-entropy of softmax(W x + b)  +  l2 / 2 * sum of squares of W

The bias is not penalized. L-BFGS over all images at once, in float64.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Kornblith et al., "Do better ImageNet models transfer better?", 2019: 45 values, 1e-6 to 1e5.
STRENGTHS = tuple(10 ** (quarter / 4) for quarter in range(-24, 21))
TOLERANCE = 1e-4  # of the gradient, relative to that of a classifier with weights 0
MAX_ITERATIONS = 1000  # for one strength
_LEAST_GRADIENT = 1e-7  # where rounding of the objective begins to hide progress
_HISTORY = 20  # steps from which L-BFGS knows the curvature


class Fit(NamedTuple):
    """A classifier: weight (C, F), bias (C,), float64, on the features' device.

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


def fit_path(
    features: Tensor,
    labels: Tensor,
    strengths: Iterable[float],
    *,
    num_classes: int,
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> Iterator[Fit]:
    """A `Fit` for each l2 > 0 of strengths, in their order, each started from the one before.

    features: (N, F), any scale, finite, on the device to compute on. labels: (N,) int64 in 0 to
    C - 1, not all of which need an image. From strong to weak is the fast order.

    Features are moved to mean 0, which the free bias makes up for, and turned to their principal
    axes, which changes no length. In these coordinates each weight has a unit of its own, in which
    the objective / N has a second derivative of about one where all classes are likely (a bound in
    the manner of Boehning, "Multinomial logistic regression algorithm", 1992). It is the same
    problem with the same optimum, but L-BFGS converges in tens of steps on correlated features.

    tolerance: of the largest component of the gradient, in these units, relative to the weights'
    largest where weights are 0 and the bias is the best for that; at least 1e-7.
    """
    x = features.double()
    mean = x.mean(dim=0)
    x = x - mean
    variances, axes = torch.linalg.eigh(x.T @ x / len(x))
    rank = min(x.shape)  # along the other axes there is nothing, so weights are 0
    variances, axes = variances[-rank:].clamp(min=0), axes[:, -rank:]
    x = x @ axes
    present, y = labels.to(x.device).unique(return_inverse=True)
    members = F.one_hot(y).to(x).T / len(y)  # (C, N)
    at_zero = members @ x  # the gradient of weights that are 0, but for the sign
    weight, bias = torch.zeros_like(at_zero), members.sum(dim=1).log()
    bias -= bias.mean()
    share = 1 / max(2, len(present))
    curvature = share * (1 - share)  # of the cross-entropy in a logit
    for l2 in strengths:
        unit = (curvature * variances + l2 / len(y)).rsqrt()
        weight, bias, converged, steps = _minimize(
            *(x, y, weight, bias),
            penalty=l2 / len(y),
            units=(unit, curvature**-0.5),
            tolerance=max(tolerance * (at_zero * unit).abs().max().item(), _LEAST_GRADIENT),
            max_iterations=max_iterations,
        )
        # Of the features as they were given, with a row for every class.
        turned = weight @ axes.T
        whole_weight = turned.new_zeros(num_classes, turned.shape[1])
        whole_bias = bias.new_full((num_classes,), -torch.inf)
        whole_weight[present] = turned
        whole_bias[present] = bias - turned @ mean
        yield Fit(whole_weight, whole_bias, l2, converged, steps)


def _minimize(
    x: Tensor,
    y: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    penalty: float,
    units: tuple[Tensor, float],
    tolerance: float,
    max_iterations: int,
) -> tuple[Tensor, Tensor, bool, int]:
    """The optimum of the objective / N, from a start; whether it was reached, and the steps made.

    units: of the weights (F,) and biases that L-BFGS sees.
    """
    unit, bias_unit = units
    w, b = (weight / unit).requires_grad_(), (bias / bias_unit).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [w, b],
        max_iter=max_iterations,
        max_eval=2 * max_iterations,
        tolerance_grad=tolerance,
        tolerance_change=torch.finfo(w.dtype).eps ** 2,  # only the gradient says when
        history_size=_HISTORY,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        """The objective, with its gradient."""
        optimizer.zero_grad()
        weight = w * unit
        loss = F.cross_entropy(F.linear(x, weight, b * bias_unit), y)
        loss = loss + penalty / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    closure()
    gradient = max(w.grad.abs().max().item(), b.grad.abs().max().item())
    steps = optimizer.state[w]["n_iter"]
    return w.detach() * unit, b.detach() * bias_unit, gradient <= tolerance, steps
