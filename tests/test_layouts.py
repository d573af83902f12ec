"""Checkpoints of other methods and libraries: which backbone is read, and what is refused."""

import copy
import importlib
import json
from functools import cache

import pytest
import torch
import torchvision
from conftest import write_image
from test_bad_input import assert_refused
from torch import nn
from torch.optim.swa_utils import AveragedModel

import hubconf
from utils.method import checkpoint
from utils.method.encoders import build_backbone
from utils.runtime.errors import InputError

KNN = importlib.import_module("eval.eval_knn")
EXPORT = importlib.import_module("eval.export_backbone")
TRAIN = importlib.import_module("self_supervised.train_msf")
XENT = importlib.import_module("supervised.train_sup_xent")


@cache
def network(seed=1, *, small_stem=False, arch="resnet18"):
    """A ResNet whose batch norms have statistics of their own; without its last layer."""
    torch.manual_seed(seed)
    module = build_backbone(arch, small_stem=small_stem).module
    for name, value in module.state_dict().items():
        if name.endswith(("running_mean", "bias")):
            value.normal_(std=0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 2)
    return module


def named(module, prefix=""):
    return {prefix + name: value for name, value in module.state_dict().items()}


def head(prefix, *sizes):
    """A multilayer perceptron with batch norm, as projectors, predictors and classifiers are."""
    layers = [layer for n in sizes for layer in (nn.Linear(n, n), nn.BatchNorm1d(n), nn.ReLU())]
    return named(nn.Sequential(*layers), prefix)


def numbered(module, prefix=""):
    return named(nn.Sequential(*list(module.children())[:-1]), prefix)


def without_pooling(module, prefix=""):
    """As SimCLR for CIFAR takes the children of a network."""
    some = [layer for layer in module.children() if not isinstance(layer, nn.Identity)]
    return named(nn.Sequential(*some), prefix)


def as_for_cifar(module, prefix=""):
    return {name.replace("downsample", "shortcut"): v for name, v in named(module, prefix).items()}


def vissl(student):
    trunk = named(student, "_feature_blocks.")
    model = {"trunk": trunk, "heads": head("0.clf.", 4)}
    return {"phase_idx": 3, "classy_state_dict": {"base_model": {"model": model, "meta": {}}}}


def simsiam(student):
    """https://github.com/facebookresearch/simsiam: DistributedDataParallel, projector as fc."""
    state = named(student, "module.encoder.") | head("module.encoder.fc.", 8, 8)
    state |= head("module.predictor.", 8)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1).state_dict()
    return {"epoch": 100, "arch": "resnet18", "state_dict": state, "optimizer": optimizer}


def dino(student, teacher):
    state = {"student": named(student, "module.backbone.") | head("module.head.mlp.", 8)}
    state["teacher"] = named(teacher, "backbone.") | head("head.mlp.", 8)
    return state | {"epoch": 7, "dino_loss": {"center": torch.zeros(1, 8)}}


def moco(student, teacher):
    state = named(student, "module.encoder_q.") | named(teacher, "module.encoder_k.")
    state |= head("module.encoder_q.fc.", 8) | head("module.encoder_k.fc.", 8)
    return {"state_dict": state | {"module.queue": torch.zeros(8, 64)}}


def moco_v3(student, teacher):
    state = named(student, "module.base_encoder.") | named(teacher, "module.momentum_encoder.")
    return {"state_dict": state | head("module.base_encoder.fc.", 8) | head("module.predictor.", 8)}


def byol(student, teacher):
    """lucidrains' byol-pytorch: the network stands there twice, alone and in the online encoder."""
    state = named(student, "net.") | named(student, "online_encoder.net.")
    state |= named(teacher, "target_encoder.net.") | head("online_encoder.projector.", 8)
    return state | head("target_encoder.projector.", 8) | head("online_predictor.", 8)


def solo_learn(student, teacher):
    state = named(student, "backbone.") | named(teacher, "momentum_backbone.")
    state |= head("projector.", 8) | head("momentum_projector.", 8) | head("classifier.", 8)
    loops = {"fit_loop": {"state_dict": {}}}
    about = {"pytorch-lightning_version": "1.9.0", "global_step": 10, "loops": loops}
    return about | {"state_dict": state | {"queue": torch.zeros(2, 8, 64)}}


def with_average(student, teacher):
    """What torch.optim.swa_utils.AveragedModel gives, beside the model."""
    return {"model": named(student), "model_ema": AveragedModel(teacher).state_dict()}


# By name: what makes the file of a network, the prefix it then has, and what is left aside.
ONE = {
    "torchvision": (lambda m: torchvision_file(m), "", ["fc"]),
    "torch.compile": (lambda m: torch.compile(m).state_dict(), "", []),
    "SimSiam": (simsiam, "state_dict.encoder", ["fc"]),
    "SwAV": (
        lambda m: named(m, "module.") | head("projection_head.", 8) | {"prototypes.weight": HEAD},
        "",
        ["projection_head", "prototypes"],
    ),
    "VISSL": (vissl, "classy_state_dict.base_model.model.trunk._feature_blocks", []),
    "numbered": (lambda m: {"net": numbered(m, "f.") | head("g.", 8)}, "net.f", []),
    "SupCon": (
        lambda m: {"model": as_for_cifar(m, "encoder.module.") | head("head.", 8), "epoch": 3},
        "model.encoder",
        [],
    ),
    "SimCLR for CIFAR": (lambda m: without_pooling(m, "f.") | head("g.", 8), "f", []),
}
# By name: what makes the file of a student and a teacher, and the prefixes of both.
TWO = {
    "DINO": (dino, "student.backbone", "teacher.backbone"),
    "MoCo": (moco, "state_dict.encoder_q", "state_dict.encoder_k"),
    "MoCo v3": (moco_v3, "state_dict.base_encoder", "state_dict.momentum_encoder"),
    "BYOL": (byol, "net", "target_encoder.net"),
    "solo-learn": (solo_learn, "state_dict.backbone", "state_dict.momentum_backbone"),
    "averaged": (with_average, "model", "model_ema"),
}
SMALL_STEM = ("SupCon", "SimCLR for CIFAR")
HEAD = torch.ones(5, 8)


def torchvision_file(module):
    model = torchvision.models.resnet18()
    model.load_state_dict(named(module) | named(model.fc, "fc."))
    return model.state_dict()


def read(state, module, **which):
    """The weights that are loaded of a checkpoint, and where they stood."""
    backbone = build_backbone("resnet18", small_stem=module.conv1.kernel_size == (3, 3))
    found = checkpoint.load_backbone(backbone, state, what="--weights x", **which)
    return backbone.module.state_dict(), found


def assert_same(weights, module):
    expected = module.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in weights.items())


@pytest.mark.parametrize("name", ONE)
def test_a_file_with_one_backbone(name):
    make, prefix, aside = ONE[name]
    module = network(small_stem=name in SMALL_STEM)
    weights, found = read(make(module), module)
    assert_same(weights, module)
    assert (found.prefix, found.aside, found.role) == (prefix, aside, "query")
    with pytest.raises(InputError, match="--weights x: no target encoder in it; it has "):
        read(make(module), module, encoder="target")


@pytest.mark.parametrize("name", TWO)
def test_a_file_with_two(name):
    make, *prefixes = TWO[name]
    student, teacher = network(), network(2)
    state = make(student, teacher)
    for encoder, prefix, module in zip(
        ("query", "target"), prefixes, (student, teacher), strict=True
    ):
        weights, found = read(state, module, encoder=encoder)
        assert_same(weights, module)
        assert (found.prefix, found.role) == (prefix, encoder)
        short = prefix.rpartition(".")[2]
        for given in (prefix, f"{prefix}.", f"module.{prefix}"):
            weights, found = read(state, module, prefix=given)
            assert_same(weights, module)
            assert found.role == prefix
        if short not in ("backbone", "net"):
            assert read(state, module, prefix=short)[1].prefix == prefix


@pytest.mark.parametrize("name", TWO)
def test_before_the_first_step_both_are_equal_and_both_are_there(name):
    make, *prefixes = TWO[name]
    state = make(network(), network())
    for encoder, prefix in zip(("query", "target"), prefixes, strict=True):
        assert read(state, network(), encoder=encoder)[1].prefix == prefix


def test_the_teacher_alone_is_taken_and_called_so():
    state = {"teacher": named(network(), "backbone.")}
    for encoder in ("query", "target"):
        assert read(state, network(), encoder=encoder)[1].role == "target"


@pytest.mark.parametrize("name", TWO)
def test_where_the_trained_one_is_broken_the_averaged_is_not_taken_for_it(name):
    make, prefix, averaged = TWO[name]
    state = make(network(), network(2))
    lost = network().layer4[1].conv2.weight
    state = changed(state, lambda _, v: None if v.shape == lost.shape and v.equal(lost) else v)
    with pytest.raises(
        InputError, match=f"only {averaged} fits.*--use_target.*{prefix}: 1 weights"
    ):
        read(state, network())
    assert read(state, network(), encoder="target")[1].prefix == averaged


def test_a_word_that_all_prefixes_have_tells_nothing():
    state = {"momentum_run": {"a": named(network()), "ema": named(network(2))}}
    assert read(state, network())[1].prefix == "momentum_run.a"
    assert read(state, network(), encoder="target")[1].prefix == "momentum_run.ema"


def test_names_that_tell_nothing_are_listed():
    state = {"first": named(network()), "second": named(network(2))}
    with pytest.raises(InputError, match=r"its query encoder\? it has first, second \(name one"):
        read(state, network())
    with pytest.raises(InputError, match="no target encoder in it; it has first, second"):
        read(state, network(), encoder="target")
    assert_same(read(state, network(2), prefix="second")[0], network(2))
    with pytest.raises(InputError, match="--prefix third: no backbone of this name; it has first"):
        read(state, network(), prefix="third")
    state = {"a": state, "b": {"first": named(network(3))}}
    with pytest.raises(InputError, match="--prefix first: more than one backbone of this name"):
        read(state, network(), prefix="first")
    state = {"first": named(network()), "second": named(network())}  # the same
    assert read(state, network())[1].prefix == "first"


def changed(table, change):
    """The tables with every tensor changed by its name, or without it if that gives None."""
    inner = {
        name: changed(value, change) if isinstance(value, dict) else change(str(name), value)
        for name, value in table.items()
    }
    return {name: value for name, value in inner.items() if value is not None}


@pytest.mark.parametrize("name", [*ONE, *TWO])
def test_a_weight_that_is_missing_or_of_another_shape(name):
    """The last statistics of each stage's last block, wherever they stand in the file."""
    module = network(small_stem=name in SMALL_STEM)
    state = ONE[name][0](module) if name in ONE else TWO[name][0](module, network(2))
    last, end = "1.bn2.running_var", r"1\.bn2\.running_var"
    without = changed(state, lambda n, v: None if n.endswith(last) else v)
    with pytest.raises(
        InputError, match=rf"x: does not fit: nearest .* 4 weights missing, .*{end}"
    ):
        read(without, module)
    other = changed(state, lambda n, v: torch.ones(7) if n.endswith(last) else v)
    with pytest.raises(InputError, match=rf"4 weights of another shape, .*{end} \(7,\), not \(64,"):
        read(other, module)


@pytest.mark.parametrize("make", [named, numbered])
def test_another_network_of_the_same_names(make):
    """All weights of a ResNet-18 stand in a ResNet-34, with the right shapes."""
    deeper = {"state_dict": make(network(arch="resnet34"), "encoder.") | head("encoder.fc.", 8)}
    with pytest.raises(
        InputError, match=r"encoder: \d+ weights unknown, first (layer1|4)\.2\.conv1"
    ):
        read(deeper, network())
    with pytest.raises(InputError, match=r"weights missing, first layer1\.2\.conv1\.weight"):
        checkpoint.load_backbone(build_backbone("resnet34"), {"m": make(network())}, what="x")
    small = {"net": make(network(small_stem=True))}
    with pytest.raises(InputError, match=r"conv1\.weight \(64, 3, 3, 3\), not \(64, 3, 7, 7\)"):
        read(small, network())


def test_numbers_that_leave_an_activation_out():
    """lightly's ResNetGenerator has its first ReLU in forward: in nn.Sequential there is none."""
    module = network(small_stem=True)
    some = [m for m in module.children() if not isinstance(m, (nn.Identity, nn.ReLU, nn.MaxPool2d))]
    assert list(named(nn.Sequential(*some)))[6].startswith("2.0.")
    with pytest.raises(InputError, match="does not fit: nearest is "):
        read({"backbone": named(nn.Sequential(*some))}, module)


@pytest.mark.parametrize(
    ("name", "value", "is_head"),
    [
        ("reg_token", torch.ones(1, 4, 512), False),
        ("norm_pre.weight", torch.ones(64), False),
        ("extra.0.weight", torch.ones(8, 3, 3, 3), False),
        ("layer5.0.weight", torch.ones(8, 8).to_sparse(), False),
        ("layer4.2.weight", torch.ones(8, 8), False),
        ("mask_token", torch.ones(1, 1, 512), True),
        ("decoder.0.weight", torch.ones(8, 3, 3, 3), True),
        ("dense.weight", torch.ones(8, 3, 1, 1), True),
        ("labels", torch.arange(64), True),
        ("scale", torch.ones(()), True),
    ],
)
def test_what_stands_beside_a_backbone(name, value, is_head):
    state = {"net": named(network()) | {name: value}}
    top = name.partition(".")[0]
    if is_head:
        assert read(state, network())[1].aside == [top]
        return
    with pytest.raises(InputError, match=f"1 weights unknown, first {name}"):
        read(state, network())


def test_what_lies_in_another_dict_is_no_part_of_it():
    state = named(network()) | {"optimizer": {"state": {0: {"exp_avg": torch.ones(64, 3, 7, 7)}}}}
    weights, found = read(state | {"ema": named(network(2))}, network())
    assert_same(weights, network())
    assert (found.prefix, found.aside) == ("", [])


def test_dicts_that_hold_themselves_and_names_that_are_there_twice():
    state = {"net": named(network())}
    state["net"]["again"] = state
    assert read(state, network())[1].prefix == "net"
    state = {"a.b": {"c": torch.ones(2)}, "a": {"b.c": torch.zeros(2)}, "net": named(network())}
    with pytest.raises(InputError, match=r"--weights x: two weights are called a\.b\.c"):
        read(state, network())


def test_nothing_of_it():
    with pytest.raises(
        InputError, match=r"no weight of its names \(its top-level keys: a\\nb, c\)"
    ):
        read({"a\nb": torch.ones(3), "c": {}}, network())


# ---- files that the libraries write themselves


def lightning_file(backbone, path, *, momentum=False):
    """One step of training with Lightning; returns what is trained."""
    lightning = pytest.importorskip("pytorch_lightning")
    heads = pytest.importorskip("lightly.models.modules.heads")
    utils = pytest.importorskip("lightly.models.utils")

    class SimSiam(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.save_hyperparameters({"lr": 0.1})
            self.backbone = backbone
            self.projection_head = heads.SimSiamProjectionHead(512, 16, 8)
            self.prediction_head = heads.SimSiamPredictionHead(8, 4, 8)
            if momentum:
                self.backbone_momentum = copy.deepcopy(backbone)
                utils.deactivate_requires_grad(self.backbone_momentum)

        def training_step(self, batch, index):
            features = self.backbone(batch[0]).flatten(1)
            return self.prediction_head(self.projection_head(features)).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    images = torch.utils.data.TensorDataset(torch.randn(4, 3, 32, 32))
    model = SimSiam()
    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_steps=1, accelerator="cpu", default_root_dir=path.parent, **silent
    )
    trainer.fit(model, torch.utils.data.DataLoader(images, batch_size=4))
    trainer.save_checkpoint(path)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("as_sequential", [True, False])
def test_a_file_of_lightly_and_lightning(tmp_path, as_sequential):
    torch.manual_seed(3)
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    backbone = nn.Sequential(*list(model.children())[:-1]) if as_sequential else model
    lightning_file(backbone, tmp_path / "last.ckpt", momentum=True)
    state = checkpoint.load(tmp_path / "last.ckpt", flag="--weights")
    weights, found = read(state, network())
    assert_same(weights, model)
    assert found.prefix == "state_dict.backbone"
    weights, found = read(state, network(), encoder="target")
    assert not torch.equal(weights["conv1.weight"], model.conv1.weight)
    assert found.prefix == "state_dict.backbone_momentum"


def test_a_file_of_timm(tmp_path):
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18", num_classes=7)
    torch.save(model.state_dict(), tmp_path / "timm.pth")
    weights, found = read(checkpoint.load(tmp_path / "timm.pth", flag="x"), network())
    assert torch.equal(weights["layer4.1.bn2.weight"], model.layer4[1].bn2.weight)
    assert found.aside == ["fc"]


# ---- the scripts


def figures(call_script, folder, weights, *flags):
    """k-NN figures of a file, what the result says of its encoder, and what is printed."""
    flags = ("--weights", weights, "--image_size", 32, "-j", 0, "--save", folder, *flags, folder)
    code, stdout, stderr = call_script(KNN, "--arch", "resnet18", *flags)
    assert code == 0, stderr
    record = json.loads((folder / "knn.json").read_text())
    return record["k"], record["encoder"], stdout


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Images of six classes, hard enough that networks differ in what they make of them."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 6), ("val", 5)):
        for label in range(6):
            for number in range(count):
                seed = 1000 * (split == "val") + 10 * label + number
                write_image(root / split / str(label) / f"{number}.png", seed=seed)
    return root


def test_figures_are_those_of_the_plain_weights_to_the_digit(call_script, images, tmp_path):
    plain = {}
    for small_stem in (False, True):
        for seed in (1, 2):
            torch.save(named(network(seed, small_stem=small_stem)), tmp_path / "plain.pth")
            flags = ["--small_stem"] * small_stem
            plain[small_stem, seed] = figures(call_script, images, tmp_path / "plain.pth", *flags)[
                0
            ]
    assert plain[False, 1] != plain[False, 2]
    for name, (make, prefix, _) in ONE.items():
        small_stem = name in SMALL_STEM
        torch.save(make(network(small_stem=small_stem)), tmp_path / "x.pth")
        found = figures(call_script, images, tmp_path / "x.pth", *["--small_stem"] * small_stem)
        assert found[:2] == (plain[small_stem, 1], "query"), name
        assert f"--weights {tmp_path / 'x.pth'}: backbone {prefix or 'the top level'}" in found[2]
    for name, (make, *prefixes) in TWO.items():
        torch.save(make(network(), network(2)), tmp_path / "x.pth")
        assert figures(call_script, images, tmp_path / "x.pth")[:2] == (plain[False, 1], "query")
        found = figures(call_script, images, tmp_path / "x.pth", "--use-target")
        assert found[:2] == (plain[False, 2], "target"), name
        found = figures(call_script, images, tmp_path / "x.pth", "--prefix", prefixes[1])
        assert found[:2] == (plain[False, 2], prefixes[1]), name


def test_training_export_and_hub_read_the_same(call_script, image_tree, tmp_path):
    torch.save(dino(network(), network(2)), tmp_path / "dino.pth")
    flags = (
        "--weights",
        tmp_path / "dino.pth",
        "--arch",
        "resnet18",
        "--prefix",
        "teacher.backbone",
    )
    code, stdout, stderr = call_script(EXPORT, *flags, "--output", tmp_path / "teacher.pth")
    assert code == 0, stderr
    exported = torch.load(tmp_path / "teacher.pth", weights_only=True)
    assert_same(exported["state_dict"], network(2))
    assert exported["metadata"]["encoder"] == "teacher.backbone"
    hub = hubconf.cmsf("resnet18", weights=tmp_path / "dino.pth", prefix="teacher.backbone")
    assert_same(hub.state_dict(), network(2))
    assert_same(hubconf.cmsf("resnet18", weights=tmp_path / "teacher.pth").state_dict(), network(2))
    small = ("--image_size", 16, "--batch_size", 15, "--num_workers", 0, "--learning_rate", 0)
    small += ("--epochs", 1, "--checkpoint_path", tmp_path / "run")
    for script, keys in ((TRAIN, ("query", "target")), (XENT, ("query",))):
        bank = ("--mem_bank_size", 30) if script is TRAIN else ()
        code, stdout, stderr = call_script(script, *flags, *small, *bank, image_tree)
        assert code == 0, stderr
        assert "only (teacher.backbone; also there: student.backbone); " in stdout
        state = torch.load(tmp_path / "run" / "ckpt_epoch_1.pth", weights_only=True)["state_dict"]
        for key in keys:
            name = f"encoders.{key}_encoder.backbone.layer1.0.conv1.weight"
            assert torch.equal(state[name], network(2).layer1[0].conv1.weight)


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"first": named(network()), "second": named(network(2))}, "it has first, second"),
        ({"net": named(network(arch="resnet34"))}, "weights unknown, first layer1.2.conv1.weight"),
        ({"a": torch.ones(2)}, "no weight of its names (its top-level keys: a)"),
    ],
)
def test_refusals_name_flag_and_file(call_script, image_tree, tmp_path, state, words):
    torch.save(state, tmp_path / "x.pth")
    flags = ("--weights", tmp_path / "x.pth", "--arch", "resnet18", "-j", 0, image_tree)
    assert_refused(call_script(KNN, *flags), f"--weights {tmp_path / 'x.pth'}", words)
    with pytest.raises(ValueError, match="weights "):
        hubconf.cmsf("resnet18", weights=tmp_path / "x.pth")
