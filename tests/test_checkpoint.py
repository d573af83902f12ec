"""Loading every known layout strictly, refusing the rest by name, saving atomically."""

import argparse
import itertools
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torchvision

from utils.method import checkpoint
from utils.method.encoders import QueryTargetEncoders, build_backbone
from utils.runtime import files
from utils.runtime.errors import InputError


@pytest.fixture(scope="module")
def backbone():
    torch.manual_seed(0)
    return build_backbone("resnet18")


@pytest.fixture(scope="module")
def encoders(backbone):
    """Query and target with different weights."""
    torch.manual_seed(1)
    encoders = QueryTargetEncoders(build_backbone("resnet18").module, backbone.feature_dim)
    with torch.no_grad():
        for value in encoders.target_encoder.state_dict().values():
            value.copy_(torch.randn_like(value.float()))
    return encoders


def published_layout(encoders, *, outer=""):
    """The published code's checkpoint of these encoders: DataParallel names, projector as fc."""
    names = {"query_encoder": "encoder_q", "target_encoder": "encoder_t", "predictor": "predict_q"}
    state = {}
    for name, value in encoders.state_dict().items():
        module, rest = name.split(".", 1)
        rest = rest.removeprefix("backbone.").replace("projector.", "fc.")
        state[f"{outer}{names[module]}.module.{rest}"] = value
    state |= {"queue": torch.zeros(256, 128), "labels": torch.zeros(256), "pool": torch.zeros(2)}
    state |= {"mlp_head.module.0.weight": torch.zeros(9, 128), "sup_queue": torch.zeros(128, 128)}
    return {"opt": argparse.Namespace(arch="resnet18"), "state_dict": state, "epoch": 200}


def test_published_names_are_those_recorded(encoders):
    """Our rendering of the published layout is the recorded one, name for name and shape."""
    recorded = Path(__file__).with_name("published_layout.json")
    expected = {name: shape for name, shape in json.loads(recorded.read_text())["resnet18"]}
    state = published_layout(encoders)["state_dict"]
    ours = {name: list(value.shape) for name, value in state.items() if "module" in name}
    del ours["mlp_head.module.0.weight"]
    assert ours == expected


@pytest.mark.parametrize("outer", ["", "module."])
@pytest.mark.parametrize("which", ["query", "target"])
def test_published_checkpoint(tmp_path, backbone, encoders, which, outer):
    path = tmp_path / "published.pth"
    torch.save(published_layout(encoders, outer=outer), path)
    state = checkpoint.load(path, flag="--weights")
    checkpoint.load_backbone(backbone, state, encoder=which, what="--weights")
    expected = getattr(encoders, f"{which}_encoder").backbone.state_dict()
    for name, value in backbone.module.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert checkpoint.settings(state)["arch"] == "resnet18"


def test_our_own_checkpoint(tmp_path, backbone, encoders):
    path = tmp_path / "ours.pth"
    state = {f"encoders.{name}": value for name, value in encoders.state_dict().items()}
    files.save(path, {"state_dict": state, "args": {"arch": "resnet18"}, "epoch": 3})
    loaded = checkpoint.load(path, flag="--weights")
    checkpoint.load_backbone(backbone, loaded, what="--weights")
    expected = encoders.query_encoder.backbone.state_dict()
    for name, value in backbone.module.state_dict().items():
        assert torch.equal(value, expected[name]), name
    fresh = QueryTargetEncoders(build_backbone("resnet18").module, 512)
    words = checkpoint.load_initial_weights(fresh, backbone, loaded, what="--weights")
    assert "predictor" in words
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, encoders.state_dict()[name]), name


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": s}])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_plain_torchvision_state_dict(tmp_path, backbone, wrap, prefix):
    torch.manual_seed(5)
    model = torchvision.models.resnet18(weights=None).eval()
    path = tmp_path / "plain.pth"
    torch.save(wrap({prefix + name: value for name, value in model.state_dict().items()}), path)
    checkpoint.load_backbone(backbone, checkpoint.load(path, flag="--weights"), what="--weights")
    images = torch.randn(2, 3, 64, 64)
    features = backbone.module.eval()(images)
    torch.testing.assert_close(model.fc(features), model(images))


def test_plain_weights_start_both_backbones(backbone, encoders):
    plain = torchvision.models.resnet18(weights=None).state_dict()
    fresh = QueryTargetEncoders(build_backbone("resnet18").module, 512)
    words = checkpoint.load_initial_weights(fresh, backbone, plain, what="--weights")
    assert words.startswith("backbone only")
    for encoder in (fresh.query_encoder, fresh.target_encoder):
        assert torch.equal(encoder.backbone.conv1.weight, plain["conv1.weight"])


def test_missing_unknown_and_reshaped_weights_are_named(backbone):
    plain = torchvision.models.resnet18(weights=None).state_dict()
    incomplete = {name: value for name, value in plain.items() if name != "layer1.0.conv1.weight"}
    with pytest.raises(InputError, match=r"1 weights missing, first layer1\.0\.conv1\.weight"):
        checkpoint.load_backbone(backbone, incomplete, what="--weights x")
    with pytest.raises(InputError, match=r"1 weights unknown, first extra\.weight"):
        checkpoint.load_backbone(backbone, plain | {"extra.weight": torch.zeros(8)}, what="x")
    with pytest.raises(InputError, match=r"1 weights of another shape, first conv1\.weight"):
        checkpoint.load_backbone(backbone, plain | {"conv1.weight": torch.zeros(1)}, what="x")
    with pytest.raises(InputError, match="missing"):
        checkpoint.load_backbone(build_backbone("resnet50"), plain, what="x")


def test_files_from_before_batch_counters_load(backbone):
    plain = torchvision.models.resnet18(weights=None).state_dict()
    old = {name: value for name, value in plain.items() if "num_batches_tracked" not in name}
    checkpoint.load_backbone(backbone, dict(old), what="x")
    assert torch.equal(backbone.module.conv1.weight, plain["conv1.weight"])


def densenet():
    return torchvision.models.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8)


def vision_transformer():
    sizes = {"num_heads": 2, "hidden_dim": 8, "mlp_dim": 16, "num_classes": 3}
    return torchvision.models.VisionTransformer(32, 16, num_layers=2, **sizes)


def mnasnet():
    return torchvision.models.mnasnet0_5(num_classes=3)


OLDER = {
    densenet: lambda n: re.sub(r"(denselayer\d+\.(?:norm|conv))([12])", r"\1.\2", n),
    vision_transformer: lambda n: n.replace(".0.", ".linear_1.").replace(".3.", ".linear_2."),
    mnasnet: str,
}


@pytest.mark.parametrize("build", OLDER)
def test_names_of_older_torchvision_releases(build):
    """As torchvision itself loads them: its rule for densenet, its modules' own for the others."""
    torch.manual_seed(1)
    now = {n: v + torch.randn_like(v.float()).to(v) for n, v in build().state_dict().items()}
    old = {
        OLDER[build](name) if "mlp" in name or build is densenet else name: value
        for name, value in now.items()
    }
    assert (old.keys() != now.keys()) == (build is not mnasnet)
    if build is vision_transformer:  # that these are names which torchvision itself reads
        model = build()
        model.load_state_dict(old)
        assert all(torch.equal(value, now[name]) for name, value in model.state_dict().items())
    model = build()
    checkpoint.load_strictly(model, old, what="x")
    for name, value in model.state_dict().items():
        assert torch.equal(value, now[name]), name


def test_an_older_densenet121_is_a_backbone():
    """The names that torchvision's published file has, by the rule that its own loader has."""
    state = torchvision.models.densenet121().state_dict()
    older = {OLDER[densenet](name): value for name, value in state.items()}
    assert "features.denseblock4.denselayer16.norm.1.running_var" in older
    backbone = build_backbone("densenet121")
    checkpoint.load_backbone(backbone, older, what="x")
    for name, value in backbone.module.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_a_name_beside_its_older_one_is_unknown():
    model = densenet()
    name = "features.denseblock1.denselayer1.norm1.weight"
    state = model.state_dict() | {name.replace("norm1", "norm.1"): torch.zeros(8)}
    with pytest.raises(InputError, match=r"1 weights unknown, first features.*\.norm\.1\.weight"):
        checkpoint.load_strictly(model, state, what="x")


def test_an_epoch_of_others_that_is_none_is_left_out(tmp_path, capsys):
    path = tmp_path / "x.pth"
    torch.save({"epoch": 7}, path)
    assert checkpoint.load(path, flag="--weights")["epoch"] == 7
    for given in (-1, 7.5, "7", torch.tensor(7), torch.nan, True, 2**70):
        torch.save({"epoch": given}, path)
        capsys.readouterr()
        assert "epoch" not in checkpoint.load(path, flag="--weights")
        assert f"--weights {path}: its epoch is " in capsys.readouterr().out
        files.save(path, {"format": checkpoint.FORMAT, "epoch": given})
        with pytest.raises(InputError, match=f"--weights {path}: epoch is .*, not a whole number"):
            checkpoint.load(path, flag="--weights")


class Malicious:
    """A pickle that would make a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("kind", ["torch", "pickle"])
def test_code_in_a_file_is_not_run(tmp_path, kind):
    path, trace = tmp_path / "evil.pth", tmp_path / "was_run"
    state = {"state_dict": {"a": torch.zeros(1)}, "opt": Malicious(trace)}
    if kind == "torch":
        torch.save(state, path)
    else:
        path.write_bytes(pickle.dumps(state))
    words = "holds posix.mkdir, a pickled object; only" if kind == "torch" else "not a readable"
    with pytest.raises(InputError, match=f"evil.pth: {words}"):
        checkpoint.load(path, flag="--weights")
    assert not trace.exists()


@pytest.mark.parametrize(
    "content", [b"", b"no checkpoint", b"\x80\x04]", b"PK\x03\x04" + b"x" * 100]
)
def test_no_checkpoint(tmp_path, content):
    path = tmp_path / "file.pth"
    path.write_bytes(content)
    with pytest.raises(InputError, match="--weights .*file.pth: not a") as error:
        checkpoint.load(path, flag="--weights")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="--resume .*other.pth: no such file"):
        checkpoint.load(tmp_path / "other.pth", flag="--resume")
    torch.save(torch.zeros(3), path)
    with pytest.raises(InputError, match="holds a Tensor"):
        checkpoint.load(path, flag="--weights")


def of_run(path, *, seal=b""):
    """A file with all that a run's checkpoint holds; seal: a comment that ends the zip archive."""
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(30, 5))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.grad = torch.randn(30, 5)
    optimizer.step()
    state = {"format": checkpoint.FORMAT, "epoch": 3, "step": None, "state_dict": {"a": weight}}
    state |= {"optimizer": optimizer.state_dict(), "rng_states": [{"cpu": torch.get_rng_state()}]}
    state |= {"seconds": 1.5, "args": {"arch": "conv4", "rates": [1, 0.5]}, "data": {"images": "x"}}
    files.save(path, state)
    if seal:
        content = path.read_bytes()
        path.write_bytes(content[:-2] + len(seal).to_bytes(2, "little") + seal)
    return path.read_bytes()


def test_truncated_checkpoint(tmp_path):
    path = tmp_path / "file.pth"
    whole = of_run(path)
    for length in (0, 1, *(int(len(whole) * share) for share in (0.3, 0.9, 0.999)), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=f"{path}: not a readable checkpoint"):
            checkpoint.load(path, flag="--weights")


@pytest.mark.parametrize("flips", [700, pytest.param(5000, marks=pytest.mark.slow)])
def test_a_flipped_bit_is_found_or_changes_nothing(tmp_path, flips):
    """Anywhere, and in the archive's directory, of which no checksum knows, bits of each byte.

    Among them is the one that makes a folder of an entry: torch then reads nothing into a tensor.
    """
    path = tmp_path / "file.pth"
    whole = of_run(path)
    expected = repr(checkpoint.load(path, flag="x")), tiny.tensors(checkpoint.load(path, flag="x"))
    random, found = np.random.default_rng(0), 0
    directory = range(whole.index(b"PK\x01\x02"), len(whole))
    bits = [4] if flips < 1000 else range(8)
    cases = [(place, int(random.integers(8))) for place in random.integers(0, len(whole), flips)]
    for place, bit in [*cases, *itertools.product(directory, bits)]:
        data = bytearray(whole)
        data[place] ^= 1 << bit
        path.write_bytes(data)
        try:
            state = checkpoint.load(path, flag="--weights")
        except InputError as error:
            assert str(error).startswith(f"--weights {path}: not a readable checkpoint")
            found += 1
        else:
            assert repr(state) == expected[0]
            there = tiny.tensors(state)
            assert there.keys() == expected[1].keys()
            assert all(torch.equal(value, expected[1][name]) for name, value in there.items())
    assert found > flips / 3


def test_flipped_bits_of_weights_in_files_of_others_are_found(tmp_path):
    path = tmp_path / "plain.pth"
    torch.save({"a": torch.ones(4000)}, path)
    data = bytearray(path.read_bytes())
    place = data.index(torch.ones(4).numpy().tobytes())
    data[place + 2] ^= 0x40
    path.write_bytes(data)
    assert not torch.equal(torch.load(path, weights_only=True)["a"], torch.ones(4000))
    with pytest.raises(InputError, match="not a readable checkpoint"):
        checkpoint.load(path, flag="--weights")


def test_the_seal_of_older_versions_is_a_comment(tmp_path):
    of_run(tmp_path / "file.pth", seal=b"cmsf sha256 " + b"0" * 64)
    assert checkpoint.load(tmp_path / "file.pth", flag="x")["epoch"] == 3


def test_settings_of_the_optimizer_are_as_they_are_now():
    """What the flags say, and whatever another torch has had."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, weight_decay=1e-4)
    state = torch.optim.SGD([weight], lr=0.3, momentum=0.5).state_dict()
    del state["param_groups"][0]["fused"]
    checkpoint.load_optimizer(optimizer, state, what="x")
    (group,) = optimizer.param_groups
    settings = (group["lr"], group["momentum"], group["weight_decay"], group["fused"])
    assert settings == (0.1, 0.9, 1e-4, None)
    two = torch.optim.SGD([weight, torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(InputError, match="x: optimizer: param_groups has other parameters"):
        checkpoint.load_optimizer(two, state, what="x")


@pytest.mark.parametrize(("saved", "here"), [(True, None), (None, True), (False, None)])
def test_an_optimizer_computes_as_suits_this_machine(saved, here):
    """A run of a GPU goes on on a CPU, and the other way round; also with another memory layout."""

    def started(fused, layout):
        weight = torch.nn.Parameter(torch.ones(2, 3, 2, 2).to(memory_format=layout))
        optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9, fused=fused)
        weight.grad = torch.arange(24.0).view(2, 3, 2, 2).to(memory_format=layout)
        return weight, optimizer

    _, before = started(saved, torch.contiguous_format)
    before.step()
    weight, optimizer = started(here, torch.channels_last)
    checkpoint.load_optimizer(optimizer, before.state_dict(), what="x")
    assert optimizer.param_groups[0]["fused"] is here
    momentum = optimizer.state[weight]["momentum_buffer"]
    assert momentum.stride() == weight.stride()
    assert torch.equal(momentum, torch.arange(24.0).view(2, 3, 2, 2))
    optimizer.step()
    torch.testing.assert_close(weight.detach(), 1 - 0.19 * torch.arange(24.0).view(2, 3, 2, 2))
