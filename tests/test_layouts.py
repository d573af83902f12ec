"""Which backbone is read of the checkpoints of others, and what is refused."""

import pytest
import torch
from other_layouts import (
    ONE,
    SMALL_STEM,
    TWO,
    assert_same,
    changed,
    head,
    named,
    network,
    numbered,
    read,
)
from torch import nn

from utils.method import checkpoint
from utils.method.encoders import build_backbone
from utils.runtime.errors import InputError


@pytest.mark.parametrize("name", ONE)
def test_a_file_with_one_backbone(name):
    make, prefix, aside = ONE[name]
    module = network(small_stem=name in SMALL_STEM)
    weights, found = read(make(module), module)
    assert_same(weights, module)
    assert (found.prefix, found.aside, found.role) == (prefix, aside, "query")
    with pytest.raises(InputError, match="--weights x: no target encoder in it; it has "):
        read(make(module), module, encoder="target")


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
    state = {"a.b": {"c": torch.ones(2)}, "a": {"b.c": torch.ones(2).to_sparse()}}
    assert read(state | {"net": named(network())}, network())[1].prefix == "net"
    state = {"a": {"net": named(network())}, "a.net": {"conv1.weight": network(2).conv1.weight}}
    with pytest.raises(InputError, match=r"two weights are called a\.net\.conv1\.weight"):
        read(state, network())
    for _ in range(101):
        state = {"a": state}
    with pytest.raises(InputError, match="--weights x: more than 100 dicts in one another"):
        read(state, network())


def by_module(table):
    """A dict for each part of a name."""
    tree = {}
    for name, value in table.items():
        *parts, last = name.split(".")
        place = tree
        for part in parts:
            place = place.setdefault(part, {})
        place[last] = value
    return tree


@pytest.mark.parametrize("around", [lambda tree: tree, lambda tree: {"net": tree}])
def test_a_dict_for_each_module(around):
    state = around(by_module(named(network()) | head("fc.", 8)))
    weights, found = read(state | {"optimizer": {"state": {0: network().conv1.weight}}}, network())
    assert_same(weights, network())
    assert found.aside[0] == "fc"
    more = {"norm_pre.weight": torch.ones(64), "extra.0.weight": torch.ones(8, 3, 3, 3)}
    with pytest.raises(InputError, match="2 weights unknown, first (norm_pre|extra)"):
        read(around(by_module(named(network()) | more)), network())


def test_names_that_wrappers_make_alike():
    """What a wrapper holds is another network than what lies beside it."""
    one, other = named(network()), named(network(2))
    half = dict([*one.items()][:60])
    for state in (
        half | {"module": {n: v for n, v in other.items() if n not in half}},
        {"m": half, "module": {"m": {n: v for n, v in other.items() if n not in half}}},
    ):
        with pytest.raises(InputError, match=r"does not fit: nearest is .*: \d+ weights missing"):
            read(state, network())
    for key in ("", "module"):
        state = one | {key: other}
        with pytest.raises(InputError, match="which is its query encoder"):
            read(state, network())
    assert_same(read(one | {"module": other}, network(2), prefix="module")[0], network(2))
    inside = {n.replace("layer1.", "layer1.module."): v for n, v in other.items() if "layer1" in n}
    for state in (
        one | inside,
        inside | one,
        one | {"conv1.module.weight": torch.zeros(64, 3, 7, 7)},
    ):
        with pytest.raises(InputError, match=r"two weights are called (layer1|conv1)\."):
            read(state, network())
    with pytest.raises(InputError, match=r"1 weights unknown, first module\.conv1\.weight"):
        read(one | {"module.conv1.weight": torch.zeros(64, 3, 7, 7)}, network())
    wrapped = {n.replace(".", "._fsdp_wrapped_module.", 1): v for n, v in one.items()}
    wrapped = {f"_fsdp_wrapped_module.{n}": v for n, v in wrapped.items()}
    weights, found = read({"state_dict": wrapped}, network())
    assert_same(weights, network())
    assert found.prefix == "state_dict"


def test_networks_in_lists():
    state = {"models": [named(network()), {"fc": torch.ones(2)}], "model_ema": named(network(2))}
    weights, found = read(state, network())
    assert_same(weights, network())
    assert found.prefix == "models.0"


def test_a_dict_that_is_there_twice():
    weights = named(network())
    state = {"best": weights, "model_ema": weights, "model": weights}
    assert read(state, network())[1].prefix == "best"
    assert read(state, network(), prefix="model")[1].prefix == "model"
    assert read(state, network(), encoder="target")[1].prefix == "model_ema"
    for _ in range(7):
        state = {number: state for number in range(10)}
    with pytest.raises(InputError, match="more than 100 dicts in one another, or 1,000,000 in all"):
        read(state, network())


def test_batch_counters_of_another_kind():
    weights = named(network())
    without = {n: v for n, v in weights.items() if not n.endswith("num_batches_tracked")}
    assert read({"net": without, "copy": weights}, network())[1].prefix == "net"
    for change in (
        torch.Tensor.half,
        lambda _: torch.ones(1),
        lambda _: torch.full((3,), torch.inf),
    ):
        counters = {n: change(v) for n, v in weights.items() if n not in without}
        state = {**weights, **counters}
        assert_same(read(state, network())[0], network())


def test_weights_that_the_network_cannot_hold():
    state = {n: v.double() if v.is_floating_point() else v for n, v in named(network()).items()}
    assert_same(read(state, network())[0], network())
    state["conv1.weight"] = torch.full_like(state["conv1.weight"], 1e300)
    with pytest.raises(InputError, match=r"1 weights are not finite, first conv1\.weight"):
        read(state, network())


def test_the_arch_that_a_file_of_others_names():
    for about in ({"arch": "resnet18"}, {"args": {"arch": "resnet18"}}):
        assert checkpoint.said({"state_dict": {}} | about, "arch", what="x") == "resnet18"
    for about in ({"args": {}, "arch": "resnet18"}, {"args": None, "arch": "resnet18"}):
        assert checkpoint.said({"state_dict": {}} | about, "arch", what="x") == "resnet18"
    for about in ({}, {"arch": network()}):
        assert checkpoint.said({"state_dict": {}} | about, "arch", what="x") is None


def test_nothing_of_it():
    with pytest.raises(
        InputError, match=r"no weight of its names \(its top-level keys: a\\nb, c\)"
    ):
        read({"a\nb": torch.ones(3), "c": {}}, network())
