"""Runs that are killed, stopped, starved and damaged: see `reliability`."""

import pytest
import reliability
import tiny
import torch
from conftest import ROOT

from self_supervised.train_msf_2q import CMSF2Q
from self_supervised.train_msf_km import CMSFKM
from semi_supervised.pseudo_label import PseudoLabelHead
from semi_supervised.train_pseudo_cmsf import PseudoCMSF
from supervised.train_sup_msf import SupervisedCMSF
from utils.data.demo_data import draw_data_set


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("reliability")


@pytest.fixture(scope="module")
def other_scratch(tmp_path_factory):
    """For the tests in full counts, whose files have the same names."""
    return tmp_path_factory.mktemp("full_counts")


@pytest.fixture(scope="module")
def data():
    return draw_data_set(ROOT / "data" / "demo")


def methods(encoders):
    """Each regime's method on given encoders, with a bank that other batches have filled."""
    head = PseudoLabelHead("mlp", encoders.proj_dim, 3)
    labeled = torch.arange(12) % 2 == 0
    return {
        "2Q": CMSF2Q(encoders, 12, mem_bank_size=7, topk=2, topkp=2),
        "KM": CMSFKM(encoders, 12, mem_bank_size=7, topk=2, num_clusters=3),
        "supervised": SupervisedCMSF(encoders, 3, mem_bank_size=7, topk=2),
        "semi-supervised": PseudoCMSF(
            encoders, head, labeled, mem_bank_size=7, topk=2, cache_size=5
        ),
    }


@pytest.mark.parametrize("regime", ["2Q", "KM", "supervised", "semi-supervised"])
@pytest.mark.parametrize("place", ["query", "target"])
def test_what_is_not_finite_ends_the_run(regime, place):
    """A view that is broken, of query or target, makes the loss nan."""
    model = methods(tiny.encoders())[regime].double()
    *batches, last = tiny.random_batches(5)
    for batch in batches:
        model(batch)
    view = f"{place}_view"
    broken = getattr(last, view).clone()
    broken[1, 0, 0, 0] = torch.nan
    loss, _ = model(last._replace(**{view: broken}))
    assert loss.isnan()


def assert_all_survived(*rows):
    assert rows and not [row for row in rows if row.survived != row.times]


def test_killed_runs_end_with_the_bits_of_an_undisturbed_one(scratch, data):
    """The other regimes, without workers, and stopped runs: below, in full counts."""
    assert_all_survived(reliability.kill_and_resume("2Q", scratch, data, kills=2, workers=2))


def test_killed_while_saving(scratch):
    assert_all_survived(reliability.kill_while_saving(scratch, kills=8))


def test_damaged_files_are_refused_and_passed_over(scratch, data):
    assert_all_survived(*reliability.damage(scratch, data, flips=5))


def test_killed_worker(scratch, data):
    assert_all_survived(reliability.kill_workers(scratch, data, times=1))


def test_full_disk(scratch, data):
    try:
        assert_all_survived(reliability.fill_disk(scratch, data, times=1))
    except PermissionError as error:
        pytest.skip(str(error))


@pytest.mark.slow
@pytest.mark.parametrize("part", reliability.FULL_COUNTS)
def test_full_counts(other_scratch, data, part):
    rows = reliability.rows_of(part, other_scratch, data)
    if part == "disk" and not rows:
        pytest.skip("no file system can be mounted")
    print(reliability.table(rows))
    assert_all_survived(*rows)
