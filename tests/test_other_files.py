"""Checkpoints of others: as their libraries write them, and through our scripts."""

import copy
import importlib
import json

import pytest
import torch
import torchvision
from conftest import write_image
from other_layouts import ONE, SMALL_STEM, TWO, assert_same, dino, named, network, read
from test_bad_input import assert_refused
from torch import nn

import hubconf
from utils.method import checkpoint

KNN = importlib.import_module("eval.eval_knn")
EXPORT = importlib.import_module("eval.export_backbone")
TRAIN = importlib.import_module("self_supervised.train_msf")
XENT = importlib.import_module("supervised.train_sup_xent")


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


def figures(call_script, folder, weights, *flags, arch="resnet18"):
    """k-NN figures of a file, what the result says of its encoder, and what is printed."""
    flags = ("--weights", weights, "--image_size", 32, "-j", 0, "--save", folder, *flags, folder)
    code, stdout, stderr = call_script(KNN, "--arch", arch, *flags)
    assert code == 0, stderr
    record = json.loads((folder / "knn.json").read_text())
    assert f"--weights {weights}: backbone {record['backbone'] or 'the top level'}" in stdout
    return record["k"], record["encoder"], record["backbone"]


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
    path, plain = tmp_path / "x.pth", {}
    for seed, stem in ((1, ()), (2, ()), (1, ("--small_stem",))):
        torch.save(named(network(seed, small_stem=bool(stem))), path)
        plain[seed, stem] = figures(call_script, images, path, *stem)[0]
    assert plain[1, ()] != plain[2, ()]
    for name, (make, prefix, _) in ONE.items():
        stem = ("--small_stem",) if name in SMALL_STEM else ()
        torch.save(make(network(small_stem=bool(stem))), path)
        found = figures(call_script, images, path, *stem)
        assert found == (plain[1, stem], "query", prefix), name
    for name, (make, trained, averaged) in TWO.items():
        torch.save(make(network(), network(2)), path)
        found = figures(call_script, images, path)
        assert found == (plain[1, ()], "query", trained), name
        found = figures(call_script, images, path, "--use-target")
        assert found == (plain[2, ()], "target", averaged), name
        found = figures(call_script, images, path, "--prefix", averaged)
        assert found == (plain[2, ()], averaged, averaged), name


def test_vision_transformers_of_others(call_script, images, tmp_path):
    """Files as of MAE and DINO, of timm's network; tokens that another build has are refused."""
    timm = pytest.importorskip("timm")
    name, path = "vit_tiny_patch16_224", tmp_path / "x.pth"
    torch.manual_seed(1)
    plain = timm.create_model(name, img_size=32, num_classes=5).state_dict()
    decoder = {"mask_token": torch.zeros(1, 1, 192), "decoder_pos_embed": torch.zeros(1, 5, 64)}
    decoder["decoder_blocks.0.attn.qkv.weight"] = torch.zeros(6, 2)
    student = {f"module.backbone.{n}": value for n, value in plain.items()}
    teacher = {f"backbone.{n}": value + 0.1 for n, value in plain.items()}
    found = []
    for content in (plain, {"model": plain | decoder}, {"student": student, "teacher": teacher}):
        torch.save(content, path)
        found.append(figures(call_script, images, path, arch=f"timm/{name}"))
    assert found[0][0] == found[1][0] == found[2][0]
    assert [one[2] for one in found] == ["", "model", "student.backbone"]
    for extra in ({"reg_token": torch.zeros(1, 4, 192)}, {"fc_norm.weight": torch.zeros(192)}):
        torch.save(plain | extra, path)
        flags = ("--arch", f"timm/{name}", "--weights", path, "--image_size", 32, images)
        assert_refused(call_script(KNN, *flags), f"1 weights unknown, first {next(iter(extra))}")


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


@pytest.mark.parametrize("state", [{}, {"epoch": "three"}, {0: torch.ones(2)}])
@pytest.mark.parametrize("script", [KNN, EXPORT])
def test_a_file_of_nothing_is_no_random_network(call_script, image_tree, tmp_path, state, script):
    torch.save(state, tmp_path / "x.pth")
    more = (image_tree,) if script is KNN else ("--output", tmp_path / "out.pth")
    flags = ("--weights", tmp_path / "x.pth", "--arch", "resnet18", *more)
    found = call_script(script, *flags)
    assert_refused(
        (found[0], "", found[2]), f"--weights {tmp_path / 'x.pth'}", "no weight of its names"
    )
    assert not (tmp_path / "out.pth").exists()


def test_a_result_is_of_one_prefix(call_script, images, tmp_path):
    """Two encoders of one file whose roles have one name."""
    torch.save({"target": named(network()), "target_ema": named(network(2))}, tmp_path / "x.pth")
    flags = ("--weights", tmp_path / "x.pth", "--arch", "resnet18", "--image_size", 32, "-j", 0)
    flags += ("--save", tmp_path, "--keep_done", images)
    assert call_script(KNN, *flags, "--prefix", "target")[0] == 0
    first = json.loads((tmp_path / "knn.json").read_text())
    code, stdout, _ = call_script(KNN, *flags, "--use-target")
    assert code == 0 and "has another backbone: replaced" in stdout
    second = json.loads((tmp_path / "knn.json").read_text())
    assert first["encoder"] == second["encoder"] == "target" and first["k"] != second["k"]
    assert (first["backbone"], second["backbone"]) == ("target", "target_ema")


def test_what_others_say_in_their_own_way_is_not_noted(call_script, images, tmp_path):
    args = {"image_size": [224, 224], "small_stem": 1, "arch": "resnet18"}
    state = {"state_dict": named(network()), "args": args, "format": 1, 7: "seven"}
    torch.save(state, tmp_path / "x.pth")
    flags = ("--weights", tmp_path / "x.pth", "--image_size", 32, "-j", 0, images)
    code, stdout, stderr = call_script(KNN, *flags)
    assert code == 0, stderr
    assert "its image_size is a list, which is not noted" in stdout


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        (KNN, ("--weights", "random"), "--prefix x: --weights random is no file"),
        (TRAIN, ("--arch", "conv4"), "--prefix x: no --weights is given"),
        (KNN, ("--weights", "{file}", "--use-target"), "--prefix x: not together with the target"),
    ],
)
def test_a_prefix_of_nothing(call_script, image_tree, tmp_path, script, flags, words):
    torch.save({"x": named(network())}, tmp_path / "x.pth")
    flags = [str(flag).format(file=tmp_path / "x.pth") for flag in flags]
    flags += ["--checkpoint_path", tmp_path] if script is TRAIN else ["--arch", "resnet18"]
    assert_refused(call_script(script, *flags, "--prefix", "x", image_tree), words)


def test_names_out_of_a_file_do_not_reach_the_terminal(call_script, tmp_path):
    state = {"student\x1b[31m": named(network()), "teacher": named(network(2))}
    torch.save(state | {"method": "evil\x1b[2J"}, tmp_path / "x.pth")
    flags = ("--weights", tmp_path / "x.pth", "--arch", "resnet18", "--prefix", "student\x1b[31m")
    code, stdout, stderr = call_script(EXPORT, *flags, "--output", tmp_path / "out.pth")
    assert code == 0, stderr
    assert "\x1b" not in stdout and "encoder: student\\x1b[31m" in stdout


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
