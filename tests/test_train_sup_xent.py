"""Cross-entropy: steps against the formula, and the script with all that reads its checkpoints."""

import copy
import importlib
import json

import pytest
import tiny
import torch
from conftest import ROOT, write_image
from torch import nn

from supervised.train_sup_xent import CrossEntropy
from utils.method.encoders import SoleBackbone

SCRIPT = importlib.import_module("supervised.train_sup_xent")
FLAGS = (
    *("--arch", "conv4", "--image_size", 16, "--batch_size", 8, "--num_workers", 0),
    *("--print_freq", 2),
)
GIVEN = torch.tensor([1, 1, 0, 2, 2, 0, 0, 1, 2, 1, 0, 2])


def tiny_model(*, given=None):
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.ReLU())
    return CrossEntropy(SoleBackbone(backbone), 8, 3, given=given).double()


@pytest.mark.parametrize("given", [None, GIVEN], ids=["own", "given"])
def test_twelve_sgd_steps_as_the_formula_says(given):
    """The mean over the batch of -log of the softmax at the image's class."""
    model = tiny_model(given=given)
    backbone = copy.deepcopy(model.encoders.query_encoder.backbone)
    classifier = copy.deepcopy(model.classifier)
    ours, theirs = tiny.sgd(model), tiny.sgd(backbone, classifier)
    for batch in tiny.random_batches(12):
        loss, stats = model(batch)
        features = backbone(batch.query_view)
        logits = features @ classifier.weight.T + classifier.bias
        labels = [int(given[i]) if given is not None else int(i) % 3 for i in batch.index]
        shares = [row.exp() / row.exp().sum() for row in logits]
        expected = -sum(row[n].log() for row, n in zip(shares, labels, strict=True)) / 4
        assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
        hits = [int(row.argmax()) == n for row, n in zip(shares, labels, strict=True)]
        assert stats["accuracy"].item() == pytest.approx(25 * sum(hits))
        health = model.diagnostics()
        lengths = torch.linalg.vector_norm(features, dim=1, keepdim=True)
        mean = (features / lengths).mean(dim=0)
        assert health["spread"].item() == pytest.approx(
            (1 - mean.square().sum()).sqrt().item(), abs=1e-6
        )
        assert 1 <= health["effective_rank"] <= 4
        tiny.update(ours, loss)
        tiny.update(theirs, expected)


@pytest.fixture(scope="module")
def flags_of_run(image_tree):
    return (*FLAGS, "--epochs", 3, "--save_freq", 1, "--cos", image_tree)


def test_script_resumes_and_its_checkpoints_are_read(
    call_script, image_tree, tmp_path, flags_of_run
):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder, extra in ((whole, ()), (broken, ("--resume", whole / "ckpt_epoch_1.pth"))):
        code, stdout, stderr = call_script(
            SCRIPT, *flags_of_run, "--checkpoint_path", folder, *extra
        )
        assert code == 0, stderr
        assert "\ncross-entropy" in stdout and "WARNING" not in stdout
    last = whole / "ckpt_epoch_3.pth"
    tiny.assert_same_checkpoint(last, broken / "ckpt_epoch_3.pth")
    lines = [json.loads(line) for line in (whole / "log.jsonl").open()]
    assert {"loss", "accuracy", "spread", "effective_rank", "lr"} <= lines[0].keys()
    assert [line["val_accuracy"] for line in lines if "val_accuracy" in line] == [
        pytest.approx(own_accuracy(last, image_tree), abs=1e-4)
    ]
    assert not (whole / "label_noise.txt").exists()

    knn, linear = (
        importlib.import_module("eval.eval_knn"),
        importlib.import_module("eval.eval_linear"),
    )
    code, stdout, stderr = call_script(knn, "--weights", last, "--save", tmp_path, image_tree)
    assert code == 0, stderr
    figures = json.loads((tmp_path / "knn.json").read_text())
    assert str(lines[-1]["knn"]["20"]["accuracy"]) in json.dumps(figures)
    flags = ("--weights", last, "--cached", "--epochs", 1, "--cache_dir", tmp_path)
    code, _, stderr = call_script(linear, *flags, image_tree)
    assert code == 0, stderr
    code, _, stderr = call_script(knn, "--weights", last, "--use-target", image_tree)
    assert code == 2 and "no target encoder" in stderr


def own_accuracy(path, image_tree):
    """The classifier's accuracy by hand: build the network, read its weights, look at val/."""
    from utils.data.datasets import read_split
    from utils.data.eval_loader import EvalLoader
    from utils.method.encoders import Conv4

    state = tiny.state(path)["state_dict"]
    network = Conv4(3)
    prefix = "encoders.query_encoder.backbone."
    own = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
    own |= {n.replace("classifier", "fc"): v for n, v in state.items() if "classifier" in n}
    network.load_state_dict(own)
    network.eval()
    loader = EvalLoader(read_split(image_tree, "val"), batch_size=5, image_size=16)
    with torch.no_grad():
        hits = [network(b.images).argmax(dim=1) == b.label for b in loader]
    return 100 * torch.cat(hits).float().mean().item()


def test_weights_go_both_ways(call_script, image_tree, tmp_path):
    """From CMSF to cross-entropy and back: the backbone, bit for bit."""
    msf = importlib.import_module("self_supervised.train_msf")
    still = ("--learning_rate", 0, "--weight_decay", 0, "--epochs", 1, "--knn_freq", -1)
    bank = ("--mem_bank_size", 20, "--topk", 3)
    name = "ckpt_epoch_1.pth"
    for module, folder, extra in (
        (msf, "a", bank),
        (SCRIPT, "b", ("--weights", tmp_path / "a" / name, "--seed", 1)),
        (msf, "c", (*bank, "--weights", tmp_path / "b" / name, "--seed", 2)),
    ):
        flags = (*FLAGS, *still, *extra, "--checkpoint_path", tmp_path / folder)
        code, stdout, stderr = call_script(module, *flags, image_tree)
        assert code == 0, stderr
        assert "--weights" not in map(str, extra) or "backbone only" in stdout
    one, two, three = (tiny.state(tmp_path / folder / name)["state_dict"] for folder in "abc")
    prefix = "encoders.query_encoder.backbone."
    names = [n for n in one if n.startswith(prefix) and n.endswith("weight")]
    assert len(names) == 8
    assert all(torch.equal(one[n], two[n]) and torch.equal(one[n], three[n]) for n in names)


def test_label_noise_changes_training_and_not_the_evaluation(call_script, image_tree, tmp_path):
    flags = (*FLAGS, "--epochs", 1, "--learning_rate", 0, "--checkpoint_path", tmp_path)
    figures = []
    for extra in ((), ("--label_noise", 1)):
        assert call_script(SCRIPT, *flags, *extra, image_tree)[0] == 0
        lines = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
        figures.append((lines[0]["loss"], lines[-1]["knn"], lines[-3]["val_accuracy"]))
    assert figures[0][0] != figures[1][0] and figures[0][1:] == figures[1][1:]
    assert len((tmp_path / "label_noise.txt").read_text().splitlines()) == 30


def test_speed_flags_change_no_layout(call_script, image_tree, tmp_path):
    flags = (*FLAGS, "--epochs", 1, "--knn_freq", -1, image_tree)
    fast = ("--precision", "bf16", "--channels_last", "--tf32")
    for folder, extra in (("fp32", ()), ("bf16", fast)):
        result = call_script(SCRIPT, *flags, *extra, "--checkpoint_path", tmp_path / folder)
        assert result[0] == 0, result
    plain, other = (tiny.tensors(tiny.state(p)) for p in sorted(tmp_path.rglob("*.pth")))
    assert plain.keys() == other.keys()
    assert all(plain[name].dtype == other[name].dtype for name in plain)


def test_script_runs_from_its_folder(run_script, image_tree, tmp_path):
    flags = (*FLAGS, "--debug", "--view", "weak", "--checkpoint_path", tmp_path, image_tree)
    done = run_script("supervised/train_sup_xent.py", *flags, cwd=ROOT / "supervised")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "ckpt_epoch_2.pth").exists()


def test_bad_input(call_script, image_tree, tmp_path):
    write_image(tmp_path / "train" / "a" / "1.jpg", seed=1)
    for flags, data, words in (
        (("--view", "both"), image_tree, ("--view", "both")),
        (("--label_noise", 1.5), image_tree, ("--label_noise", "1.5")),
        (("--label_noise", 0.1, "--label_file", "x"), image_tree, ("--label_file", "not allowed")),
        (("--topk", 3), image_tree, ("--topk",)),
        (("--bn", "shuffle"), image_tree, ("--bn", "shuffle")),
        (("--batch_size", 1), image_tree, ("--batch_size 1",)),
        (("--knn_freq", -1), tmp_path, ("one class",)),
        ((), image_tree / "train" / "a", ("labels need class folders",)),
    ):
        code, _, stderr = call_script(SCRIPT, *FLAGS, *flags, data)
        assert code == 2 and stderr.count("\n") == 1
        assert all(word in stderr for word in words), stderr
