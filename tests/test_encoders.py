"""Backbones, heads and the pair of encoders."""

import pytest
import torch
from torch import nn

from utils.method.encoders import (
    QueryTargetEncoders,
    SoleBackbone,
    build_backbone,
    check_image_size,
    mlp,
)
from utils.runtime.errors import InputError


@pytest.mark.parametrize(
    ("arch", "size", "features", "classifier"),
    [
        ("conv4", 32, 128, "fc"),
        ("resnet18", 64, 512, "fc"),
        ("resnet34", 64, 512, "fc"),
        ("resnet50", 64, 2048, "fc"),
        ("wide_resnet50_2", 64, 2048, "fc"),
        ("alexnet", 64, 4096, "classifier.6"),
        ("mobilenet_v2", 64, 1280, "classifier.1"),
    ],
)
def test_backbones_end_in_features(arch, size, features, classifier):
    backbone = build_backbone(arch)
    assert (backbone.feature_dim, backbone.classifier) == (features, classifier)
    with torch.no_grad():
        assert backbone.module.eval()(torch.randn(2, 3, size, size)).shape == (2, features)
    assert not [name for name in backbone.module.state_dict() if name.startswith(classifier)]


def test_small_stem_keeps_the_resolution():
    module = build_backbone("resnet18", small_stem=True).module
    stem = nn.Sequential(module.conv1, module.bn1, module.relu, module.maxpool)
    assert stem(torch.randn(2, 3, 32, 32)).shape == (2, 64, 32, 32)
    with pytest.raises(InputError, match="--small_stem"):
        build_backbone("alexnet", small_stem=True)


@pytest.mark.parametrize("arch", ["resnet51", "squeezenet1_0", "inception_v3", ""])
def test_unusable_architectures_are_refused(arch):
    with pytest.raises(InputError, match=f"--arch {arch}"):
        build_backbone(arch)


def test_image_size_is_tried_out():
    backbone = build_backbone("alexnet")
    check_image_size(backbone, "alexnet", 64)
    with pytest.raises(InputError, match="--image_size 32"):
        check_image_size(backbone, "alexnet", 32)
    assert backbone.module.training


def test_conv4_is_what_it_says():
    module = build_backbone("conv4").module
    convolutions = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    assert [layer.out_channels for layer in convolutions] == [16, 32, 64, 128]
    assert sum(isinstance(layer, nn.MaxPool2d) for layer in module.modules()) == 3


def test_heads_have_the_published_sizes():
    encoders = QueryTargetEncoders(nn.Flatten(), 12)
    projector = [tuple(layer.weight.shape) for layer in encoders.query_encoder.projector[::3]]
    predictor = [tuple(layer.weight.shape) for layer in encoders.predictor[::3]]
    assert projector == [(24, 12), (3, 24)]
    assert predictor == [(24, 3), (3, 24)]
    kinds = [type(layer) for layer in encoders.predictor]
    assert kinds == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]


def test_output_norm_has_no_parameters():
    head = mlp([4, 8, 3], output_norm=True)
    assert isinstance(head[-1], nn.BatchNorm1d)
    assert not list(head[-1].parameters())
    output = head(torch.randn(64, 4))
    torch.testing.assert_close(output.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(output.var(0, unbiased=False), torch.ones(3), atol=1e-2, rtol=0)


@pytest.fixture
def encoders():
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8))
    return QueryTargetEncoders(backbone, 8, proj_dim=4, momentum=0.9).double()


def test_target_starts_as_the_query_encoder_and_gets_no_gradient(encoders):
    query, target = encoders.query_encoder.state_dict(), encoders.target_encoder.state_dict()
    assert query.keys() == target.keys()
    assert all(torch.equal(query[name], target[name]) for name in query)
    images = torch.randn(5, 3, 2, 2, dtype=torch.float64)
    q, t = encoders.query(images), encoders.target(images)
    assert q.requires_grad and not t.requires_grad
    ones = torch.ones(5, dtype=torch.float64)
    torch.testing.assert_close(q.norm(dim=1), ones)
    torch.testing.assert_close(t.norm(dim=1), ones)
    (q * t).sum().backward()
    assert all(parameter.grad is None for parameter in encoders.target_encoder.parameters())
    assert all(parameter.grad is not None for parameter in encoders.predictor.parameters())


def test_moving_average_in_closed_form(encoders):
    """After n updates towards fixed weights f: g_n = m^n g_0 + (1 - m^n) f."""
    start = {n: p.clone() for n, p in encoders.target_encoder.named_parameters()}
    with torch.no_grad():
        for parameter in encoders.query_encoder.parameters():
            parameter.add_(torch.randn_like(parameter))
    for _ in range(7):
        encoders.update_target()
    goal = dict(encoders.query_encoder.named_parameters())
    for name, value in encoders.target_encoder.named_parameters():
        expected = 0.9**7 * start[name] + (1 - 0.9**7) * goal[name]
        torch.testing.assert_close(value.data, expected.data, rtol=0, atol=1e-12)


def test_moving_average_leaves_batch_norm_statistics_alone(encoders):
    encoders.query(torch.randn(6, 3, 2, 2, dtype=torch.float64) * 5 + 3)
    before = {n: b.clone() for n, b in encoders.target_encoder.named_buffers()}
    encoders.update_target()
    for name, buffer in encoders.target_encoder.named_buffers():
        assert torch.equal(buffer, before[name]), name
    moved = dict(encoders.query_encoder.named_buffers())["backbone.2.running_mean"]
    assert not torch.equal(moved, before["backbone.2.running_mean"])
    # and the target's own statistics follow its own views, since it runs in train mode
    encoders.target(torch.randn(6, 3, 2, 2, dtype=torch.float64) - 2)
    own = dict(encoders.target_encoder.named_buffers())["backbone.2.running_mean"]
    assert not torch.equal(own, before["backbone.2.running_mean"])


def conv_encoders():
    torch.manual_seed(0)
    backbone = build_backbone("conv4")
    return QueryTargetEncoders(backbone.module, 128, proj_dim=8, hidden_dim=16).double()


def test_small_crops_pass_in_one_batch_of_each_size():
    encoders, passes = conv_encoders(), []
    encoders.query_encoder.register_forward_hook(
        lambda _m, images, _o: passes.append(tuple(images[0].shape))
    )
    images = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    small = [torch.randn(n, 3, 3, size, size, dtype=torch.float64) for n, size in ((4, 8), (2, 12))]
    q = encoders.query(images, *small)
    assert passes == [(3, 3, 16, 16), (12, 3, 8, 8), (6, 3, 12, 12)]
    assert q.shape == (7, 3, 8)
    torch.testing.assert_close(q.norm(dim=2), torch.ones(7, 3, dtype=torch.float64))
    encoders.eval()  # each crop by itself
    q = encoders.query(images, *small)
    views = [images, *small[0], *small[1]]
    for view, expected in zip(q, views, strict=True):
        for embedded, image in zip(view, expected, strict=True):
            torch.testing.assert_close(embedded, encoders.query(image[None])[0])


def test_small_crops_of_images_that_are_there_twice():
    encoders = conv_encoders().eval()
    images = torch.randn(6, 3, 16, 16, dtype=torch.float64)
    small = torch.randn(2, 3, 3, 8, 8, dtype=torch.float64)
    q = encoders.query(images, small)
    assert q.shape == (3, 6, 8)
    assert torch.equal(q[1:, ::2], q[1:, 1::2])
    torch.testing.assert_close(q[2, 3], encoders.query(small[1, 1:2])[0])


def test_a_sole_backbone_has_the_names_of_the_query_backbone():
    """In float32 whatever it computes in, and laid out as asked for."""
    torch.manual_seed(0)
    backbone = build_backbone("conv4").module
    encoders = QueryTargetEncoders(backbone, 128)
    sole = SoleBackbone(backbone, autocast=torch.bfloat16, channels_last=True)
    names = {name for name in encoders.state_dict() if name.startswith("query_encoder.backbone.")}
    assert sole.state_dict().keys() == names
    images = torch.randn(4, 3, 16, 16)
    features, exact = sole(images), backbone(images)
    assert features.dtype == torch.float32 and not torch.equal(features, exact)
    torch.testing.assert_close(features, exact, rtol=0.05, atol=0.02)
    assert backbone.features[0].weight.is_contiguous(memory_format=torch.channels_last)
