"""eval_knn.py as a process, on checkpoints of ours and of torchvision."""

import hashlib
import importlib
import json

import pytest
import torch
import torchvision

KNN = importlib.import_module("eval.eval_knn")


def test_checkpoint_of_ours_gives_the_figures_of_training(run_script, image_tree, tmp_path):
    """What training logs after the last epoch is what the evaluation finds in the checkpoint."""
    flags = ("--arch", "conv4", "--image_size", 16, "--batch_size", 8, "--mem_bank_size", 20)
    done = run_script(
        "self_supervised/train_msf_2q.py",
        *(*flags, "--epochs", 1, "--num_workers", 0, "--checkpoint_path", tmp_path, image_tree),
    )
    assert done.returncode == 0, done.stderr
    logged = [json.loads(line) for line in (tmp_path / "log.jsonl").open()][-1]["knn"]

    weights = tmp_path / "ckpt_epoch_1.pth"
    flags = ("--weights", weights, "-k", 3, "-j", 0, "--save", tmp_path / "deep" / "out")
    done = run_script("eval/eval_knn.py", *flags, image_tree)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "deep" / "out" / "knn.json").read_text())
    assert list(record["k"]) == ["1", "3", "5", "10", "20"]
    for k, figures in logged.items():
        assert record["k"][k] == pytest.approx(figures)
    assert record["sha256"] == hashlib.sha256(weights.read_bytes()).hexdigest()
    assert record["counts"] == {"train": 30, "val": 12, "classes": 3}
    assert (record["arch"], record["image_size"], record["epoch"]) == ("conv4", 16, 1)
    assert "-k 3" in record["command"]
    for row in record["k"].values():
        assert 0 <= row["accuracy"] <= 100 and 0 <= row["purity"] <= 100
    assert f"{record['k']['20']['accuracy']:.2f}" in done.stdout


def test_torchvision_weights_against_a_plain_recomputation(call_script, image_tree, tmp_path):
    """1-NN by torchvision's own model and transforms, one image at a time, and torch alone."""
    torch.manual_seed(3)
    model = torchvision.models.resnet18(weights=None)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    flags = ("--weights", tmp_path / "plain.pth", "--arch", "resnet18", "--image_size", 28)
    code, stdout, stderr = call_script(KNN, *flags, "-j", 0, "--save", tmp_path, image_tree)
    assert code == 0, stderr
    record = json.loads((tmp_path / "knn.json").read_text())

    transform = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(32),
            torchvision.transforms.CenterCrop(28),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    model.fc = torch.nn.Identity()
    model.eval()
    features, labels = {}, {}
    for split in ("train", "val"):
        folder = torchvision.datasets.ImageFolder(image_tree / split, transform)
        with torch.no_grad():
            rows = torch.cat([model(image[None]) for image, _ in folder])
        features[split] = rows / rows.norm(dim=1, keepdim=True)
        labels[split] = torch.tensor(folder.targets)
    nearest = torch.cdist(features["val"], features["train"]).argmin(dim=1)
    accuracy = 100 * (labels["train"][nearest] == labels["val"]).double().mean().item()
    assert record["k"]["1"]["accuracy"] == pytest.approx(accuracy)
    assert record["k"]["1"]["purity"] == pytest.approx(accuracy)
