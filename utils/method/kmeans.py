"""k-means of embeddings by faiss: the clusters that constrain CMSF-KM (CMSF sec. 3.1)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from utils.runtime import faiss_library

# Lloyd iterations of a fit; the default of faiss is 25, and the last ones move few images.
ITERATIONS = 20


class Clustering(NamedTuple):
    """What k-means found for n embeddings, with k at most the number of clusters asked for.

    assignments: (n,) int64, 0 to k - 1, the nearest center of each; not every center need have
    one. squared_distance: (n,) float32, to that center. centers: (k, D) float32.
    """

    assignments: np.ndarray
    squared_distance: np.ndarray
    centers: np.ndarray


def kmeans(embeddings: Tensor, *, num_clusters: int, seed: Sequence[int]) -> Clustering:
    """Euclidean k-means: `ITERATIONS` Lloyd steps from random rows, on the GPU if faiss has one.

    embeddings: (n, D), finite, on the host. With n at most num_clusters each row is a
    center, and equal rows share the first one. A cluster that runs empty takes part of a large one
    (faiss). All rows are used, unlike faiss's default, which fits a sample. seed: integers that the
    first centers follow from; with them and the same number of threads the result is the same,
    bit for bit on a CPU. Raises InputError without faiss.
    """
    rows = np.ascontiguousarray(embeddings.float().numpy())
    faiss = faiss_library.load("k-means")
    fit = faiss.Kmeans(
        rows.shape[1],
        min(num_clusters, len(rows)),
        niter=ITERATIONS,
        seed=int(np.random.default_rng(seed).integers(2**31)),
        gpu=1 if faiss_library.has_gpu(faiss) else False,
        min_points_per_centroid=1,
        max_points_per_centroid=len(rows),
    )
    fit.train(rows)
    squared_distance, assignments = fit.assign(rows)
    return Clustering(assignments, np.maximum(squared_distance, 0), fit.centroids)
