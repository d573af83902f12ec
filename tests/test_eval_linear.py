"""eval_linear.py: the protocol, fine-tuning, and what it refuses."""

import importlib
import json

import numpy as np
import pytest
import torch
import torchvision
from conftest import write_image
from linear_runs import QUICK, assert_same_bits, load
from test_bad_input import assert_refused

from utils.cli import build_evaluation
from utils.data import augment, cropping, image_cache, random_draws
from utils.data.batches import epoch_batches
from utils.data.datasets import read_split
from utils.data.eval_loader import LabeledLoader
from utils.evaluation import linear_run
from utils.method import checkpoint
from utils.method.encoders import build_backbone
from utils.runtime import files

LINEAR = importlib.import_module("eval.eval_linear")


@pytest.fixture(scope="session")
def seven_classes(tmp_path_factory):
    """train/ and val/ with seven classes, 5 and 3 images each: enough for top-5."""
    root = tmp_path_factory.mktemp("seven")
    for split, count in (("train", 5), ("val", 3)):
        for number in range(7):
            for i in range(count):
                seed = 1000 * (split == "val") + 100 * number + i
                write_image(root / split / f"class{number}" / f"{i}.png", seed=seed)
    return root


def test_as_a_process_from_its_folder(run_script, seven_classes, weights, tmp_path):
    """The contract's command, with a top-5 and the names that scripts read."""
    flags = ("--weights", weights, "--arch", "conv4", "-j", 0, "--epochs", 2, "--save", tmp_path)
    done = run_script("eval/eval_linear.py", *flags, seven_classes, cwd=seven_classes)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\nepoch") + done.stdout.startswith("epoch") == 2
    record = json.loads((tmp_path / "linear.json").read_text())
    (figures,) = record["lr"].values()
    assert record["best_lr"] == "0.01" == next(iter(record["lr"]))
    assert record["top1"] == figures["top1"] and record["top5"] == figures["top5"]
    assert 0 <= figures["top1"] <= figures["top5"] <= 100
    assert record["counts"] == {"train": 35, "val": 21, "classes": 7}
    assert (record["arch"], record["image_size"], record["epoch"]) == ("conv4", 16, 7)
    assert (record["epochs"], record["encoder"]) == (2, "query")
    assert record["sha256"] == files.sha256(weights)
    assert f"{figures['top5']:.2f}" in done.stdout
    assert "scale 0.08 to 1" in record["protocol"] and "frozen" in record["protocol"]


def torchvision_features(model, root, split):
    """Features and labels by torchvision's transforms, one image at a time."""
    transform = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize(32),
            torchvision.transforms.CenterCrop(28),
            torchvision.transforms.ToTensor(),
            torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    folder = torchvision.datasets.ImageFolder(root / split, transform)
    with torch.no_grad():
        rows = torch.cat([model(image[None]) for image, _ in folder])
    return rows / rows.norm(dim=1, keepdim=True), torch.tensor(folder.targets)


def test_cached_against_torchvision_and_torch_alone(call_script, tmp_path):
    """The whole chain written out: features, statistics, nn.Linear, SGD, MultiStepLR, accuracy.

    The images are 32 x 32 already, so that no resizing differs by a gray level.
    """
    for number in range(45):
        split, name = "val" if number % 3 == 2 else "train", "abc"[number % 5 % 3]
        write_image(tmp_path / split / name / f"{number}.png", seed=number, size=(32, 32))
    torch.manual_seed(3)
    model = torchvision.models.resnet18(weights=None)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    flags = ("--weights", tmp_path / "plain.pth", "--arch", "resnet18", "--image_size", 28)
    flags += ("--cached", "--epochs", 6, "--lr_schedule", "2,4", "--lr", "0.02,0.2", "-b", 8)
    code, _, stderr = call_script(
        LINEAR, *flags, "-j", 0, "--seed", 4, "--save", tmp_path, tmp_path
    )
    assert code == 0, stderr

    model.fc = torch.nn.Identity()
    model.eval()
    x, y = torchvision_features(model, tmp_path, "train")
    x_val, y_val = torchvision_features(model, tmp_path, "val")
    mean, spread = x.mean(dim=0), (x.var(dim=0) + 1e-5).sqrt()
    history = load(tmp_path)["history"]
    for number, rate in enumerate((0.02, 0.2)):
        torch.manual_seed(4)
        layer = torch.nn.Linear(512, 3)
        sgd = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.MultiStepLR(sgd, [2, 4])
        for epoch in range(1, 7):
            order = np.random.default_rng([4, epoch]).permutation(30)
            losses = []
            for rows in np.split(order, [8, 16, 24]):
                logits = layer((x[rows] - mean) / spread)
                losses.append(torch.nn.functional.cross_entropy(logits, y[rows]) * len(rows))
                sgd.zero_grad()
                losses[-1].div(len(rows)).backward()
                sgd.step()
            schedule.step()
            found = layer((x_val - mean) / spread).argmax(dim=1)
            accuracy = 100 * (found == y_val).double().mean().item()
            loss = sum(losses).item() / 30
            assert history[epoch - 1]["loss"][number] == pytest.approx(loss, rel=1e-3)
            assert history[epoch - 1]["top1"][number] == pytest.approx(accuracy)


class ByHand:
    """The probe on the images of train/, one image at a time with torch's own parts."""

    def __init__(self, weights, image_tree, *, seed):
        backbone = build_backbone("conv4")
        state = checkpoint.load(weights, flag="")
        checkpoint.load_backbone(backbone, state, what="")
        images = read_split(image_tree, "train")
        self.encoder, self.seed = backbone.module.eval(), seed
        self.labels = torch.from_numpy(images.labels)
        self.pictures = [cropping.decode(images.path(i)) for i in range(len(images))]
        with torch.no_grad():
            x = self.unit([cropping.center_crop(picture, 16) for picture in self.pictures])
        self.mean, self.spread = x.mean(dim=0), (x.var(dim=0) + 1e-5).sqrt()
        torch.manual_seed(seed)
        self.layer = torch.nn.Linear(128, 3)

    def unit(self, crops):
        x = self.encoder(augment.normalize(torch.stack(crops)))
        return x / x.norm(dim=1, keepdim=True)

    def loss(self, rows, *, epoch):
        crops = []
        draws = random_draws.uniforms(self.seed, epoch, rows, views=1)[:, 0]
        for row, numbers in zip(rows, draws, strict=True):
            picture = self.pictures[row]
            box = cropping.crop_box(numbers, *picture.shape[1:], scale=(0.08, 1))
            crop = cropping.resized_crop(picture, box, 16)
            crops.append(crop.flip(2) if numbers[random_draws.Draw.FLIP] < 0.5 else crop)
        x = (self.unit(crops) - self.mean) / self.spread
        return torch.nn.functional.cross_entropy(self.layer(x), self.labels[rows])


def test_training_on_random_crops_by_hand(run_linear, weights, image_tree, tmp_path):
    _, _, saved = run_linear(tmp_path, "--epochs", 2, "--seed", 6)
    reference = ByHand(weights, image_tree, seed=6)
    reference.encoder.requires_grad_(False)
    parameters = reference.layer.parameters()
    sgd = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=1e-4)
    for epoch, rate in ((1, 0.1), (2, 0.01)):
        sgd.param_groups[0]["lr"] = rate
        for rows in epoch_batches(30, 9, seed=6, epoch=epoch):
            sgd.zero_grad()
            reference.loss(rows, epoch=epoch).backward()
            sgd.step()
    found, expected = saved["probe"]["heads.0.weight"], reference.layer.weight
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_fine_tuning_by_hand(run_linear, weights, image_tree, tmp_path):
    """Two steps over all images, encoder in train mode, the statistics as they were before."""
    flags = ("--fine-tune", "-b", 30, "--epochs", 2, "--lr_schedule", 9, "--lr", 0.01)
    _, _, saved = run_linear(tmp_path, *flags, "--seed", 6)
    reference = ByHand(weights, image_tree, seed=6)
    reference.encoder.train()
    parameters = [*reference.layer.parameters(), *reference.encoder.parameters()]
    sgd = torch.optim.SGD(parameters, lr=0.01, momentum=0.9, weight_decay=1e-4)
    for epoch in (1, 2):
        sgd.zero_grad()
        (rows,) = epoch_batches(30, 30, seed=6, epoch=epoch)
        reference.loss(rows, epoch=epoch).backward()
        sgd.step()
    torch.testing.assert_close(saved["probe"]["standardize.mean"], reference.mean)
    for name, expected in reference.encoder.state_dict().items():
        if name.startswith("fc."):
            continue
        found = saved["state_dict"][linear_run.ENCODER + name]
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_measuring_less_often_changes_no_figure(run_linear, tmp_path):
    flags = ("--lr", "0.1,0.3", "--epochs", 5)
    always, _, _ = run_linear(tmp_path / "a", *flags)
    seldom, console, saved = run_linear(tmp_path / "b", *flags, "--eval_freq", 2)
    for rate in ("0.1", "0.3"):
        assert seldom["lr"][rate]["top1"] == always["lr"][rate]["top1"]
    measured = [row["top1"][0] is not None for row in saved["history"]]
    assert measured == [False, True, False, True, True]  # and after the last
    assert sum(line.startswith("epoch ") for line in console.splitlines()) == 3


def test_several_rates_equal_single_runs(run_linear, tmp_path):
    together, console, saved = run_linear(tmp_path / "all", "--lr", "0.01,0.1,1")
    assert list(together["lr"]) == ["0.01", "0.1", "1.0"]
    for number, rate in enumerate((0.01, 0.1, 1)):
        alone, _, own = run_linear(tmp_path / str(rate), "--lr", rate)
        loss = alone["lr"][str(float(rate))]["loss"]
        assert together["lr"][str(float(rate))]["loss"] == pytest.approx(loss, rel=1e-5)
        one, other = saved["probe"][f"heads.{number}.weight"], own["probe"]["heads.0.weight"]
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    best = max(together["lr"], key=lambda rate: together["lr"][rate]["top1"])
    assert together["best_lr"] == best and together["top1"] == together["lr"][best]["top1"]
    assert console.count("lr 0.1: loss") == 3


@pytest.mark.parametrize("flags", [(), ("--fine-tune",)])
def test_workers_change_no_bit(run_linear, tmp_path, flags):
    runs = [run_linear(tmp_path / str(n), *flags, "-j", n)[2] for n in (0, 2)]
    assert_same_bits(*runs)


@pytest.mark.parametrize("flags", [(), ("--cached",), ("--mlp",)])
def test_without_fine_tune_no_bit_of_the_encoder_changes(run_linear, tmp_path, monkeypatch, flags):
    seen = {}

    def spy(args, original=build_evaluation.evaluated_backbone):
        backbone, state = original(args)
        seen["module"] = backbone.module
        seen["before"] = {n: v.clone() for n, v in backbone.module.state_dict().items()}
        return backbone, state

    monkeypatch.setattr(build_evaluation, "evaluated_backbone", spy)
    _, _, saved = run_linear(tmp_path, *flags)
    assert_same_bits(seen["before"], dict(seen["module"].state_dict()))
    assert "state_dict" not in saved


@pytest.mark.parametrize("flag", ["--fine-tune", "--fine_tune"])
def test_fine_tune_changes_every_weight_of_the_encoder(run_linear, weights, tmp_path, flag):
    record, _, saved = run_linear(tmp_path, flag)
    start = torch.load(weights, weights_only=True)["state_dict"]
    assert saved["state_dict"].keys() == {n for n in start if n.startswith(linear_run.ENCODER)}
    unchanged = [n for n, v in saved["state_dict"].items() if torch.equal(v, start[n])]
    assert not unchanged
    assert "encoder trained too" in record["protocol"]


def test_fine_tuned_encoder_is_a_checkpoint(run_linear, call_script, image_tree, tmp_path):
    """k-NN reads it, network and image size included."""
    run_linear(tmp_path, "--fine-tune")
    knn = importlib.import_module("eval.eval_knn")
    flags = ("--weights", tmp_path / "linear.pth", "-j", 0, "--save", tmp_path)
    code, _, stderr = call_script(knn, *flags, image_tree)
    assert code == 0, stderr
    record = json.loads((tmp_path / "knn.json").read_text())
    assert (record["arch"], record["image_size"], record["epoch"]) == ("conv4", 16, 3)


def test_target_encoder(run_linear, tmp_path):
    query, _, one = run_linear(tmp_path / "query", "--cached")
    target, _, other = run_linear(tmp_path / "target", "--cached", "--use-target")
    assert (query["encoder"], target["encoder"]) == ("query", "target")
    assert not torch.allclose(one["probe"]["standardize.mean"], other["probe"]["standardize.mean"])
    assert query["lr"]["0.1"]["loss"] != target["lr"]["0.1"]["loss"]


@pytest.mark.parametrize("name", ["random", "pixels"])
def test_without_a_checkpoint(run_linear, tmp_path, name):
    flags = ("--weights", name, "--arch", "conv4", "--image_size", 8)
    record, _, _ = run_linear(tmp_path, *flags, "--cached")
    assert (record["checkpoint"], record["sha256"]) == (name, None)


def test_hidden_layer(run_linear, tmp_path):
    record, _, saved = run_linear(tmp_path, "--mlp")
    assert saved["probe"]["hidden.0.weight"].shape == (128, 128)
    assert "Linear-BN-ReLU" in record["protocol"]


def test_labeled_images_only(run_linear, image_tree, tmp_path):
    """A split file and a share of every class: counts, and the statistics are those of the few."""
    split = tmp_path / "split.txt"
    split.write_text("a/0.jpg\nb/1.jpg\nb/2.jpg\nc/3.jpg\n")
    record, _, _ = run_linear(tmp_path / "file", "--cached", "--train-file", split)
    assert record["counts"]["train"] == 4
    record, _, few = run_linear(tmp_path / "share", "--cached", "--label_fraction", 0.2)
    _, _, every = run_linear(tmp_path / "all", "--cached")
    assert record["counts"]["train"] == 6
    assert not torch.equal(few["probe"]["standardize.mean"], every["probe"]["standardize.mean"])


def test_labeled_loader_yields_the_crops_of_its_images(image_tree):
    images = read_split(image_tree, "train")
    loader = LabeledLoader(images, batch_size=7, image_size=16, seed=5)
    batches = list(loader.epoch(4))
    assert len(batches) == len(loader) == 5
    assert sorted(torch.cat([batch.index for batch in batches]).tolist()) == list(range(30))
    views, index, label = batches[1]
    assert torch.equal(label, torch.from_numpy(images.labels)[index])
    for row in range(7):
        (numbers,) = random_draws.uniforms(5, 4, index[row : row + 1], views=1)[0]
        picture = cropping.decode(images.path(int(index[row])))
        box = cropping.crop_box(numbers, *picture.shape[1:], scale=(0.08, 1.0))
        crop = cropping.resized_crop(picture, box, 16)
        torch.testing.assert_close(views[row], augment.weak_view(crop[None], numbers[None])[0])
    again = torch.cat([batch.index for batch in loader.epoch(5)])
    assert not torch.equal(again, torch.cat([batch.index for batch in batches]))


@pytest.mark.parametrize(
    ("count", "size", "sizes"),
    [
        (10, 4, [4, 4, 2]),
        (9, 4, [4, 5]),  # a single one is not left alone
        (8, 4, [4, 4]),
        (3, 1, [1, 1, 1]),
        (3, 256, [3]),
        (1, 4, [1]),
    ],
)
def test_an_epoch_is_every_image_once(count, size, sizes):
    batches = epoch_batches(count, size, seed=1, epoch=2)
    assert [len(batch) for batch in batches] == sizes
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))


def test_only_checked(call_script, weights, image_tree, tmp_path, monkeypatch):
    flags = (*QUICK, "--check", "--save", tmp_path)
    code, out, _ = call_script(LINEAR, *flags, "--weights", weights, image_tree)
    said = ("data ", f"--weights {weights}: backbone ")
    assert code == 0 and all(line.startswith(said) for line in out.splitlines())
    assert not list(tmp_path.iterdir())
    assert_refused(call_script(LINEAR, *flags, "--weights", "no.pth", image_tree), "no.pth")
    monkeypatch.setattr(image_cache, "available_memory", lambda: 1000)
    too_much = call_script(LINEAR, *flags, "--weights", weights, image_tree)
    assert_refused(too_much, "--batch_size", "--image_size", "1000")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--lr", "0,x"), ("--lr", "0,x")),
        (("--lr", "0"), ("--lr", "0 is no list of learning rates")),
        (("--lr", "-1"), ("--lr",)),
        (("--lr", "nan"), ("--lr", "nan")),
        (("--lr", "0.1,0.10"), ("--lr", "0.1,0.10", "each once")),
        (("--lr_schedule", "15;30"), ("--lr_schedule", "15;30")),
        (("--epochs", 0), ("--epochs", "0")),
        (("--momentum", 2), ("--momentum", "2")),
        (("--wd", -1), ("--wd", "-1")),
        (("--lr", "0.1,1", "--fine-tune"), ("--lr 0.1,1.0", "--fine-tune")),
        (("--lr", "0.1,1", "--mlp"), ("--lr 0.1,1.0", "--mlp")),
        (("--cached", "--fine-tune"), ("--cached", "--fine-tune")),
        (("--weights", "pixels", "--fine-tune"), ("--fine-tune", "pixels")),
        (("-b", 1, "--mlp"), ("--batch_size 1",)),
        (("--cache_dir", "x"), ("--cache_dir x", "--cached")),
        (("--evaluate",), ("--evaluate", "--resume")),
        (("--evaluate", "--resume", "auto"), ("--evaluate", "--resume")),
        (("--resume", "no/such.pth"), ("--resume no/such.pth", "no such file")),
        (("--save", "/dev/null/x"), ("--save /dev/null/x",)),
        (("--save", "/proc/self"), ("--save /proc/self: ",)),
        (("--arch", "resnet18"), ("--arch resnet18", "missing")),
        (("--train_file", "no/such.txt"), ("--train_file no/such.txt",)),
    ],
)
def test_flags(call_script, weights, image_tree, tmp_path, flags, words):
    common = (*QUICK, "--save", tmp_path, "--weights", weights)
    assert_refused(call_script(LINEAR, *common, *flags, image_tree), *words)
    assert not (tmp_path / "linear.pth").exists()


def test_data_that_cannot_teach(call_script, weights, image_tree, tmp_path):
    common = (*QUICK, "--weights", weights)
    for split in ("train", "val"):
        write_image(tmp_path / "one" / split / "cats" / "1.jpg", seed=1)
        write_image(tmp_path / "two" / split / split / "1.jpg", seed=1)
    assert_refused(
        call_script(LINEAR, *common, tmp_path / "one"), "one class only, cats", "needs two"
    )
    assert_refused(call_script(LINEAR, *common, tmp_path / "two"), "train/ and val/ differ")
    split = tmp_path / "split.txt"
    split.write_text("a/0.jpg\n")
    result = call_script(LINEAR, *common, "--train-file", split, image_tree)
    assert_refused(result, f"--train_file {split}: no labeled image of 2 of 3 classes: b, c")
    assert_refused(call_script(LINEAR, *QUICK, image_tree), "--weights")


def test_a_loss_that_is_not_finite_stops_the_run(call_script, weights, image_tree, tmp_path):
    common = (*QUICK, "--cached", "--save", tmp_path, "--weights", weights)
    code, _, stderr = call_script(LINEAR, *common, "--lr", "1e38", image_tree)
    assert code == 1 and stderr.count("\n") == 1, stderr
    assert "epoch 1" in stderr and "--lr" in stderr
    code, _, stderr = call_script(LINEAR, *common, "--lr", "1e38,0.1", image_tree)
    assert code == 0, stderr
    record = json.loads((tmp_path / "linear.json").read_text())
    assert record["lr"]["1e+38"]["loss"] is None and record["lr"]["1e+38"]["top1"] is None
    assert record["best_lr"] == "0.1"


def test_demo_is_quick_by_default(call_script, weights, image_tree, tmp_path):
    flags = ("--demo", "--weights", weights, "--epochs", 1, "--save", tmp_path, image_tree)
    code, _, stderr = call_script(LINEAR, *flags)
    assert code == 0, stderr
    record = json.loads((tmp_path / "linear.json").read_text())
    assert "extracted once" in record["protocol"]
    assert list(record["lr"]) == [str(rate) for rate in LINEAR.DEMO["lr"]]
