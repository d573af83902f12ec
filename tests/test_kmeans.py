"""k-means: against a slow Lloyd loop, scikit-learn, and by properties."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import normalize

from utils.method.kmeans import ITERATIONS, kmeans


def blobs(*, count=60, centers=4, noise=0.05, seed=0):
    """Unit vectors around well-separated directions, and which direction each is of."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.arange(count) % centers
    rows = torch.eye(8)[truth] + noise * torch.randn(count, 8, generator=generator)
    return normalize(rows, dim=1), truth


def squared_distances(rows, centers):
    return ((rows.double()[:, None] - torch.from_numpy(centers).double()) ** 2).sum(dim=2)


def lloyd(rows, centers):
    """Assign each row to its nearest center, move each center to the mean of its rows; repeat."""
    centers = [center.double() for center in centers]
    for _ in range(ITERATIONS):
        groups = [[] for _ in centers]
        for row in rows.double():
            distances = [((row - center) ** 2).sum().item() for center in centers]
            groups[distances.index(min(distances))].append(row)
        assert all(groups)  # or faiss would have moved a center
        centers = [sum(group) / len(group) for group in groups]
    return torch.stack(centers)


def test_as_a_slow_loop_from_the_same_first_centers(monkeypatch):
    """faiss without iterations gives the first centers."""
    rows = normalize(torch.randn(150, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    with monkeypatch.context() as patch:
        patch.setattr("utils.method.kmeans.ITERATIONS", 0)
        first = kmeans(rows, num_clusters=8, seed=[3]).centers
    assert all((row == rows).all(dim=1).any() for row in torch.from_numpy(first))
    found = kmeans(rows, num_clusters=8, seed=[3])
    expected = lloyd(rows, torch.from_numpy(first))
    torch.testing.assert_close(
        torch.from_numpy(found.centers).double(), expected, rtol=0, atol=1e-5
    )


def assert_consistent(rows, found):
    """Each row at its nearest center, with the distance to it."""
    distances = squared_distances(rows, found.centers)
    own = distances.gather(1, torch.from_numpy(found.assignments)[:, None]).squeeze(1)
    assert (own <= distances.min(dim=1).values + 1e-5).all()
    torch.testing.assert_close(
        torch.from_numpy(found.squared_distance).double(), own, rtol=0, atol=1e-5
    )


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 30),
    different=st.integers(1, 30),
    num_clusters=st.integers(1, 40),
    seed=st.integers(0, 2**63 - 1),
)
def test_any_number_of_rows_clusters_and_duplicates(count, different, num_clusters, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = normalize(torch.randn(different, 3, generator=generator), dim=1)
    rows = rows[torch.randint(different, (count,), generator=generator)]
    found = kmeans(rows, num_clusters=num_clusters, seed=[seed, 1])
    assert found.assignments.shape == (count,) and found.assignments.dtype == np.int64
    assert len(found.centers) == min(num_clusters, count)
    assert found.assignments.min() >= 0 and found.assignments.max() < len(found.centers)
    assert (found.squared_distance >= 0).all()
    assert_consistent(rows, found)
    same = (rows[:, None] == rows).all(dim=2).numpy()
    assert (found.assignments[:, None] == found.assignments)[same].all()


def test_inertia_is_that_of_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    rows, truth = blobs(count=400, noise=0.3)
    ours = min(
        kmeans(rows, num_clusters=6, seed=[s]).squared_distance.mean().item() for s in range(10)
    )
    theirs = cluster.KMeans(6, n_init=10, init="random", random_state=0).fit(rows.numpy())
    assert ours <= 1.01 * theirs.inertia_ / len(rows)


def test_clear_clusters_are_found_and_the_seed_decides():
    rows, truth = blobs()
    fits = [kmeans(rows, num_clusters=12, seed=[s, 5]) for s in (1, 1, 2)]
    for fit in fits:
        for number in np.unique(fit.assignments):
            assert len(truth[torch.from_numpy(fit.assignments == number)].unique()) == 1
    assert np.array_equal(fits[0].assignments, fits[1].assignments)
    assert np.array_equal(fits[0].centers, fits[1].centers)
    assert not np.array_equal(fits[0].centers, fits[2].centers)


def test_no_rows_and_no_sample(capfd):
    nothing = kmeans(torch.empty(0, 4), num_clusters=3, seed=[0])
    assert [len(part) for part in nothing] == [0, 0, 0] and nothing.assignments.dtype == np.int64
    rows = normalize(torch.randn(700, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    (center,) = kmeans(rows, num_clusters=1, seed=[0]).centers  # faiss would take 256 rows
    torch.testing.assert_close(torch.from_numpy(center), rows.mean(dim=0), rtol=0, atol=1e-5)
    kmeans(rows[:20].double(), num_clusters=15, seed=[0])
    assert capfd.readouterr() == ("", "")  # faiss has no warning of few rows
