"""Networks that are built for one image size, and those of timm, in every script."""

import functools
import importlib
import json

import numpy as np
import pytest
import tiny
import torch
import torchvision
from conftest import ROOT
from test_bad_input import assert_refused
from torch import nn
from torchvision.models import vision_transformer

from utils.method import batch_norm
from utils.method.encoders import (
    QueryTargetEncoders,
    build_backbone,
    check_image_size,
    lay_channels_last,
)
from utils.runtime import distributed, files
from utils.runtime.errors import InputError

MSF, XENT = "self_supervised.train_msf", "supervised.train_sup_xent"
SCRIPTS = {
    "self_supervised.train_msf_2q": ("--topkp", 4, "--symmetric"),
    "self_supervised.train_msf_km": ("--num_clusters", 3),
    "supervised.train_sup_msf": (),
    "semi_supervised.train_pseudo_cmsf": ("--label_fraction", 0.5, "--pseudo_lbl_epochs", 2),
}
TINY = (*tiny.FLAGS, "--image_size", 32, "--knn_freq", -1)
ALONE = tuple(f for f in TINY if f not in ("--mem_bank_size", 20, "--topk", 3))  # without a bank
HEADS_ALONE = "no batch norm in the backbone, only in projector and predictor"


@pytest.fixture
def timm():
    return pytest.importorskip("timm")


@pytest.fixture
def one_thin_layer(monkeypatch):
    """torchvision's vision transformers have one layer of 48 channels, and names as ever."""
    thin = {"num_layers": 1, "num_heads": 2, "hidden_dim": 48, "mlp_dim": 64}
    whole = vision_transformer.VisionTransformer
    build = lambda **sizes: whole(**sizes | thin)  # noqa: E731
    monkeypatch.setattr(vision_transformer, "VisionTransformer", build)


def call(call_script, name: str, *flags: object) -> str:
    """Call a script that must end well: its stdout."""
    code, stdout, stderr = call_script(importlib.import_module(name), *flags)
    assert code == 0, stderr
    return stdout


@pytest.mark.usefixtures("one_thin_layer", "timm")
@pytest.mark.parametrize(("arch", "features"), [("vit_b_16", 48), ("timm/test_vit", 64)])
def test_trained_resumed_evaluated_and_taken_elsewhere(
    call_script, image_tree, tmp_path, arch, features
):
    """With the flags of training alone; the evaluations need no --arch and no --image_size."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    last = whole / "ckpt_epoch_2.pth"
    flags = (*TINY, "--arch", arch, "--epochs", 2, "--save_freq", 1, "--knn_freq", 0, image_tree)
    for folder, resume in ((whole, ()), (broken, ("--resume", whole / "ckpt_epoch_1.pth"))):
        said = call(call_script, MSF, *flags, "--checkpoint_path", folder, *resume)
        assert f"--arch {arch}: {HEADS_ALONE}\n" in said
    tiny.assert_same_checkpoint(last, broken / last.name)

    common = ("--weights", last, "-j", 0)
    call(call_script, "eval.eval_knn", *common, "--save", tmp_path, image_tree)
    found = json.loads((tmp_path / "knn.json").read_text())
    assert (found["arch"], found["image_size"]) == (arch, 32)
    line = json.loads((whole / "log.jsonl").read_text().splitlines()[-1])
    assert {k: v["accuracy"] for k, v in line["knn"].items()} == {
        k: v["accuracy"] for k, v in found["k"].items() if k in line["knn"]
    }
    for way in ("--cached", "--fine-tune"):
        flags = (*common, way, "--epochs", 1, "--lr", 0.1, "-b", 15, "--save", tmp_path / way)
        call(call_script, "eval.eval_linear", *flags, image_tree)
    call(call_script, "eval.eval_transfer", *common, "--shots", 2, "--draws", 1, image_tree)
    called_elsewhere(call_script, last, arch, features, image_tree)


def called_elsewhere(call_script, last, arch, features, image_tree):
    """The exported file in the library that the network is of, in torch.hub, and in our script."""
    data = ("-j", 0, "--split", "val", image_tree)
    out, rows = last.with_name("backbone.pth"), last.with_name("rows.npz")
    call(call_script, "eval.export_backbone", "--weights", last, "--output", out)
    call(call_script, "eval.extract_features", "--weights", out, "--output", rows, *data)
    written = torch.load(out, weights_only=True)
    about = written["metadata"]
    assert (about["arch"], about["image_size"], about["feature_dim"]) == (arch, 32, features)
    if arch.startswith("timm/"):
        import timm

        theirs = timm.create_model(arch.removeprefix("timm/"), num_classes=0, img_size=32)
    else:
        theirs = torchvision.models.get_model(arch, weights=None, image_size=32)
        theirs.heads = nn.Identity()
    theirs.load_state_dict(written["state_dict"])
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    load = functools.partial(torch.hub.load, str(ROOT), "cmsf", source="local")
    with torch.no_grad():
        expected = theirs.eval()(images)
        assert expected.shape == (3, features) and expected.std() > 0.01
        for weights in (out, last):
            assert torch.equal(load(weights=weights)(images), expected)
    assert np.load(rows)["features"].shape == (12, features)
    with pytest.raises(ValueError, match=r"image_size 64\): .* of another shape, first .*pos_emb"):
        load(weights=out, image_size=64)


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("script", SCRIPTS)
def test_all_methods_with_half_precision(call_script, image_tree, tmp_path, script):
    flags = (*TINY, "--arch", "timm/test_vit", "--precision", "bf16", "--epochs", 1)
    flags = (*flags, *SCRIPTS[script], "--checkpoint_path", tmp_path, image_tree)
    assert HEADS_ALONE in call(call_script, script, *flags)
    values = tiny.tensors(tiny.state(tmp_path / "ckpt_epoch_1.pth")["state_dict"]).values()
    assert {v.dtype for v in values if v.is_floating_point()} == {torch.float32}


@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize(("arch", "has_norm"), [("test_vit", False), ("test_byobnet", True)])
def test_cross_entropy(call_script, image_tree, tmp_path, arch, has_norm):
    flags = (*ALONE, "--arch", f"timm/{arch}", "--precision", "bf16", "--epochs", 1)
    said = call(call_script, XENT, *flags, "--checkpoint_path", tmp_path, image_tree)
    assert ("no batch norm in it" in said) == (not has_norm)


@pytest.mark.parametrize(
    ("arch", "size", "words"),
    [
        ("vit_b_16", 40, ("--image_size 40", "--arch vit_b_16", "patch size")),
        ("maxvit_t", 32, ("--image_size 32", "--arch maxvit_t", "partition size 7")),
        ("timm/test_vit", 40, ("--image_size 40", "--arch timm/test_vit", "patch size")),
        ("timm/vit_tiny_patch16_224", 33, ("--image_size 33: --arch timm/vit_tiny", "patch size")),
        ("timm/halonet26t", 30, ("--image_size 30", "--arch timm/halonet26t (AssertionError)")),
        ("timm/no_such_net", 32, ("--arch timm/no_such_net: unknown to timm",)),
        ("timm/hf-hub:timm/test_vit", 32, ("--arch timm/hf-hub:timm/test_vit: unknown to",)),
        ("timm/test_vit.mine", 32, ("--arch timm/test_vit.mine:", "mine")),
        ("timm/qwen3_vit_88m_enc", 32, ("--arch timm/qwen3_vit_88m_enc", "no features (B, F)")),
        ("timm/", 32, ("--arch timm/: unknown",)),
    ],
)
def test_what_cannot_be_built(timm, arch, size, words):
    with pytest.raises(InputError) as error:
        check_image_size(build_backbone(arch, image_size=size), arch, size)
    assert all(word in str(error.value).replace(" cannot take it", "") for word in words)
    assert "\n" not in str(error.value)


def test_features_of_another_shape_are_refused(timm):
    backbone = build_backbone("timm/test_convnext")
    backbone.module.reset_classifier(0, "")  # as timm's encoders without pooling
    with pytest.raises(InputError, match=r"--arch x: makes \(1, 64, 2, 2\) of an image at"):
        check_image_size(backbone, "x", 64)


@pytest.mark.parametrize("name", [MSF, "eval.eval_knn"])
def test_refused_by_the_scripts(call_script, image_tree, without_package, timm, name):
    script = importlib.import_module(name)
    weights = ("--weights", "random") if name != MSF else TINY
    flags = (*weights, "--arch", "timm/test_vit")
    for size in (8, 40):
        refused = call_script(script, *flags, "--image_size", size, image_tree)
        assert_refused(refused, f"--image_size {size}: --arch timm/test_vit", "patch size")
    without_package("timm")
    refused = call_script(script, *flags, "--image_size", 32, image_tree)
    assert_refused(refused, "--arch timm/test_vit: needs the package timm (pip install it)")


@pytest.mark.usefixtures("timm", "one_thin_layer")
def test_small_crops_need_a_network_of_any_size(call_script, image_tree, tmp_path):
    script, crops = importlib.import_module(MSF), ("--multi_crop", "2x32:0.2-1,2x16:0.05-0.2")
    flags = (*TINY, *crops, "--epochs", 1, "--checkpoint_path", tmp_path, image_tree)
    for arch, words in (
        ("vit_b_16", "Expected 32 but got 16"),
        ("timm/vit_tiny_patch16_224", "(32)"),
    ):
        refused = call_script(script, *flags, "--arch", arch)
        assert_refused(refused, f"--multi_crop: crops of side 16: --arch {arch} cannot", words)
    assert not list(tmp_path.iterdir())
    call(call_script, MSF, *flags, "--arch", "timm/test_byobnet")


def test_position_embeddings_of_another_size(call_script, image_tree, tmp_path, timm):
    torch.manual_seed(0)
    weights = build_backbone("timm/test_vit", image_size=48).module.state_dict()
    path = tmp_path / "file.pth"
    about = {"arch": "timm/test_vit", "image_size": 48, "small_stem": False}
    for told in ({}, about):
        files.save(path, {"state_dict": weights, "args": told})
        flags = ("--weights", path, "--arch", "timm/test_vit", "--image_size", 32)
        sizes = ", --image_size 32, trained at 48" if told else ""
        for name in (MSF, "eval.eval_knn"):
            more = TINY if name == MSF else ()
            refused = call_script(importlib.import_module(name), *more, *flags, image_tree)
            words = (f"--weights {path} (--arch timm/test_vit{sizes}): does not fit", "pos_embed")
            assert_refused(refused, *words)


def test_small_stems_of_timm_are_those_of_its_resnets(timm):
    module = build_backbone("timm/resnet18", small_stem=True).module
    assert module.conv1.weight.shape == (64, 3, 3, 3) and isinstance(module.maxpool, nn.Identity)
    assert module.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 512)
    for arch in ("timm/test_resnet", "timm/test_vit", "vit_b_32", "timm/legacy_xception"):
        with pytest.raises(InputError, match=f"--small_stem: only for ResNets, .* {arch}"):
            build_backbone(arch, small_stem=True, image_size=32)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_activations_in_batch_norms_stay_when_these_are_synchronized(
    timm, monkeypatch, tmp_path, device
):
    """With one process, whose batch is the whole one; on a GPU layers of another class."""
    torch.manual_seed(0)
    plain, converted = (build_backbone("timm/test_byobnet").module for _ in range(2))
    converted.load_state_dict(plain.state_dict())
    names = list(plain.state_dict())
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    converted = batch_norm.synchronized(converted, torch.device(device))
    assert list(converted.state_dict()) == names
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        if device == "cpu":  # torch's own synchronizes on GPUs only
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
            try:
                one, other = plain(images), converted(images)
            finally:
                torch.distributed.destroy_process_group()
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(plain.eval()(images), converted.eval()(images))


def test_weights_of_3d_convolutions_have_no_channels_last():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv3d(3, 4, 3), nn.Linear(3, 4))
    lay_channels_last(network)
    assert network[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert network[1].weight.is_contiguous()


def test_vit_b_16_at_32_pixels():
    """Four patches and the class token; the same seed gives the same bits."""
    torch.manual_seed(3)
    backbone = build_backbone("vit_b_16", image_size=32)
    assert (backbone.feature_dim, backbone.classifier) == (768, "heads.head")
    assert backbone.module.encoder.pos_embedding.shape == (1, 5, 768)
    check_image_size(backbone, "vit_b_16", 32)
    torch.manual_seed(3)
    expected = torchvision.models.vit_b_16(weights=None, image_size=32)
    first = backbone.module.conv_proj.weight
    assert torch.equal(first, expected.conv_proj.weight) and first.std() > 0


@pytest.mark.slow
def test_vit_b_16_itself(call_script, image_tree, tmp_path):
    flags = (*TINY, "--arch", "vit_b_16", "--epochs", 1, "--checkpoint_path", tmp_path, image_tree)
    assert HEADS_ALONE in call(call_script, MSF, *flags)
    last = tmp_path / "ckpt_epoch_1.pth"
    call(call_script, "eval.eval_knn", "--weights", last, "-j", 0, image_tree)
    called_elsewhere(call_script, last, "vit_b_16", 768, image_tree)


@pytest.mark.parametrize("arch", ["vit_b_16", "timm/test_vit"])
def test_compiled_whole(monkeypatch, one_thin_layer, timm, arch):
    """One graph for each network, with a compiler that only counts what it gets."""
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.manual_seed(0)
    backbone = build_backbone(arch, image_size=32)
    options = {"autocast": torch.bfloat16, "channels_last": True}
    encoders = QueryTargetEncoders(backbone.module, backbone.feature_dim, **options)
    images = torch.randn(8, 3, 32, 32)
    eager = encoders.query(images), encoders.target(images)
    encoders.compile(backend=counting)
    compiled = encoders.query(images), encoders.target(images)
    assert len(graphs) == 3
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0.02)


@pytest.mark.gpu
@pytest.mark.usefixtures("timm")
@pytest.mark.parametrize("flags", [(), ("--precision", "bf16"), ("--channels_last",)])
def test_on_a_gpu_a_vision_transformer_trains_and_is_measured(
    call_script, image_tree, tmp_path, flags
):
    arch = ("--arch", "timm/vit_tiny_patch16_224", "--checkpoint_path", tmp_path)
    how = (*TINY, *arch, "--epochs", 1, "--knn_freq", 0, "--device", "cuda", *flags)
    call(call_script, MSF, *how, image_tree)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").open()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses and np.isfinite(losses).all()
    assert 0 <= records[-1]["knn"]["1"]["accuracy"] <= 100
