"""What a user can mend: one line that names the flag and the value, exit code 2, nothing lost."""

import importlib
import os
import shutil

import pytest
import torch
import torchvision
from conftest import write_image

TRAIN = "self_supervised.train_msf_2q"
KNN = "eval.eval_knn"
SMALL = ("--arch", "conv4", "--image_size", 16, "--batch_size", 8, "--mem_bank_size", 20)


def assert_refused(result, *words):
    code, _, stderr = result
    assert code == 2, stderr
    assert stderr.count("\n") == 1, stderr
    assert "error: " in stderr and "Traceback" not in stderr
    for word in words:
        assert word in stderr, stderr


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--topk", 0), ("--topk", "0")),
        (("--topk", 21), ("--topk 21", "--mem_bank_size 20")),
        (("--topkp", 21), ("--topkp 21", "--mem_bank_size 20")),
        (("--mem_bank_size", 7), ("--mem_bank_size 7", "--batch_size 8")),
        (("--mem_bank_size", "many"), ("--mem_bank_size", "many")),
        (("--batch_size", 31, "--mem_bank_size", 40), ("--batch_size 31", "30 training images")),
        (("--arch", "resnet51"), ("--arch resnet51",)),
        (("--arch", "alexnet"), ("--image_size 16", "--arch alexnet")),
        (("--small_stem",), ("--small_stem", "--arch conv4")),
        (("--momentum", 1.5), ("--momentum", "1.5")),
        (("--lr_decay_epochs", "1,x"), ("--lr_decay_epochs", "1,x")),
        (("--lr_decay_epochs", "120,90"), ("--lr_decay_epochs", "120,90")),
        (("--learning_rate", "1e300"), ("--learning_rate", "1e300", "3.4e+38")),
        (("--mem_bank_size", 10**30), ("--mem_bank_size", str(10**30))),
        (("--epochs", "9" * 5000), ("--epochs", "999...")),
        (("--num_workers", 10**9), ("--num_workers", str(10**9), "0 to 1024")),
        (("--weights=",), ("--weights", "empty")),
        (("--dataset", "imagenet100"), ("--dataset imagenet100", "3 classes")),
        (("--dataset", "cifar"), ("--dataset", "cifar")),
        (("--device", "cuda:77"), ("--device", "cuda:77")),
        (("--weights", "no/such.pth"), ("--weights no/such.pth", "no such file")),
        (("--resume", "no/such.pth"), ("--resume no/such.pth", "no such file")),
        (("--checkpoint_path", "/dev/null/x"), ("--checkpoint_path /dev/null/x",)),
        (("--symmetric", "--mem_bank_size", 15), ("--mem_bank_size 15", "twice --batch_size 8")),
        (("--multi_crop", "6x96"), ("--multi_crop", "6x96")),
        (("--multi_crop", "1x16:0.2-1"), ("--multi_crop", "1x16:0.2-1")),
        (("--multi_crop", "2x16:0.2-1,0x8:0.1-0.2"), ("--multi_crop", "0x8:0.1-0.2")),
        (("--multi_crop", "2x16:0.2-1,4x8:0.3-0.2"), ("--multi_crop", "4x8:0.3-0.2")),
        (("--multi_crop", "2x16:0.2-1,100000000x8:0.1-0.2"), ("--multi_crop", "100000000x8")),
        (("--multi_crop", "2x16:0.2-1,4x4:0.1-0.2"), ("--multi_crop", "side 4", "--arch conv4")),
        (("--no_such_flag",), ("--no_such_flag",)),
    ],
)
def test_training_flags(call_script, image_tree, tmp_path, flags, words):
    module = importlib.import_module(TRAIN)
    result = call_script(
        module, *SMALL, "--topkp", 5, "--checkpoint_path", tmp_path / "out", *flags, image_tree
    )
    assert_refused(result, *words)
    assert not list(tmp_path.rglob("*.pth"))


@pytest.mark.parametrize("name", [TRAIN, KNN])
def test_data_path(call_script, tmp_path, name):
    module = importlib.import_module(name)
    weights = tmp_path / "plain.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), weights)
    flags = ("--arch", "resnet18", "--image_size", 32, "--weights", weights)

    assert_refused(call_script(module, *flags), "data", "--demo")
    missing = tmp_path / "missing"
    assert_refused(call_script(module, *flags, missing), str(missing), "no such folder")
    (tmp_path / "empty").mkdir()
    assert_refused(call_script(module, *flags, tmp_path / "empty"), "train/")
    (tmp_path / "half" / "train" / "cats").mkdir(parents=True)
    assert_refused(call_script(module, *flags, tmp_path / "half"), "without an image", "cats")


def test_val_classes_must_be_those_of_train(call_script, tmp_path):
    for split, name in (("train", "cats"), ("val", "dogs")):
        for animal in (name, "owls"):
            write_image(tmp_path / split / animal / "1.jpg", seed=1)
    for module in (TRAIN, KNN):
        result = call_script(importlib.import_module(module), "--weights", "x", tmp_path)
        assert_refused(result, "train/ and val/ differ", "cats, dogs")


def test_knn_during_training_needs_labels(call_script, tmp_path):
    write_image(tmp_path / "train" / "1.jpg", seed=1)
    result = call_script(importlib.import_module(TRAIN), "--knn_freq", 1, tmp_path)
    assert_refused(result, "--knn_freq 1", "no classes")


def test_checkpoints_that_do_not_fit(call_script, image_tree, tmp_path):
    knn, train = importlib.import_module(KNN), importlib.import_module(TRAIN)
    plain, other = tmp_path / "plain.pth", tmp_path / "other.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), plain)
    other.write_bytes(b"no checkpoint at all")
    size, out = ("--image_size", 32), ("--topkp", 5, "--checkpoint_path", tmp_path / "out")
    assert_refused(call_script(knn, image_tree), "--weights")
    assert_refused(
        call_script(knn, "--weights", plain, "--arch", "resnet50", *size, image_tree),
        *(str(plain), "--arch resnet50", "missing"),
    )
    assert_refused(
        call_script(knn, "--weights", other, *size, image_tree), str(other), "not a readable"
    )
    assert_refused(
        call_script(train, *SMALL, "--topkp", 5, "--weights", plain, image_tree),
        *(str(plain), "--arch conv4"),
    )
    assert_refused(
        call_script(knn, "--weights", plain, "--arch", "resnet18", *size, "-k", 31, image_tree),
        *("-k 31", "30 training images"),
    )
    assert_refused(
        call_script(train, *SMALL, *out, "--resume", plain, image_tree),
        *("--resume", "not a run of this repository"),
    )


class RunsCode:
    """A pickle that makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        (TRAIN, "--weights"),
        (TRAIN, "--resume"),
        ("self_supervised.train_msf_km", "--resume"),
        ("supervised.train_sup_msf", "--resume"),
        ("supervised.train_sup_xent", "--weights"),
        ("supervised.train_sup_xent", "--resume"),
        ("semi_supervised.train_pseudo_cmsf", "--weights"),
        (KNN, "--weights"),
        (KNN, "--load_cache"),
        ("eval.eval_linear", "--weights"),
        ("eval.eval_linear", "--resume"),
        ("eval.eval_linear", "--cached"),
    ],
)
def test_no_path_that_loads_runs_code(call_script, image_tree, tmp_path, name, flag):
    trace, path = tmp_path / "was_run", tmp_path / "features.pth"
    state = {"state_dict": {"a": torch.zeros(1)}, "opt": RunsCode(trace)}
    torch.save(state, path)
    small = ("--image_size", 16, "--batch_size", 8)
    flags = (*small, flag) if flag == "--cached" else (*small, flag, path)
    if "train" in name:
        flags = (*SMALL, "--knn_freq", -1, "--checkpoint_path", tmp_path / "out", *flags)
        flags = flags[: len(SMALL) - 2] + flags[len(SMALL) :] if "xent" in name else flags
        flags += ("--label_fraction", 0.5) if "semi" in name else ()
    elif flag != "--weights":
        flags = (*flags, "--weights", "pixels")
    if flag == "--cached":  # a cache that cannot be read is made anew
        code, out, _ = call_script(
            importlib.import_module(name),
            *flags,
            "--cache_dir",
            tmp_path,
            "--epochs",
            1,
            image_tree,
        )
        assert code == 0 and f"{path}: holds posix.mkdir, a pickled object" in out
    else:
        result = call_script(importlib.import_module(name), *flags, image_tree)
        assert_refused(result, flag, f"{path}: holds posix.mkdir, a pickled object")
    assert not trace.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--batch_size", 6), "--batch_size 8, not 6"),
        (("--mem_bank_size", 30), "--mem_bank_size 20, not 30"),
        (("--seed", 1), "--seed 0, not 1"),
        (("--small_stem", "--arch", "resnet18", "--image_size", 32), "--arch conv4, not resnet18"),
        (("--topk", 2, "--learning_rate", 1), "--learning_rate 0.01, not 1.0; "),
        (("other images",), "other training images or classes"),
        (("--epochs", 3, "--num_workers", 1, "--save_freq", 1), None),
    ],
)
def test_resuming_as_another_experiment(call_script, image_tree, tmp_path, change, words):
    train, out = importlib.import_module(TRAIN), tmp_path / "out"
    flags = (*SMALL, "--knn_freq", -1, "--num_workers", 0, "--epochs", 2, "--checkpoint_path", out)
    flags += ("--topkp", 5)
    assert call_script(train, *flags, "--save_freq", 1, image_tree)[0] == 0
    (out / "ckpt_epoch_2.pth").unlink()
    if change == ("other images",):
        tree = tmp_path / "tree"
        shutil.copytree(image_tree, tree)
        (tree / "train" / "a" / "0.jpg").rename(tree / "train" / "b" / "new.jpg")
        change, image_tree = (), tree
    result = call_script(train, *flags, "--resume", "auto", *change, image_tree)
    if words is None:
        assert result[0] == 0 and (out / "ckpt_epoch_3.pth").exists()
    else:
        assert_refused(result, f"--resume {out}/ckpt_epoch_1.pth", words)
        fits = not {"--mem_bank_size", "--arch"} & set(change)  # else nothing could go on
        assert ("--resume_anyway" in result[2]) == fits
        there = sorted(path.name for path in out.glob("[!.]*"))
        assert there == ["ckpt_epoch_1.pth", "log.jsonl", "run.json"]


def test_no_traceback_from_a_real_process(run_script, image_tree, tmp_path):
    """A broken image in a worker and a bad flag, as a shell sees them."""
    done = run_script("self_supervised/train_msf_2q.py", "--topk", "x", image_tree)
    assert (done.returncode, done.stderr) == (
        2,
        "train_msf_2q.py: error: argument --topk: x is no int\n",
    )
    for number in range(8):
        write_image(tmp_path / "train" / f"{number}.jpg", seed=number)
    (tmp_path / "train" / "3.jpg").write_bytes(b"broken")
    flags = (*SMALL, "--topkp", 5, "--num_workers", 1, "--checkpoint_path", tmp_path / "out")
    done = run_script("self_supervised/train_msf_2q.py", *flags, tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "train/3.jpg" in done.stderr
