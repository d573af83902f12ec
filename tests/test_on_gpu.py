"""A GPU gives what the CPU gives: methods, views, evaluations, whole scripts.

The slow ones, which compile, come last.
"""

import argparse
import copy
import importlib
import json

import pytest
import test_engine
import tiny
import torch
from every_method import METHODS, Sizes, placed
from test_bad_input import assert_refused
from test_bank_precision import RUNS
from test_linear import hand_made_data, make_probe, sgd
from test_logistic import overlapping
from test_precision import encoders, two_views
from test_pseudo_label import ROUND, embeddings
from torch import nn
from torch.nn.functional import normalize

from semi_supervised.pseudo_label import PseudoLabelHead, train_head
from utils.cli import build_training
from utils.data import cropping
from utils.data.bad_images import BadImages
from utils.data.cropping import cut_crops
from utils.data.datasets import read_split
from utils.data.eval_loader import EvalLoader
from utils.data.image_cache import cache_images
from utils.data.train_loader import TwoViewLoader
from utils.evaluation import linear_probe
from utils.evaluation.features import extract_features
from utils.evaluation.logistic import fit_path
from utils.method import checkpoint
from utils.method.encoders import QueryTargetEncoders, build_backbone
from utils.method.neighbors import nearest

pytestmark = pytest.mark.gpu
DEVICES = ("cpu", "cuda")


@pytest.fixture(autouse=True)
def settings():
    """Convolutions with all bits of float32; what scripts set in this process is put back."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before
    torch.use_deterministic_algorithms(False)


def optimizer_of(model: nn.Module, *, learning_rate: float = 0.1) -> torch.optim.SGD:
    """As the training scripts build it."""
    flags = {"learning_rate": learning_rate, "sgd_momentum": 0.9, "weight_decay": 1e-2}
    device = next(model.parameters()).device
    return build_training.build_optimizer(argparse.Namespace(device=device, **flags), model)


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_as_on_the_cpu(name):
    """In float64, where the two differ by rounding far below."""
    method = METHODS[name]
    start, found = method.build(tiny.encoders(), Sizes()).double(), []
    for device in map(torch.device, DEVICES):
        model = copy.deepcopy(start).to(device)
        optimizer = optimizer_of(model)
        for batch in tiny.random_batches(6, small=method.small, symmetric=method.symmetric):
            loss, stats = model(placed(batch, device, torch.float64), **method.arguments)
            tiny.update(optimizer, loss)
            found.append((loss.item(), {name: value.item() for name, value in stats.items()}))
    for (loss, stats), (other, figures) in zip(found[:6], found[6:], strict=True):
        assert other == pytest.approx(loss, abs=1e-9)
        assert figures == pytest.approx(stats, abs=1e-4, nan_ok=True)  # in float32


def test_the_optimizer_takes_weights_and_momentum_in_any_layout():
    """One kernel for all, which refuses momentum that lies otherwise than its weight."""
    losses = []
    for layouts in ((False, True), (True, False)):  # before a checkpoint, after it
        states, found = None, []
        for channels_last in layouts:
            model = encoders(channels_last=channels_last).double().cuda()
            optimizer = optimizer_of(model)
            assert optimizer.param_groups[0]["fused"]
            if states:
                model.load_state_dict(states[0])
                checkpoint.load_optimizer(optimizer, states[1], what="x")
            for step, (images, _) in enumerate(two_views(4), 1):
                optimizer.param_groups[0]["lr"] = 1e-3 / step
                loss = model.query(images.double().cuda()).sum(dim=1).square().mean()
                tiny.update(optimizer, loss)
                found.append(loss.item())
            states = model.state_dict(), optimizer.state_dict()
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], abs=1e-9)


def test_a_bank_in_half_precision_is_searched_as_on_the_cpu():
    generator = torch.Generator().manual_seed(0)
    rows = normalize(torch.randn(3000, 64, generator=generator), dim=1).half()
    queries = normalize(torch.randn(70, 64, generator=generator), dim=1)
    allowed = torch.rand(70, 3000, generator=generator) < 0.01
    for which in (None, allowed[0], allowed):
        on_gpu = None if which is None else which.cuda()
        there = nearest(queries.cuda(), rows.cuda(), k=5, allowed=on_gpu)
        here = nearest(queries, rows, k=5, allowed=which)
        near, expected = (
            (queries.double() @ rows.double().T).gather(1, found.rows.cpu())
            for found in (there, here)
        )
        torch.testing.assert_close(near, expected, rtol=0, atol=1e-6)
        assert torch.equal(there.valid.cpu(), here.valid)


def test_random_numbers_go_on_in_a_resumed_run(tmp_path):
    """Those of the GPU: dropout draws from them."""

    class Noisy(test_engine.Method):
        def forward(self, batch):
            drawn.append(torch.rand((), device="cuda").item())
            return (self.weight * batch.value.cuda()).sum(), {}

    torch.cuda.manual_seed(3)
    drawn: list[float] = []
    test_engine.train(test_engine.make_run(tmp_path, model=Noisy().cuda(), save_freq=1))
    expected, drawn = drawn, []
    torch.cuda.manual_seed(4)
    again = {"model": Noisy().cuda(), "resume": str(tmp_path / "ckpt_epoch_1.pth")}
    test_engine.train(test_engine.make_run(tmp_path / "again", **again))
    assert len(expected) == 12 and drawn == expected[4:]


# Views.


def test_crops_cut_on_a_gpu_are_within_a_gray_level():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, 3, 37, 61), dtype=torch.uint8, generator=generator)
    boxes = torch.stack([torch.tensor([n % 9, n, 20 + n % 8, 25]) for n in range(60)])
    boxes = boxes.view(20, 3, 4).numpy()
    here, there = (cut_crops(images.to(device), boxes, 24).cpu().int() for device in DEVICES)
    assert (here - there).abs().max() <= 1 and (here != there).float().mean() < 1e-3


@pytest.mark.parametrize("flags", [{}, {"weak_strong": True, "symmetric": True}])
@pytest.mark.parametrize("where", ["none", "ram", "device"])
def test_batches_are_those_of_the_cpu(image_tree, where, flags):
    """From workers, and from images on the device; small crops too."""
    images, loaders = read_split(image_tree, "train"), []
    for device in map(torch.device, DEVICES):
        cached = images
        if where != "none":
            cached = cache_images(images, where, device=device, bad_images=BadImages())
        options = {"device": device, "cut_on_device": where == "device", "batch_size": 7, **flags}
        small = [cropping.CropGroup(2, 8, (0.1, 0.3))]
        workers = 2 if where == "none" else 0
        loader = TwoViewLoader(cached, image_size=16, small=small, num_workers=workers, **options)
        loaders.append(loader)
    count = 0
    for here, there in zip(*(loader.epoch(1) for loader in loaders), strict=True):
        count += 1
        assert torch.equal(here.index, there.index) and there.index.device.type == "cpu"
        assert torch.equal(here.label, there.label.cpu())
        pairs = zip((*here[:2], *here.small_views), (*there[:2], *there.small_views), strict=True)
        for one, two in pairs:
            assert two.is_cuda and two.is_contiguous()
            apart = (one - two.cpu()).abs()  # a gray level in a crop is up to 0.03 in its view
            assert apart.max() < 0.05 and (apart > 1e-4).float().mean() < 0.01
    assert count == 4


def test_no_batch_makes_the_host_wait(image_tree):
    """The whole way from images on the device to views of all kinds, ahead of the step."""
    images = read_split(image_tree, "train")
    cached = cache_images(images, "device", device=torch.device("cuda"), bad_images=BadImages())
    options = {"symmetric": True, "weak_strong": True, "small": [cropping.CropGroup(2, 8)]}
    options |= {"device": "cuda", "cut_on_device": True, "batch_size": 7, "image_size": 16}
    loader = TwoViewLoader(cached, **options)
    first = list(loader.epoch(1))  # libraries are set up
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = list(loader.epoch(2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(batches) == len(first) == 4


# Evaluation, and the classifier head.


def test_features_and_classifiers_are_those_of_the_cpu(image_tree):
    torch.manual_seed(0)
    backbone, images = build_backbone("conv4").module, read_split(image_tree, "val")
    found = []
    for device in DEVICES:
        loader = EvalLoader(images, batch_size=5, image_size=16, device=device)
        features, labels = extract_features(backbone.to(device), loader)
        assert features.device.type == labels.device.type == "cpu"
        found.append(features)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)

    features, labels = hand_made_data()
    figures = []
    for device in DEVICES:
        probe = make_probe(num_rates=2).to(device)
        batches = [(features[:12].to(device), labels[:12].to(device))] * 5
        optimizer = sgd(probe, [0.1, 0.01])
        assert bool(optimizer.param_groups[1]["fused"]) == (device == "cuda")
        losses = linear_probe.train_epoch(probe, batches, optimizer)
        figures.append((losses.tolist(), linear_probe.accuracy(probe, features, labels)))
    assert (
        figures[1][0] == pytest.approx(figures[0][0], abs=1e-9) and figures[0][1] == figures[1][1]
    )


def test_regression_and_head_are_those_of_the_cpu():
    x, y = overlapping()
    weights = []
    for device in DEVICES:
        *_, fit = fit_path(x.to(device), y, [1.0, 1e-2], num_classes=4, tolerance=1e-7)
        assert fit.converged and fit.weight.device.type == device
        weights.append(fit.weight.cpu())
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)

    torch.manual_seed(0)
    start, (rows, labels) = PseudoLabelHead("mlp", 6, 3).double(), embeddings()
    figures = []
    for device in DEVICES:
        head = copy.deepcopy(start).to(device)
        figures.append(train_head(head, rows.to(device), labels.to(device), seed=[0], **ROUND))
    assert figures[1] == pytest.approx(figures[0], rel=1e-5)  # its sums are in float32


# Scripts.


def run(call_script, script: str, *flags: object) -> str:
    """A script that ends well; what it printed."""
    code, stdout, stderr = call_script(importlib.import_module(script), *flags)
    assert code == 0, stderr
    return stdout


def losses(folder) -> list[float]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("name", RUNS)
def test_each_script_trains(call_script, image_tree, tmp_path, name):
    if name == "km":
        pytest.importorskip("faiss")
    script, flags = RUNS[name]
    common = (*tiny.FLAGS, "--epochs", 2, "--knn_freq", -1, "--device", "cuda")
    run(call_script, script.__name__, *common, *flags, "--checkpoint_path", tmp_path, image_tree)
    assert len(losses(tmp_path)) == 4 and all(0 < loss < 4 for loss in losses(tmp_path))


def test_a_run_goes_on_on_another_device(call_script, image_tree, tmp_path):
    """Its images, bank and random numbers on the GPU, on the CPU, and on the GPU again."""
    flags = (*tiny.FLAGS, "--knn_freq", -1, "--save_freq", 1, "--symmetric", "--weak_strong")
    flags += ("--cache_images", "device", "--bank_precision", "fp16", "--precision", "bf16")
    for epoch, device in enumerate(("cuda", "cpu", "cuda"), 1):
        layout = ("--channels_last",) if epoch > 1 else ()
        where = ("--device", device, "--epochs", epoch, "--resume", "auto")
        script = "self_supervised.train_msf_2q"
        run(call_script, script, *flags, *layout, *where, "--checkpoint_path", tmp_path, image_tree)
        state = tiny.state(tmp_path / f"ckpt_epoch_{epoch}.pth")
        fused = True if device == "cuda" else None
        assert state["optimizer"]["param_groups"][0]["fused"] is fused
        assert "cuda" in state["rng_states"][0]
    assert len(losses(tmp_path)) == 6


def test_the_same_bits_each_time_if_asked_for(call_script, image_tree, tmp_path):
    flags = (*tiny.FLAGS, "--arch", "resnet18", "--image_size", 32, "--precision", "bf16")
    flags += ("--knn_freq", -1, "--device", "cuda", "--deterministic", "--channels_last")
    for name, (script, extra) in RUNS.items():
        if name in ("2q", "top-all", "pseudo-labels"):
            for folder in ("one", "two"):
                place = ("--epochs", 1, "--checkpoint_path", tmp_path / folder)
                run(call_script, script.__name__, *flags, *extra, *place, image_tree)
            files = (tmp_path / folder / "ckpt_epoch_1.pth" for folder in ("one", "two"))
            tiny.assert_same_checkpoint(*files)


def test_a_network_that_cannot_give_the_same_bits_is_named(call_script, image_tree, tmp_path):
    flags = (*tiny.FLAGS, "--arch", "alexnet", "--image_size", 64, "--hidden_dim", 8, "--debug")
    flags += ("--knn_freq", -1, "--device", "cuda", "--deterministic", "--checkpoint_path")
    script = importlib.import_module("self_supervised.train_msf")
    code, _, stderr = call_script(script, *flags, tmp_path, image_tree)
    assert code == 1 and "error: --deterministic: adaptive_avg_pool2d" in stderr


def test_evaluations_run(call_script, image_tree, tmp_path):
    common = ("--weights", "random", "--arch", "conv4", "--image_size", 16, "--num_workers", 0)
    common += ("--batch_size", 8, "--device", "cuda", "--save", tmp_path)
    for flags in ((), ("--cached", "--lr", "0.1,0.01"), ("--fine-tune", "--lr", 0.01)):
        run(call_script, "eval.eval_linear", *common, "--epochs", 2, *flags, image_tree)
    run(call_script, "eval.eval_transfer", *common, "--shots", 2, "--draws", 2, image_tree)


def test_knn_runs(call_script, image_tree):
    pytest.importorskip("faiss")
    flags = ("--weights", "random", "--arch", "conv4", "--image_size", 16, "--num_workers", 0)
    assert "12 val images" in run(call_script, "eval.eval_knn", *flags, image_tree)


# Compiled.


@pytest.fixture
def compiler():
    """Skip where torch.compile finds none, and start anew."""
    try:
        torch.compile(torch.sin)(torch.zeros(2, device="cuda"))
    except Exception as error:
        pytest.skip(str(error).splitlines()[0])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def train(model: QueryTargetEncoders, *, small: bool, steps: int = 12) -> tuple[list[float], int]:
    """Pull queries to their targets: the losses, and the number of CUDA graphs halfway.

    Halfway the backbone is evaluated and the weights are copied, as for a checkpoint. small: two
    small crops too.
    """
    optimizer, found = optimizer_of(model, learning_rate=1e-3), []
    weight = next(model.parameters())
    for step, views in enumerate(two_views(steps)):
        query_view, target_view = (view.to(weight) for view in views)
        corners = query_view[..., :8, :8], query_view[..., 8:, 8:]
        q = model.query(query_view, *([torch.stack(corners)] if small else []))
        model.update_target()
        t = model.target(target_view)
        loss = (q - t).square().sum(dim=-1).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
        if step == steps // 2:
            backbone, recorded = model.query_encoder.backbone, num_graphs()
            copied = copy.deepcopy(model.state_dict())
            with torch.no_grad():
                assert backbone.eval()(query_view[:3]).isfinite().all()
            backbone.train()
            model.load_state_dict(copied)
    return torch.stack(found).tolist(), recorded


def num_graphs() -> int:
    """CUDA graphs that there are."""
    from torch._inductor import cudagraph_trees

    def count(nodes: dict) -> int:
        return sum(1 + count(node.children) for several in nodes.values() for node in several)

    device = torch.cuda.current_device()
    manager = cudagraph_trees.get_manager(device, create_if_none_exists=False)
    return count(manager.roots) if manager else 0


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_compiled_encoders_compute_the_same(compiler, cuda_graphs):
    """In float64: a tensor that was overwritten, or a gradient of the step before, would show."""
    eager, compiled = (encoders().double().cuda() for _ in range(2))
    compiled.compile(cuda_graphs=cuda_graphs)
    expected, _ = train(eager, small=cuda_graphs)
    found, recorded = train(compiled, small=cuda_graphs)
    assert found == pytest.approx(expected, abs=1e-8)
    weights = zip(eager.parameters(), compiled.parameters(), strict=True)
    assert all(torch.allclose(*pair, rtol=0, atol=1e-8) for pair in weights)
    if cuda_graphs:  # forward and backward of two sizes through two networks, and the target's
        assert recorded >= 9 and num_graphs() == recorded
        assert not torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]


BANK = ("--mem_bank_size", 20, "--topk", 3)


@pytest.mark.parametrize(
    ("script", "bank"),
    [("self_supervised.train_msf_2q", BANK), ("supervised.train_sup_xent", ())],
)
def test_a_script_runs_as_cuda_graphs(compiler, call_script, image_tree, tmp_path, script, bank):
    """And goes on without them, as without --compile, from what it saved within an epoch."""
    flags = ("--arch", "conv4", "--image_size", 16, "--batch_size", 8, "--num_workers", 0, *bank)
    flags += ("--knn_freq", -1, "--device", "cuda", "--save_minutes", 1e-9, "--print_freq", 2)
    fast = ("--compile", "--cuda_graphs", "--precision", "bf16", "--channels_last")
    place = ("--checkpoint_path", tmp_path, "--resume", "auto", image_tree)
    run(call_script, script, *flags, *fast, "--epochs", 3, *place)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_recorded_non_static_inputs"]
    run(call_script, script, *flags, "--epochs", 4, *place)
    assert len(losses(tmp_path)) == 8 and all(0 < loss < 4 for loss in losses(tmp_path))


def test_cuda_graphs_need_a_compiled_network(call_script, image_tree):
    script = importlib.import_module("self_supervised.train_msf")
    result = call_script(script, *tiny.FLAGS, "--knn_freq", -1, "--cuda_graphs", image_tree)
    assert_refused(result, "--cuda_graphs: only with --compile")
