"""Files that are well-formed and odd: what reads them takes them, or says why not in one line."""

import argparse
import copy
import functools
import importlib
import itertools
import json
import sys

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from odd_values import changed
from test_checkpoint import published_layout

import hubconf
from self_supervised.train_msf_2q import CMSF2Q
from utils.cli import build_evaluation
from utils.data.bad_images import BadImages
from utils.data.datasets import read_split
from utils.evaluation import feature_cache, knn, linear_probe, linear_run
from utils.evaluation.linear_run import SETTINGS, FromFeatures, LinearRun, Recipe
from utils.method import checkpoint
from utils.method.encoders import QueryTargetEncoders, build_backbone
from utils.method.memory_bank import MemoryBank
from utils.runtime import files, safetensors_file
from utils.runtime.errors import InputError, RunError
from utils.training.engine import Run

EXPORT = importlib.import_module("eval.export_backbone")
LINEAR = importlib.import_module("eval.eval_linear")
SHOW = importlib.import_module("eval.show_neighbors")
WHERE = argparse.Namespace(
    arch=None, image_size=None, small_stem=False, seed=0, use_target=False, prefix=None
)


@pytest.fixture(params=[20, pytest.param(300, marks=pytest.mark.slow)])
def examples(request):
    """Hypothesis' settings: few examples or many, each time the same."""
    unwanted = [HealthCheck.too_slow]
    return settings(max_examples=request.param, derandomize=True, suppress_health_check=unwanted)


def reads(read, content, path):
    """Whether a reader takes a file with this content; otherwise its InputError is one line."""
    try:
        if isinstance(content, dict) and "format" in content:
            files.save(path, content)
        else:
            torch.save(content, path)
        read()
    except RunError as error:  # taken, and then it diverges
        assert "--lr" in str(error)
    except InputError as error:
        text = str(error)
        assert text.isprintable() and (path.name in text or text.startswith("--")), text
        return False
    return True


def mutate(examples, read, content, path):
    """A reader takes this content of a file, and changed ones or says why not."""
    assert reads(read, content, path)

    @examples
    @given(changed(content))
    def check(content):
        reads(read, content, path)

    check()


# ---- checkpoints as --weights


@functools.cache
def encoders():
    torch.manual_seed(0)
    return QueryTargetEncoders(build_backbone("conv4").module, 128, proj_dim=4, hidden_dim=5)


@functools.cache
def ours():
    """The parts of a training checkpoint that evaluations read, and what an export keeps of it."""
    weights = {f"encoders.{name}": value for name, value in encoders().state_dict().items()}
    state = {"format": checkpoint.FORMAT, "method": "MSF", "epoch": 3, "step": None}
    about = {"args": {"arch": "conv4", "image_size": 16}, "data": {"images": "abc"}}
    return state | about | {"state_dict": weights}


@functools.cache
def published():
    opt = argparse.Namespace(arch="conv4", image_size=16)
    return published_layout(encoders()) | {"opt": opt, "epoch": torch.tensor(200)}


@functools.cache
def exported():
    about = {"arch": "conv4", "image_size": 16, "encoder": "target", "epoch": 3, "mean": [0.5]}
    return checkpoint.exported(backbone_weights(), about)


@functools.cache
def plain():
    args = {"arch": "conv4", "image_size": 16, "small_stem": False}
    return {"model": backbone_weights(), "args": args, "epoch": 1.0}


def backbone_weights():
    return dict(encoders().query_encoder.backbone.state_dict())


def evaluate(path):
    """All that the evaluations and the export make of --weights; it can be written as JSON."""
    args = argparse.Namespace(**vars(WHERE), weights=str(path))
    backbone, state = build_evaluation.evaluated_backbone(args)
    about = EXPORT.describe(args, backbone, state)
    counts = build_evaluation.result_record(
        args, state, counts={}, bad_images=BadImages(), images={}
    )
    json.dumps([about, counts], allow_nan=False)
    backbone.module.eval()(torch.zeros(1, 3, args.image_size, args.image_size))
    fresh = copy.deepcopy(encoders())
    for read in (
        lambda: checkpoint.load_projector(state, backbone, what=str(path)),
        lambda: checkpoint.load_initial_weights(fresh, backbone, state, what=str(path)),
    ):
        try:
            read()
        except InputError as error:
            assert str(error).isprintable() and str(path) in str(error)


KINDS = {"ours": ours, "published": published, "exported": exported, "plain": plain}


@pytest.mark.parametrize("kind", KINDS)
def test_weights(tmp_path, kind, examples):
    path, content = tmp_path / "odd.pth", KINDS[kind]()
    assert reads(lambda: evaluate(path), content, path)

    @examples
    @given(changed(content))
    def check(content):
        reads(lambda: evaluate(path), content, path)
        try:
            hubconf.cmsf(weights=path)
        except ValueError as error:
            assert str(error).isprintable()

    check()


def test_safetensors(tmp_path, examples):
    """Ours, with any metadata."""
    pytest.importorskip("safetensors")
    path, content = tmp_path / "odd.safetensors", exported()

    @examples
    @given(changed({name: content[name] for name in ("state_dict", "metadata")}))
    def check(content):
        weights, about = content.get("state_dict", {}), content.get("metadata", {})
        try:
            path.write_bytes(safetensors_file.encode(weights, about, format=checkpoint.EXPORTED))
        except (AttributeError, TypeError, ValueError, RuntimeError):  # there can be no such file
            return
        try:
            evaluate(path)
        except InputError as error:
            assert str(error).isprintable()

    check()


# ---- what a run goes on from


class Loader:
    """Batches of four of twelve images, three steps an epoch."""

    batch_size = 4

    def __init__(self):
        self.bad_images = BadImages()

    def __len__(self):
        return 3

    def epoch(self, epoch, *, start=0):
        yield from [*tiny.random_batches(3)][start:]


def go_on(folder, *, resume=None, epochs=2, steps=100):
    """A run of CMSF-2Q, a few steps of it."""
    model = CMSF2Q(tiny.encoders(), 12, mem_bank_size=10, topk=3, topkp=4).double()
    optimizer = torch.optim.SGD(model.encoders.parameters(), lr=0.1, momentum=0.9)
    args = tiny.run_args(folder, rates=[1, 2.5], print_freq=2, resume=resume, epochs=epochs)
    of_data = {"data": {"images": "abc"}, "num_images": 12, "num_classes": 3}
    run = Run(args, model, optimizer, **of_data)
    try:
        for batch in itertools.islice(run.batches(Loader()), steps):
            run.step(*run.forward(batch))
        if run.epoch_step == 2:
            run._save()
    finally:
        run._files.close()


def test_resume(tmp_path, capsys, examples):
    """A run that takes a changed checkpoint goes on to its end."""
    go_on(tmp_path / "run", steps=5)
    (path,) = (tmp_path / "run").glob("ckpt_epoch_2_step_2.pth")
    path = path.rename(path.with_name("odd.pth"))
    there = itertools.count()

    def read():
        capsys.readouterr()
        go_on(tmp_path / "there" / str(next(there)), resume=str(path))

    mutate(examples, read, tiny.state(path), path)


# ---- what eval_linear goes on from, features, and the bank that is shown


KEY = {"checkpoint": "abc", "train images": "def"}


def probe_run(monkeypatch, path, *flags):
    """eval_linear on features of two classes, from linear.pth on (None: from the start)."""
    flags = ("-b", 4, "--lr", "0.1,0.3", "--epochs", 2, "--lr_schedule", 1, *flags)
    flags += () if path is None else ("--resume", path)
    monkeypatch.setattr(sys, "argv", ["x", *map(str, flags), "data"])
    args = LINEAR.parse_args()
    classes = ["a", "b"]
    recipe = Recipe(**{name: getattr(args, name) for name in SETTINGS})
    saved = None
    if path:
        measure = args.evaluate
        saved = linear_run.load(path, recipe, key=KEY, classes=classes, measure_only=measure)
    torch.manual_seed(0)
    split = torch.randn(8, 128), torch.arange(8) % 2
    features = FromFeatures(
        {"train": split, "val": split}, batch_size=4, seed=0, device=args.device
    )
    backbone = build_backbone("conv4")
    run = LinearRun(
        *(recipe, backbone), num_classes=2, device=args.device, saved=saved, what=f"--resume {path}"
    )
    if not saved:
        run.probe.standardize.measure(features.for_statistics())
    if args.evaluate:
        run.measure(features)
        return
    list(run.train(features, epochs=args.epochs, eval_freq=1))
    json.dumps(linear_probe.summarize(args.lr, run.history), allow_nan=False)
    origin = {"key": KEY, "classes": classes, "num_images": 8, "protocol": "x", "bad_images": []}
    if args.save:
        files.save(args.save / "linear.pth", run.state() | origin)


@pytest.mark.parametrize("flags", [("--epochs", 3), ("--evaluate",)])
def test_linear(tmp_path, monkeypatch, capsys, flags, examples):
    probe_run(monkeypatch, None, "--save", tmp_path)
    path = tmp_path / "linear.pth"
    content = tiny.state(path)
    assert reads(lambda: probe_run(monkeypatch, path, *flags), content, path)

    @examples
    @given(changed(content))
    def check(content):
        reads(lambda: probe_run(monkeypatch, path, *flags), content, path)
        capsys.readouterr()

    check()


def test_features(tmp_path, examples):
    path = tmp_path / "features.pth"
    features = {split: (torch.randn(6, 4), torch.arange(6) % 3) for split in ("train", "val")}
    feature_cache.save(path, KEY, features, bad_images=["a.jpg"])
    content = tiny.state(path)

    def read():
        found = feature_cache.load(
            path, KEY, flag="x", bad_images=BadImages(skip=True), feature_dim=4, num_classes=3
        )
        figures = knn.knn_figures(found["train"], found["val"], ks=[1], num_classes=3)
        json.dumps(figures, allow_nan=False)

    mutate(examples, read, content, path)


@pytest.mark.parametrize("kind", ["previous", "clusters", "pseudo-labels"])
def test_bank(tmp_path, image_tree, kind, examples):
    path, images = tmp_path / "odd.pth", read_split(image_tree, "train")
    bank = MemoryBank(8, 4, with_previous=kind == "previous")
    index = torch.arange(0, 30, 3)
    columns = {"index": index, "label": torch.from_numpy(images.labels)[index]}
    unit = torch.nn.functional.normalize(torch.randn(10, 4), dim=1)
    if kind == "previous":
        columns |= {"previous": unit.flip(0), "has_previous": index > 9}
    bank.enqueue(unit, **columns)
    content = {f"bank.{name}": value for name, value in bank.state_dict().items()}
    if kind == "clusters":
        content["clusters"] = torch.arange(30) % 4 - 1
    method = "PseudoCMSF" if kind == "pseudo-labels" else "x"
    content = {"format": checkpoint.FORMAT, "method": method, "epoch": 1, "state_dict": content}
    content |= {"data": {"x": images.digest()}, "args": {"dataset": "imagenet"}, "step": 2}
    args = argparse.Namespace(
        **vars(WHERE) | {"images": None}, weights=str(path), count=2, neighbors=3
    )

    def read():
        searched, notes, state = SHOW.search_bank(args, images)
        shown = [searched.target(row) for row in SHOW.choose(args, None, searched)]
        read = functools.partial(SHOW.read_picture, images, BadImages())
        SHOW.neighbor_sheet(shown, read, title="x", notes=notes)
        json.dumps([shown, state.get("method"), state.get("epoch")], allow_nan=False)

    mutate(examples, read, content, path)
