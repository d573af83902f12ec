"""Where features lie: two axes to draw them on, and which classes k-NN takes for which."""

import numpy as np

_ROUNDING = 4e-7  # of features, float32: what differs by less is the same


def principal_axes(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The features on their two principal axes, and the variance that each explains.

    features: (N, F) float32. Returns (N, 2) float64, centered, and (2,) percent. An axis points to
    where the point farthest out on it lies (the first of several), so that nothing is left to the
    eigenvectors' signs. An axis without variance is 0 throughout.
    """
    centered = features.astype(np.float64)
    squares = np.square(centered).sum()
    centered -= centered.mean(axis=0)
    wide = len(features) < features.shape[1]  # the smaller of both products has the same axes
    values, vectors = np.linalg.eigh(centered @ centered.T if wide else centered.T @ centered)
    values, vectors = values[:-3:-1], vectors[:, :-3:-1]
    values = np.where(values > _ROUNDING**2 * squares, values, 0)
    places = vectors * np.sqrt(values) if wide else centered @ vectors * (values > 0)
    out = np.abs(places)
    farthest = (out >= out.max(axis=0) * (1 - 1e-6)).argmax(axis=0)
    places *= np.where(np.take_along_axis(places, farthest[None], axis=0) < 0, -1, 1)
    explained = 100 * values / max(np.square(centered).sum(), np.finfo(float).tiny)
    missing = 2 - len(values)  # of a single point, or a single feature
    return np.pad(places, ((0, 0), (0, missing))), np.pad(explained, (0, missing))


def has_tsne() -> bool:
    """Whether scikit-learn, which has t-SNE, is installed."""
    try:
        import sklearn.manifold  # noqa: F401
    except ImportError:
        return False
    return True


def tsne(features: np.ndarray, *, seed: int) -> tuple[np.ndarray, float]:
    """The features (N, F) float32 on a map by scikit-learn's t-SNE (N, 2), and its perplexity.

    By one thread: several add up in another order each time, and the map would differ.
    """
    perplexity = min(30.0, (len(features) - 1) / 3)
    if np.ptp(features, axis=0).max() <= _ROUNDING * np.abs(features).max():
        return np.zeros((len(features), 2)), perplexity  # all in one place
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits  # scikit-learn needs it, so that it is there

    reduced = TSNE(init="pca", perplexity=perplexity, random_state=seed % 2**32)
    with threadpool_limits(1):
        return reduced.fit_transform(features), perplexity


def confusions(labels: np.ndarray, predicted: np.ndarray, *, num_classes: int) -> np.ndarray:
    """How many images of each class (row) are taken for each (column), (C, C) int64.

    labels, predicted: (N,) int64 in 0 to C - 1.
    """
    pairs = np.bincount(labels * num_classes + predicted, minlength=num_classes**2)
    return pairs.reshape(num_classes, num_classes)


def most_frequent(counts: np.ndarray, *, most: int) -> list[tuple[int, int, int]]:
    """The confusions that befall most images: class, class taken for, number of images."""
    wrong = counts * ~np.eye(len(counts), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:most]
    pairs = zip(*np.unravel_index(order, counts.shape), strict=True)
    return [(int(i), int(j), int(wrong[i, j])) for i, j in pairs if wrong[i, j]]
