"""`--bank_precision fp16`: every method trains, saves, resumes and is shown with such a bank."""

import pytest
import test_engine
import tiny
import torch

from eval import show_neighbors
from self_supervised import train_msf, train_msf_2q, train_msf_km
from semi_supervised import train_pseudo_cmsf
from supervised import train_sup_msf
from utils.method.memory_bank import MemoryBank
from utils.method.neighbors import nearest
from utils.method.ranks import plain_ranks

FP16 = ("--bank_precision", "fp16", "--epochs", 2, "--save_freq", 1, "--knn_freq", -1)
RUNS = {
    "msf": (train_msf, ()),
    "2q": (train_msf_2q, ("--topkp", 3)),
    "km": (train_msf_km, ("--num_clusters", 4)),
    "supervised": (train_sup_msf, ()),
    "top-all": (train_sup_msf, ("--topk", "all")),
    "pseudo-labels": (
        train_pseudo_cmsf,
        ("--label_fraction", 0.5, "--cache_sup", "--pseudo_lbl_epochs", 2),
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_each_method_trains_and_resumes(call_script, image_tree, tmp_path, name):
    script, extra = RUNS[name]
    command = (script, *tiny.FLAGS, *FP16, *extra, image_tree)
    assert call_script(*command, "--checkpoint_path", tmp_path / "whole")[0] == 0
    state = tiny.state(tmp_path / "whole" / "ckpt_epoch_2.pth")["state_dict"]
    banks = [v for n, v in state.items() if n.endswith(("bank.features", "cache.features"))]
    assert banks and all(value.dtype == torch.float16 for value in banks)
    first = tmp_path / "whole" / "ckpt_epoch_1.pth"
    again = ("--checkpoint_path", tmp_path / "resumed", "--resume", first)
    assert call_script(*command, *again)[0] == 0
    tiny.assert_same_checkpoint(
        tmp_path / "whole" / "ckpt_epoch_2.pth", tmp_path / "resumed" / "ckpt_epoch_2.pth"
    )
    weights = ("--weights", tmp_path / "whole" / "ckpt_epoch_2.pth", "--neighbors", 3, "--count", 2)
    output = ("--output", tmp_path / "shown.png")
    code, _, error = call_script(show_neighbors, *weights, *output, image_tree)
    assert code == 0, error


def test_a_bank_of_like_rows_is_saved(tmp_path):
    """The sum of its entries, by which the run knows it as finite, is beyond float16."""
    model = test_engine.Method()
    model.bank = MemoryBank(2**17, 1)
    model.bank.store_as(torch.float16)
    model.bank.enqueue(torch.ones(2**17, 1), label=torch.zeros(2**17), index=torch.zeros(2**17))
    test_engine.train(test_engine.make_run(tmp_path, model=model))
    assert "ckpt_epoch_3.pth" in test_engine.names(tmp_path)


def test_half_queries_are_compared_as_float32():
    """Similarities that float16 cannot tell apart keep their order: rows of a bank as queries."""
    rows = torch.tensor([[1, 2**-6, 0], [1, 0, 0], [1, 0, 2**-6]], dtype=torch.float16)
    query = rows[2:]
    found = nearest(query, rows, k=3)
    assert found.rows.tolist()[0][0] == 2
    assert plain_ranks(query, rows, found).tolist()[0][0] == 1
