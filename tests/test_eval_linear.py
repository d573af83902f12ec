"""eval_linear.py: the protocol, fine-tuning, the cache, resuming, and what it refuses."""

import importlib
import itertools
import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
import torchvision
from conftest import write_image
from test_bad_input import assert_refused

from utils.cli import build_evaluation
from utils.data import augment, cropping, image_cache, random_draws
from utils.data.batches import LabeledLoader, epoch_batches
from utils.data.datasets import ImageSet, read_split
from utils.evaluation import feature_cache, linear_run
from utils.method import checkpoint
from utils.method.encoders import QueryTargetEncoders, build_backbone
from utils.runtime import files
from utils.runtime.errors import InputError

LINEAR = importlib.import_module("eval.eval_linear")
QUICK = ("-j", 0, "-b", 9, "--epochs", 3, "--lr", 0.1, "--lr_schedule", "1,2")


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


def write_checkpoint(path, *, seed=0):
    """A checkpoint as training writes it, whose target encoder is not the query encoder."""
    torch.manual_seed(seed)
    encoders = QueryTargetEncoders(build_backbone("conv4").module, 128)
    for parameter in encoders.target_encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    state = {f"encoders.{name}": value for name, value in encoders.state_dict().items()}
    settings = {"arch": "conv4", "image_size": 16}
    torch.save({"state_dict": state, "epoch": 7, "args": settings}, path)
    return path


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """A checkpoint for conv4 at 16 pixels. Not to be changed by a test."""
    return write_checkpoint(tmp_path_factory.mktemp("weights") / "ckpt.pth")


@pytest.fixture
def run_linear(call_script, weights, image_tree):
    """Call the script: (folder of --save, *flags) -> (linear.json, console, linear.pth).

    The console without the first lines, which tell what images there are.
    """

    def run(folder, *flags, data=image_tree):
        flags = (*QUICK, "--weights", weights, *flags, "--save", folder, data)
        code, stdout, stderr = call_script(LINEAR, *flags)
        assert code == 0, stderr
        told = re.sub("^(data .*: [0-9]+ images in .*\n)+", "", stdout)
        return json.loads((folder / "linear.json").read_text()), told, load(folder)

    return run


def load(folder):
    return torch.load(folder / "linear.pth", weights_only=True)


def tensors(value, name=""):
    """Every leaf of a saved run by its place in it."""
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {k: v for key, part in items for k, v in tensors(part, f"{name}/{key}").items()}
    return {name: value}


def assert_same_bits(one, two):
    one, two = tensors(one), tensors(two)
    assert one.keys() == two.keys()
    for name, value in one.items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(value, two[name]), name


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


def test_schedule_counts_epochs_as_published(run_linear, tmp_path):
    """--lr_schedule 1,2: the first epoch at the full rate, the second at a tenth."""
    _, _, saved = run_linear(tmp_path, "--cached", "--epochs", 1)
    assert saved["optimizer"]["param_groups"][0]["lr"] == 0.1
    for epochs, rate in ((2, 0.01), (3, 0.001)):
        _, _, saved = run_linear(tmp_path, "--cached", "--epochs", epochs)
        assert saved["optimizer"]["param_groups"][0]["lr"] == pytest.approx(rate)


def test_measuring_less_often_changes_no_figure(run_linear, tmp_path):
    flags = ("--lr", "0.1,0.3", "--epochs", 5)
    always, _, _ = run_linear(tmp_path / "a", *flags)
    seldom, console, saved = run_linear(tmp_path / "b", *flags, "--eval_freq", 2)
    for rate in ("0.1", "0.3"):
        assert seldom["lr"][rate]["top1"] == always["lr"][rate]["top1"]
    measured = [row["top1"][0] is not None for row in saved["history"]]
    assert measured == [False, True, False, True, True]  # and after the last
    assert sum(line.startswith("epoch ") for line in console.splitlines()) == 3


def test_random_crops_are_not_the_central_crop(run_linear, tmp_path):
    images, _, _ = run_linear(tmp_path / "images")
    cached, _, _ = run_linear(tmp_path / "cached", "--cached")
    assert images["lr"]["0.1"]["loss"] != cached["lr"]["0.1"]["loss"]
    assert "extracted once" in cached["protocol"]


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


def test_a_run_of_which_one_rate_diverged_goes_on(run_linear, tmp_path):
    flags = ("--lr", "0.1,1e30", "--cached")
    whole, _, _ = run_linear(tmp_path / "a", *flags)
    _, _, saved = run_linear(tmp_path / "b", *flags, "--epochs", 2)
    assert not saved["probe"]["heads.1.weight"].isfinite().all()
    resumed, _, _ = run_linear(tmp_path / "c", *flags, "--resume", tmp_path / "b" / "linear.pth")
    assert resumed["lr"] == whole["lr"] and whole["lr"]["1e+30"]["loss"] is None


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


# The random crops of the loader.


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


# The cache.


@pytest.fixture
def extractions(monkeypatch):
    """A list that grows by one with every extraction."""
    calls = []

    def counted(*args, original=feature_cache.extract):
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(feature_cache, "extract", counted)
    return calls


def test_cache_is_used_when_nothing_has_changed(run_linear, extractions, tmp_path):
    _, _, first = run_linear(tmp_path, "--cached")
    assert (tmp_path / "features.pth").is_file()
    _, _, second = run_linear(tmp_path, "--cached", "-b", 9)
    assert len(extractions) == 1
    assert_same_bits(first, second)
    flags = ("--cached", "--cache_dir", tmp_path, "--lr", "0.3")
    run_linear(tmp_path / "elsewhere", *flags)
    assert len(extractions) == 1
    assert not (tmp_path / "elsewhere" / "features.pth").exists()


def test_digest_knows_names_labels_classes_and_every_byte(tmp_path):
    def write(name, data=b"12345", time=10**9):
        (tmp_path / name).write_bytes(data)
        os.utime(tmp_path / name, ns=(time, time))

    def digest(names=("1.png",), labels=(0,), classes=("a", "b"), **options):
        images = ImageSet(tmp_path, list(names), list(labels), list(classes))
        return feature_cache.image_digest(images, **options)

    write("1.png")
    write("2.png")
    digests = [digest(), digest(["2.png"]), digest(labels=[1]), digest(classes=["a", "c"])]
    digests.append(digest(["1.png", "2.png"], [0, 0]))
    digests.append(digest(["2.png", "1.png"], [0, 0]))
    write("1.png", time=10**9 + 1)
    assert digest() == digests[0]
    write("1.png", b"12354")
    digests.append(digest())
    write("1.png", b"123456")
    digests.append(digest())
    (tmp_path / "1.png").unlink()
    digests.append(digest(missing_ok=True))
    assert len(set(digests)) == len(digests)
    with pytest.raises(InputError, match=r"1\.png: No such file"):
        digest()


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_digest_is_the_same_by_any_number_of_processes(tmp_path, monkeypatch, processes):
    """Each reads its part; here one after the other, in threads that wait for each other."""
    names = [f"{number}.png" for number in range(40)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 1000)
    images = ImageSet(tmp_path, names, [0] * 40, ["a"])
    monkeypatch.setattr(feature_cache, "_AT_ONCE", 7)
    alone = feature_cache.image_digest(images)
    shares = []
    for rank in range(processes):
        share = range(6 * rank // processes, 6 * (rank + 1) // processes)
        monkeypatch.setattr(feature_cache.distributed, "own_share", lambda count, s=share: s)
        monkeypatch.setattr(
            feature_cache.distributed, "gather_objects", lambda own: shares.append(own) or [own]
        )
        feature_cache.image_digest(images)
    monkeypatch.setattr(feature_cache.distributed, "gather_objects", lambda own: shares)
    assert feature_cache.image_digest(images) == alone


def change_pixels(path):
    """As a copy of another picture that keeps size and time."""
    before = path.stat()
    write_image(path, seed=99)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)


def test_times_of_files_do_not_matter_to_a_cache(run_linear, extractions, tmp_path):
    data = tmp_path / "data"
    for split, name, i in itertools.product(("train", "val"), "ab", range(2)):
        write_image(data / split / name / f"{i}.bmp", seed=i)
    run_linear(tmp_path, "--cached", data=data)
    for path in data.rglob("*.bmp"):
        os.utime(path)
    run_linear(tmp_path, "--cached", data=data)
    assert len(extractions) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_cache_with_features_that_are_not_finite_is_not_used(
    run_linear, extractions, tmp_path, value
):
    run_linear(tmp_path, "--cached")
    cache = tmp_path / "features.pth"
    state = torch.load(cache, weights_only=True)
    state["features"]["val"][0][3, 1] = value
    files.save(cache, state)
    _, console, _ = run_linear(tmp_path, "--cached")
    assert "features is a dict, not finite features (N, 128)" in console
    assert len(extractions) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("checkpoint", "features of another checkpoint:"),
        ("image", "features of another train images:"),
        ("val image", "features of another val images:"),
        ("labels", "features of another train images:"),
        ("size", "features of another image size:"),
        ("encoder", "features of another encoder:"),
        ("truncated", "not a readable checkpoint"),
        ("other file", "no feature cache of this version"),
    ],
)
def test_stale_cache_is_not_used(run_linear, extractions, tmp_path, change, reason):
    data, ours, flags = tmp_path / "data", tmp_path / "ckpt.pth", []
    for split, count in (("train", 4), ("val", 2)):
        for number, name in enumerate("ab"):
            for i in range(count):
                write_image(data / split / name / f"{i}.bmp", seed=10 * number + i)
    write_checkpoint(ours)
    common = ("--weights", ours, "--cached")
    run_linear(tmp_path, *common, data=data)
    cache = tmp_path / "features.pth"
    if change == "checkpoint":
        write_checkpoint(ours, seed=1)
    elif change in ("image", "val image"):
        path = data / ("val" if "val" in change else "train") / "a" / "0.bmp"
        change_pixels(path)
    elif change == "labels":
        flags = ["--label_fraction", 0.5]
    elif change == "size":
        flags = ["--image_size", 24]
    elif change == "encoder":
        flags = ["--use-target"]
    elif change == "truncated":
        cache.write_bytes(cache.read_bytes()[:-1000])
    else:
        torch.save({"features": {}}, cache)
    _, console, stale = run_linear(tmp_path, *common, *flags, data=data)
    assert len(extractions) == 2
    assert reason in console and "extracted anew" in console
    _, _, fresh = run_linear(tmp_path / "fresh", *common, *flags, data=data)
    assert_same_bits(stale, fresh)
    run_linear(tmp_path, *common, *flags, data=data)
    assert len(extractions) == 3  # the new cache is used


# Saving, resuming, measuring a saved probe.


@pytest.mark.parametrize(
    "flags",
    [
        ("--cached", "--lr", "0.1,1"),
        ("--mlp",),
        # Its dropout draws random numbers, which a resumed run must draw again.
        ("--fine-tune", "--weights", "random", "--arch", "mobilenet_v2", "--image_size", 32),
    ],
)
def test_resumed_run_has_the_bits_of_an_undisturbed_one(run_linear, tmp_path, flags):
    whole_record, _, whole = run_linear(tmp_path / "whole", *flags)
    run_linear(tmp_path / "broken", *flags, "--epochs", 1)
    resume = ("--resume", tmp_path / "broken" / "linear.pth")
    record, console, resumed = run_linear(tmp_path / "broken", *flags, *resume)
    assert console.startswith("epoch 2/3")
    assert_same_bits(whole, resumed)
    assert record["lr"] == whole_record["lr"]


@pytest.mark.parametrize("flags", [("--lr", "0.1,1"), ("--mlp",), ("--fine-tune",)])
def test_measuring_a_saved_probe(run_linear, extractions, tmp_path, flags):
    trained, _, _ = run_linear(tmp_path, *flags, "--label_fraction", 0.5)
    files = [tmp_path / "linear.pth", tmp_path / "linear.json"]
    before = [path.read_bytes() for path in files]
    resume = ("--evaluate", "--resume", tmp_path / "linear.pth")
    _, console, _ = run_linear(tmp_path, *resume, "--cached")
    measured = json.loads((tmp_path / "evaluate.json").read_text())
    assert "epoch" not in console and not extractions  # only val is needed
    for rate, figures in measured["lr"].items():
        assert figures == {name: trained["lr"][rate][name] for name in ("top1", "top5")}
    for name in ("top1", "epochs", "counts", "protocol"):
        assert measured[name] == trained[name]
    assert [path.read_bytes() for path in files] == before


@pytest.mark.parametrize("flags", [("--cached",), ("--fine-tune",)])
def test_resume_auto_goes_on_from_its_own_file(run_linear, tmp_path, flags):
    """From the middle, from an end of which linear.json was not written, or from nothing."""
    auto = (*flags, "--resume", "auto")
    whole_record, console, whole = run_linear(tmp_path / "whole", *auto)
    assert console.startswith("epoch 1/3")
    run_linear(tmp_path / "broken", *flags, "--epochs", 2)
    for first in ("epoch 3/3", "12 val images"):
        record, console, resumed = run_linear(tmp_path / "broken", *auto)
        assert console.startswith(first) and record["lr"] == whole_record["lr"]
        assert_same_bits(whole, resumed)
        (tmp_path / "broken" / "linear.json").unlink()
    # The file of another run, of one with more epochs, and none that can be read.
    saved = tmp_path / "broken" / "linear.pth"
    for change, reason in ((("--lr", 0.2), "--lr"), (("--epochs", 1), "it has finished epoch 3")):
        _, console, _ = run_linear(tmp_path / "broken", *auto, *change)
        (said,) = [line for line in console.splitlines() if line.endswith(": replaced")]
        assert f"--resume {saved}: " in said and reason in said and "epoch 1/" in console
        run_linear(tmp_path / "broken", *flags)
    saved.write_bytes(b"half")
    record, console, _ = run_linear(tmp_path / "broken", *auto)
    assert "not a readable checkpoint" in console and record["lr"] == whole_record["lr"]


def test_a_result_that_is_there_is_kept(run_linear, weights, image_tree, tmp_path):
    keep = ("--cached", "--keep_done")
    first, _, _ = run_linear(tmp_path, *keep)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    moved = tmp_path.parent / "moved.pth"
    moved.write_bytes(weights.read_bytes())
    _, console, _ = run_linear(tmp_path, *keep, "--weights", moved, "-j", 1)
    assert console.startswith(f"{tmp_path / 'linear.json'}: there already, nothing to do\n")
    assert f"top1 {first['top1']:g}" in console and "epoch 1/" not in console
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before

    other = write_checkpoint(tmp_path.parent / "other.pth", seed=1)
    for change, reason in (
        (("--weights", other), "sha256"),
        (("--use-target",), "encoder"),
        (("--label_fraction", 0.5), "images"),
        (("--wd", 0.5), "--wd (0.0001)"),
        (("--epochs", 1), "--epochs (3)"),
    ):
        _, console, _ = run_linear(tmp_path, *keep, *change)
        assert f"--keep_done: {tmp_path / 'linear.json'} has another {reason}: replaced" in console
        assert run_linear(tmp_path, *keep)[0]["lr"] == first["lr"]
    for text in ("", '{"lr": 3}'):
        (tmp_path / "linear.json").write_text(text)
        record, console, _ = run_linear(tmp_path, *keep)
        assert "linear.json: " in console and ": replaced" in console
        assert record["lr"] == first["lr"]


@pytest.mark.parametrize("flags", [("--keep_done", "--cached"), ("--resume", "auto", "--cached")])
def test_a_result_of_other_pixels_is_not_kept(run_linear, image_tree, tmp_path, flags):
    """The val images of two classes change places, with the sizes and times of before."""
    data = shutil.copytree(image_tree, tmp_path / "data")
    for path in data.rglob("*.jpg"):
        path.write_bytes(path.read_bytes().ljust(4000, b"\0"))
        os.utime(path, ns=(10**18, 10**18))
    first, _, _ = run_linear(tmp_path, *flags, data=data)
    for number in range(4):
        one, two = (data / "val" / name / f"{number}.jpg" for name in "ab")
        pixels = one.read_bytes(), two.read_bytes()
        for path, content in zip((two, one), pixels, strict=True):
            path.write_bytes(content)
            os.utime(path, ns=(10**18, 10**18))
    again, console, _ = run_linear(tmp_path, *flags, data=data)
    assert ": replaced" in console and "epoch 3/3" in console
    fresh, _, _ = run_linear(tmp_path / "fresh", "--cached", data=data)
    assert again["lr"] == fresh["lr"] != first["lr"]


def test_a_finished_run_is_measured_again(run_linear, image_tree, tmp_path):
    """So that what is said of val, as an image that cannot be read, is so."""
    data = shutil.copytree(image_tree, tmp_path / "data")
    (data / "val" / "a" / "0.jpg").write_text("no image")
    flags = ("--bad_images", "skip", "--resume", "auto")
    first, _, _ = run_linear(tmp_path, *flags, data=data)
    (tmp_path / "linear.json").unlink()
    again, console, _ = run_linear(tmp_path, *flags, data=data)
    assert "epoch " not in console
    for name in ("lr", "counts", "bad_images"):
        assert again[name] == first[name], name
    assert again["counts"]["val"] == 11 and len(again["bad_images"]) == 1


def test_only_checked(call_script, weights, image_tree, tmp_path, monkeypatch):
    flags = (*QUICK, "--check", "--save", tmp_path)
    code, out, _ = call_script(LINEAR, *flags, "--weights", weights, image_tree)
    assert code == 0 and all(line.startswith("data ") for line in out.splitlines())
    assert not list(tmp_path.iterdir())
    assert_refused(call_script(LINEAR, *flags, "--weights", "no.pth", image_tree), "no.pth")
    monkeypatch.setattr(image_cache, "available_memory", lambda: 1000)
    too_much = call_script(LINEAR, *flags, "--weights", weights, image_tree)
    assert_refused(too_much, "--batch_size", "--image_size", "1000")


# What it refuses.


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--lr", "0,x"), ("--lr", "0,x")),
        (("--lr", "0"), ("--lr", "0 is no list of learning rates")),
        (("--lr", "-1"), ("--lr",)),
        (("--lr", "nan"), ("--lr", "nan")),
        (("--lr", "0.1,0.10"), ("--lr", "0.1,0.10", "twice")),
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


def test_saved_probes_that_do_not_fit(run_linear, call_script, weights, image_tree, tmp_path):
    run_linear(tmp_path / "run", "--cached")
    saved = tmp_path / "run" / "linear.pth"
    common = (*QUICK, "--epochs", 5, "--cached", "--weights", weights, "--resume", saved)
    other = write_checkpoint(tmp_path / "other.pth", seed=1)

    def refused(*flags, words):
        assert_refused(
            call_script(LINEAR, *common, *flags, image_tree), f"--resume {saved}", *words
        )

    refused("--weights", other, words=["another checkpoint"])
    refused("--weights", other, "--evaluate", words=["another checkpoint"])
    refused("--use-target", words=["another encoder"])
    refused("--label_fraction", 0.5, words=["another train images"])
    refused("--lr", "0.2", words=["--lr [0.1], not [0.2]"])
    refused("--mlp", words=["--mlp False, not True"])
    refused("--epochs", 3, words=["epoch 3 of --epochs 3"])
    for split in ("train", "val"):
        for name in "xyz":
            write_image(tmp_path / "others" / split / name / "1.jpg", seed=1)
    result = call_script(LINEAR, *common, "--evaluate", tmp_path / "others")
    assert_refused(result, f"--resume {saved}", "other classes")
    result = call_script(LINEAR, *common, "--resume", weights, image_tree)
    assert_refused(result, f"--resume {weights}", "no linear.pth")
    saved.write_bytes(saved.read_bytes()[:500])
    refused(words=["not a readable"])


def test_a_loss_that_is_not_finite_stops_the_run(call_script, weights, image_tree, tmp_path):
    common = (*QUICK, "--cached", "--save", tmp_path, "--weights", weights)
    code, _, stderr = call_script(LINEAR, *common, "--lr", "1e38", image_tree)
    assert code == 1 and stderr.count("\n") == 1, stderr
    assert "epoch 1" in stderr and "--lr" in stderr
    code, _, stderr = call_script(LINEAR, *common, "--lr", "0.1,1e38", image_tree)
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
