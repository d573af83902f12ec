"""CIFAR, STL-10, Fashion-MNIST from small files of their format: what is read, what refused."""

import importlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torchvision import datasets

from utils.data import archives
from utils.data.bad_images import BadImages
from utils.data.datasets import read_split
from utils.data.image_cache import cache_images
from utils.data.splits import read_split_file
from utils.runtime.errors import InputError

TRAIN = importlib.import_module("self_supervised.train_msf_2q")
SUPERVISED = importlib.import_module("supervised.train_sup_msf")
KNN = importlib.import_module("eval.eval_knn")
LINEAR = importlib.import_module("eval.eval_linear")
SHOW = importlib.import_module("eval.show_neighbors")
CLASSES = ["airplane", "bird", "car"]


def picture(number, side, seed=0):
    """(side, side, 3) uint8: a color of its own, darker to the right and downwards."""
    color = np.random.default_rng([seed, number]).integers(60, 250, 3)
    place = np.arange(side)
    shade = 1 - (place[None, :] + 3 * place[:, None]) / (6 * side)
    return (color * shade[:, :, None]).astype(np.uint8)


def write_cifar(root, name, *, each=8):
    """Batches as the authors pickled them: rows of 3072, red first; image i has label i % 3."""
    kind = getattr(datasets, archives._SETS[name][0])
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    label_key = "labels" if name == "cifar10" else "fine_labels"
    count = 0
    for seed, part in enumerate((kind.train_list, kind.test_list)):
        first = count
        for file, _ in part:
            numbers = range(count - first, count - first + each)
            pixels = [picture(number, 32, seed).transpose(2, 0, 1).ravel() for number in numbers]
            entry = {"data": np.array(pixels), label_key: [number % 3 for number in numbers]}
            (folder / file).write_bytes(pickle.dumps(entry))
            count += each
    (folder / kind.meta["filename"]).write_bytes(pickle.dumps({kind.meta["key"]: CLASSES}))


def write_stl(root, *, train=12, test=9, unlabeled=20):
    """Binary files: channel, column, row; labels from 1."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True)
    for seed, (name, count) in enumerate(
        {"train": train, "test": test, "unlabeled": unlabeled}.items()
    ):
        pixels = np.array([picture(number, 96, seed).transpose(2, 1, 0) for number in range(count)])
        (folder / f"{name}_X.bin").write_bytes(pixels.tobytes())
        if name != "unlabeled":
            labels = np.arange(count, dtype=np.uint8) % 3 + 1
            (folder / f"{name}_y.bin").write_bytes(labels.tobytes())
    (folder / "class_names.txt").write_text("\n".join(CLASSES) + "\n")


def write_fashion(root, *, train=20, test=12):
    """Files as the authors wrote them: sizes as big-endian numbers, then gray pixels or labels."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for seed, (name, count) in enumerate({"train": train, "t10k": test}.items()):
        pixels = np.stack([picture(number, 28, seed)[:, :, 0] for number in range(count)])
        labels = np.arange(count, dtype=np.uint8) % 10
        for kind, values in (("images-idx3", pixels), ("labels-idx1", labels)):
            sizes = np.array([0x0800 + values.ndim, *values.shape], dtype=">i4")
            (folder / f"{name}-{kind}-ubyte").write_bytes(sizes.tobytes() + values.tobytes())
    return folder


@pytest.fixture
def unchecked(monkeypatch):
    """torchvision takes files that are there, whatever their MD5."""
    for module in (datasets.cifar, datasets.stl10):
        monkeypatch.setattr(module, "check_integrity", lambda path, md5=None: Path(path).is_file())


@pytest.mark.parametrize(("name", "count"), [("cifar10", 40), ("cifar100", 8)])
def test_cifar(tmp_path, unchecked, name, count):
    write_cifar(tmp_path, name)
    for seed, (split, size) in enumerate((("train", count), ("val", 8))):
        images = read_split(tmp_path, split, dataset=name, unlabeled=True)
        assert len(images) == size and images.classes == CLASSES
        assert images.labels.tolist() == [number % 3 for number in range(size)]
        assert images.name(4) == "bird/00004.png"
        for number in (0, size - 1):
            expected = torch.from_numpy(picture(number, 32, seed)).permute(2, 0, 1)
            assert torch.equal(images.image(number), expected)
            assert images.image(number).stride() == expected.stride()  # fast to resize


def test_stl10(tmp_path, unchecked):
    write_stl(tmp_path)
    train, val, every = (
        read_split(tmp_path, split, dataset="stl10", unlabeled=unlabeled)
        for split, unlabeled in (("train", False), ("val", True), ("train", True))
    )
    assert (len(train), len(val), len(every)) == (12, 9, 32)
    assert train.classes == val.classes == every.classes == CLASSES
    assert every.labels.tolist() == train.labels.tolist() + [-1] * 20
    assert train.labels.tolist() == [number % 3 for number in range(12)]
    for images, number, seed, of_split in ((train, 5, 0, 5), (val, 5, 1, 5), (every, 13, 2, 1)):
        expected = torch.from_numpy(picture(of_split, 96, seed)).permute(2, 0, 1)
        assert torch.equal(images.image(number), expected)
    assert (every.name(11), every.name(12)) == ("car/00011.png", "unlabeled/00012.png")
    assert train.take(np.arange(12)).digest() == train.digest() != every.digest()


def test_fashion_mnist(tmp_path):
    write_fashion(tmp_path)
    for seed, (split, count) in enumerate((("train", 20), ("val", 12))):
        images = read_split(tmp_path, split, dataset="fashion_mnist")
        assert len(images) == count and len(images.classes) == 10
        assert images.labels.tolist() == [number % 10 for number in range(count)]
        gray = torch.from_numpy(picture(11, 28, seed)[:, :, 0])
        assert torch.equal(images.image(11), gray.expand(3, 28, 28))
    assert (images.name(10), images.name(1)) == ("T-shirt-top/00010.png", "Trouser/00001.png")


def _cut(data):
    return data[:-1]


def _no_bytes(data):
    return b""


def _of_another_kind(data):
    return b"\x00\x00\x77" + data[3:]


def _floats(data):
    """The same sizes, of 32-bit floats."""
    count = (len(data) - 4 - 4 * data[3]) * 4
    return data[:2] + b"\x0d" + data[3 : 4 + 4 * data[3]] + bytes(count)


def _fewer_labels(data):
    return np.array([0x0801, 19], dtype=">i4").tobytes() + data[8:-1]


def _unknown_label(data):
    return data[:-1] + b"\x0a"


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("train-images-idx3-ubyte", _cut),
        ("train-images-idx3-ubyte", _no_bytes),
        ("train-images-idx3-ubyte", _of_another_kind),
        ("train-labels-idx1-ubyte", _cut),
        ("train-labels-idx1-ubyte", _fewer_labels),
        ("train-labels-idx1-ubyte", _unknown_label),
        ("train-images-idx3-ubyte", _floats),
        ("train-labels-idx1-ubyte", _floats),
    ],
)
def test_fashion_mnist_that_is_not_whole(tmp_path, file, change):
    path = write_fashion(tmp_path) / file
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(InputError, match="--dataset fashion_mnist: not, or not whole") as error:
        read_split(tmp_path, "train", dataset="fashion_mnist")
    assert "\n" not in str(error.value)


def test_files_that_torchvision_prefers_are_looked_at_too(tmp_path):
    """processed/ of older releases: tensors, which may be of any kind."""
    write_fashion(tmp_path)
    folder = tmp_path / "FashionMNIST" / "processed"
    folder.mkdir()
    images, labels = torch.zeros(4, 28, 28, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64)
    for kept in ((images.float(), labels), (images, None), (images[0], labels), 3):
        for name in ("training.pt", "test.pt"):
            torch.save(kept, folder / name)
        with pytest.raises(InputError, match="--dataset fashion_mnist: not, or not whole"):
            read_split(tmp_path, "train", dataset="fashion_mnist")


def test_a_download_onto_broken_files(call_script, tmp_path):
    """torchvision leaves files that are there as they are, and cannot read them."""
    path = write_fashion(tmp_path) / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-1])
    flags = ("--dataset", "fashion_mnist", "--download", "--weights", "pixels", "--num_workers", 0)
    code, _, stderr = call_script(KNN, *flags, tmp_path)
    assert code == 2 and "--download: fashion_mnist" in stderr and stderr.count("\n") == 1


def test_names_go_into_split_files(tmp_path, unchecked):
    write_cifar(tmp_path, "cifar10")
    images = read_split(tmp_path, "train", dataset="cifar10")
    (tmp_path / "labeled.txt").write_text("car/00011.png\nairplane/00003.png\n")
    found = read_split_file(tmp_path / "labeled.txt", images, flag="--train_file")
    assert found.tolist() == [3, 11]


def test_a_cache_of_an_archive_is_itself_unless_resized(tmp_path, unchecked):
    write_cifar(tmp_path, "cifar10")
    images = read_split(tmp_path, "train", dataset="cifar10")
    options = {"device": torch.device("cpu"), "bad_images": BadImages()}
    assert cache_images(images, "ram", **options) is images
    small = cache_images(images, "ram", size=8, **options)
    assert small.image(3).shape == (3, 8, 8) and small.as_stored() is images
    assert small.digest() == images.digest()


# What is refused.


@pytest.mark.parametrize("name", archives.NAMES)
def test_a_set_that_is_not_there(tmp_path, name):
    with pytest.raises(InputError) as error:
        read_split(tmp_path / "none", "train", dataset=name)
    for part in (f"--dataset {name}", str(tmp_path / "none"), "--download"):
        assert part in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "none").exists()


def test_a_pickle_that_is_not_the_published_one_is_never_loaded(tmp_path, monkeypatch):
    """torchvision's own check by MD5 stands between the user and the pickles."""
    write_cifar(tmp_path, "cifar10")
    write_cifar(tmp_path, "cifar100")
    monkeypatch.setattr(pickle, "load", None)
    for name in ("cifar10", "cifar100"):
        with pytest.raises(InputError, match=f"--dataset {name}: not, or not whole"):
            read_split(tmp_path, "train", dataset=name)


def test_an_archive_of_which_a_file_is_missing(tmp_path, unchecked):
    write_stl(tmp_path)
    (tmp_path / "stl10_binary" / "test_y.bin").unlink()
    with pytest.raises(InputError, match="--dataset stl10: not, or not whole"):
        read_split(tmp_path, "train", dataset="stl10")


def test_download_only_when_asked(call_script, tmp_path, unchecked, monkeypatch):
    """A stand-in writes what would come from the network."""
    asked = []

    def download(self):
        asked.append(str(self.root))
        write_cifar(Path(self.root), "cifar10")

    monkeypatch.setattr(datasets.CIFAR10, "download", download)
    flags = ("--weights", "pixels", "--dataset", "cifar10", "--image_size", 8, "--num_workers", 0)
    code, _, stderr = call_script(KNN, *flags, tmp_path / "new")
    assert code == 2 and "--download fetches it" in stderr and not asked
    code, stdout, stderr = call_script(KNN, *flags, "--download", tmp_path / "new")
    assert code == 0, stderr
    assert asked == [str(tmp_path / "new")]
    assert "8 val images among 40 train images" in stdout


def test_a_download_that_fails(call_script, tmp_path, monkeypatch):
    def download(self):
        raise OSError("<urlopen error no route to host>\nand more")

    monkeypatch.setattr(datasets.STL10, "download", download)
    flags = ("--dataset", "stl10", "--download", "--weights", "pixels")
    code, _, stderr = call_script(KNN, *flags, tmp_path)
    assert code == 2 and "--download: stl10 cannot be fetched" in stderr
    assert "no route to host" in stderr and stderr.count("\n") == 1


def test_download_of_what_no_one_may_fetch(call_script, image_tree):
    code, _, stderr = call_script(KNN, "--download", "--weights", "pixels", image_tree)
    assert code == 2 and f"--download: only with --dataset {', '.join(archives.NAMES)}" in stderr


# Whole runs.


def train(call_script, module, name, data, folder, *flags):
    flags = (*tiny.FLAGS, "--dataset", name, "--epochs", 1, "--checkpoint_path", folder, *flags)
    code, stdout, stderr = call_script(module, *flags, data)
    assert code == 0, stderr
    return stdout


@pytest.mark.parametrize("where", ["none", "device"])
def test_training_and_evaluation_on_cifar(call_script, tmp_path, unchecked, where):
    write_cifar(tmp_path, "cifar10")
    flags = ("--cache_images", where)
    stdout = train(call_script, TRAIN, "cifar10", tmp_path, tmp_path / "run", *flags)
    assert "20-NN" in stdout
    evaluation = ("--weights", tmp_path / "run" / "ckpt_epoch_1.pth", "--dataset", "cifar10")
    evaluation += ("--num_workers", 0, "--save", tmp_path / "run")
    code, stdout, stderr = call_script(KNN, *evaluation, "--save_features", tmp_path)
    assert code == 0, stderr
    code, again, stderr = call_script(
        *(KNN, *evaluation, "--load_cache", tmp_path / "run" / "features.pth", tmp_path)
    )
    assert code == 0 and again.splitlines()[:6] == stdout.splitlines()[:6]
    code, _, stderr = call_script(LINEAR, *evaluation, "--epochs", 1, tmp_path)
    assert code == 0, stderr
    picture = ("--count", 2, "-k", 3, "--output", tmp_path / "run" / "neighbors.png")
    code, _, stderr = call_script(SHOW, *evaluation[:-2], *picture, tmp_path)
    assert code == 0, stderr


def test_training_and_evaluation_on_fashion_mnist(call_script, tmp_path):
    write_fashion(tmp_path)
    stdout = train(call_script, TRAIN, "fashion_mnist", tmp_path, tmp_path / "run")
    assert "20-NN" in stdout
    flags = ("--weights", tmp_path / "run" / "ckpt_epoch_1.pth", "--num_workers", 0)
    code, _, stderr = call_script(KNN, *flags, "--dataset", "fashion_mnist", tmp_path)
    assert code == 0, stderr


def test_stl10_without_labels_and_with(call_script, tmp_path, unchecked):
    """Self-supervised: all 32 images, k-NN among the 12 labeled ones. With labels: those 12."""
    write_stl(tmp_path)
    stdout = train(call_script, TRAIN, "stl10", tmp_path, tmp_path / "self")
    assert "step 4" in stdout and "10-NN" in stdout and "20-NN" not in stdout
    stdout = train(call_script, SUPERVISED, "stl10", tmp_path, tmp_path / "supervised")
    assert "step 1" in stdout and "step 2" not in stdout
