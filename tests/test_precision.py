"""bfloat16, channels last, compilation and TF32: other arithmetic for the same method."""

import argparse
import copy
import importlib
import json
import warnings

import pytest
import test_engine
import tiny
import torch
from torch import nn

from utils.cli import build_training
from utils.method import checkpoint
from utils.method.encoders import QueryTargetEncoders, SoleBackbone, build_backbone
from utils.runtime.errors import InputError

SCRIPTS = {
    "self_supervised.train_msf_2q": (),
    "supervised.train_sup_msf": (),
    "semi_supervised.train_pseudo_cmsf": ("--label_fraction", 0.5, "--pseudo_lbl_epochs", 2),
}
TINY = (*tiny.FLAGS, "--knn_freq", -1)
BF16 = {"autocast": torch.bfloat16}


def encoders(**options) -> QueryTargetEncoders:
    """conv4 and small heads, always of the same weights."""
    torch.manual_seed(0)
    backbone = build_backbone("conv4")
    sizes = {"proj_dim": 16, "hidden_dim": 32, "proj_bn": True, "momentum": 0.9}
    return QueryTargetEncoders(backbone.module, backbone.feature_dim, **sizes, **options)


def two_views(steps: int):
    """Noisy views of 32 images, two in each step."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(32, 3, 16, 16, generator=generator)
    for _ in range(steps):
        noise = torch.randn(2, 32, 3, 16, 16, generator=generator)
        yield images + noise[0] / 3, images + noise[1] / 3


def train(model: QueryTargetEncoders, *, steps: int) -> list[float]:
    """Pull queries to their targets, in the model's own dtype; the losses.

    With fewer images, or steps that are larger, rounding alone grows to differences of 0.5.
    """
    optimizer, losses = sgd(model, learning_rate=1e-3), []
    dtype = next(model.parameters()).dtype
    for query_view, target_view in two_views(steps):
        q = model.query(query_view.to(dtype))
        model.update_target()
        loss = (q - model.target(target_view.to(dtype))).square().sum(dim=1).mean()
        tiny.update(optimizer, loss)
        losses.append(loss.item())
    return losses


def sgd(model: QueryTargetEncoders, *, learning_rate: float) -> torch.optim.SGD:
    """SGD over what has a gradient."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9)


def layout(state: dict) -> dict:
    """What a reader of a checkpoint relies on: names, shapes, dtypes, in order."""
    return {name: (value.shape, value.dtype) for name, value in tiny.tensors(state).items()}


def output_dtypes(model: QueryTargetEncoders) -> dict[str, torch.dtype]:
    """What every convolution and linear layer gave in one step."""
    seen = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(lambda *call, n=name: seen.update({n: call[-1].dtype}))
    train(model, steps=1)
    return seen


def test_every_layer_computes_in_what_was_asked_for():
    for options, expected in ((BF16, torch.bfloat16), ({}, torch.float32)):
        seen = output_dtypes(encoders(**options))
        parts = {name.split(".")[0] for name in seen}
        assert parts == {"query_encoder", "predictor", "target_encoder"} and len(seen) == 14
        assert set(seen.values()) == {expected}


def test_embeddings_gradients_and_weights_stay_float32():
    model = encoders(**BF16)
    (query_view, target_view), *_ = two_views(1)
    q, t = model.query(query_view), model.target(target_view)
    assert q.dtype == t.dtype == torch.float32
    for embeddings in (q, t):  # normalized in bfloat16 the norms would be off by some 1e-3
        torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(32), rtol=0, atol=1e-6)
    (q * t).sum().backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert {g.dtype for g in gradients} == {torch.float32}
    assert all(g.isfinite().all() for g in gradients)
    train(model, steps=2)
    assert layout(model.state_dict()) == layout(encoders().state_dict())


def test_bf16_is_near_float32():
    """And not the same."""
    for embed, view in (("query", 0), ("target", 1)):
        images = next(two_views(1))[view]
        exact, rounded = (getattr(encoders(**o), embed)(images) for o in ({}, BF16))
        cosine = (exact * rounded).sum(dim=1)
        assert cosine.min() > 0.995 and cosine.max() < 1 - 1e-6


def test_float64_is_not_cast_down():
    model = encoders().double()
    query_view, target_view = next(two_views(1))
    assert model.query(query_view.double()).dtype == torch.float64
    assert model.target(target_view.double()).dtype == torch.float64


def test_no_cast_weight_outlives_its_step():
    """Under an autocast of the caller's too, whose cache would last over all steps."""
    model, images = encoders(**BF16), next(two_views(1))[0]
    optimizer = sgd(model, learning_rate=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            tiny.update(optimizer, model.query(images).sum(dim=1).square().sum())
            model.update_target()
            fresh = copy.deepcopy(model)
            embedded = model.query(images), model.target(images)
            with torch.autocast("cpu", enabled=False):  # and with it nothing that was cached
                expected = fresh.query(images), fresh.target(images)
            assert torch.equal(embedded[0], expected[0]) and torch.equal(embedded[1], expected[1])


def test_target_in_bf16_follows_the_average():
    """A step of the average far below bfloat16's resolution is not lost."""
    model = encoders(**BF16)
    model.momentum = 0.999
    before = [p.clone() for p in model.target_encoder.parameters()]
    with torch.no_grad():
        for parameter in model.query_encoder.parameters():
            parameter.add_(0.01)
    model.update_target()
    for old, new in zip(before, model.target_encoder.parameters(), strict=True):
        torch.testing.assert_close(new.data, old.data + 1e-5, rtol=0, atol=2e-7)


def test_channels_last_gives_the_same_results():
    plain, last = encoders(), encoders(channels_last=True)
    convolutions = [layer for layer in last.modules() if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == 8
    query_view, target_view = next(two_views(1))
    seen = []
    for layer in convolutions:
        layer.register_forward_hook(lambda _, given, result: seen.extend((given[0], result)))
    for one, other in (
        (plain.query(query_view), last.query(query_view)),
        (plain.target(target_view), last.target(target_view)),
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    tensors = seen + [layer.weight for layer in convolutions]
    assert len(tensors) == 24
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors)
    assert layout(last.state_dict()) == layout(plain.state_dict())

    last.double().load_state_dict(plain.double().state_dict())  # neither changes the layout
    assert train(last, steps=20) == pytest.approx(train(plain, steps=20), abs=1e-9)
    assert all(c.weight.is_contiguous(memory_format=torch.channels_last) for c in convolutions)


@pytest.mark.parametrize("options", [{}, BF16 | {"channels_last": True}], ids=["fp32", "bf16"])
def test_compiled_encoders_are_the_same_and_compiled_once(options):
    """With a compiler that only counts what it gets: in place, and no backbone of its own."""
    graphs = []

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    eager, compiled = encoders(**options), encoders(**options)
    compiled.compile(backend=counting)
    losses = train(compiled, steps=20)
    assert len(graphs) == 3  # query encoder, predictor, target encoder
    assert losses == pytest.approx(train(eager, steps=20), abs=1e-6)
    backbone = compiled.query_encoder.backbone
    assert backbone.eval()(torch.randn(3, 3, 16, 16)).shape == (3, 128)
    backbone.train()
    train(compiled, steps=1)
    assert len(graphs) == 3
    one, other = eager.state_dict(), copy.deepcopy(compiled).state_dict()
    assert layout(one) == layout(compiled.state_dict()) == layout(other)


@pytest.fixture
def compiler():
    """Skip where torch.compile finds none."""
    try:
        torch.compile(torch.sin)(torch.zeros(2))
    except Exception as error:
        pytest.skip(str(error).splitlines()[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "options", "tolerance"),
    [(torch.float64, {}, 1e-9), (torch.float32, {}, 1e-3), (torch.float32, BF16, 0.1)],
    ids=["fp64", "fp32", "bf16"],
)
def test_losses_of_compiled_encoders(compiler, dtype, options, tolerance):
    """Compiled arithmetic rounds otherwise, but does not compute anything else."""
    torch._dynamo.reset()
    eager, compiled = (encoders(**options).to(dtype) for _ in range(2))
    compiled.compile()
    losses = train(compiled, steps=20)
    assert losses == pytest.approx(train(eager, steps=20), abs=tolerance)
    assert layout(compiled.state_dict()) == layout(eager.state_dict())


def run(call_script, script: str, folder, *flags: object) -> dict:
    """One epoch of a script; its checkpoint."""
    module = importlib.import_module(script)
    common = (*TINY, *SCRIPTS[script], "--checkpoint_path", folder, "--epochs", 1)
    code, _, stderr = call_script(module, *common, *flags)
    assert code == 0, stderr
    return tiny.state(folder / "ckpt_epoch_1.pth")


@pytest.mark.parametrize("script", SCRIPTS)
def test_checkpoints_have_one_layout(call_script, image_tree, tmp_path, script):
    """And a bank of float32 in it, with rows of unit norm."""
    plain = run(call_script, script, tmp_path / "fp32", image_tree)
    flags = ("--precision", "bf16", "--channels_last", "--tf32")
    other = run(call_script, script, tmp_path / "bf16", *flags, image_tree)
    assert layout(plain) == layout(other)
    dtypes = {v.dtype for v in tiny.tensors(other).values() if v.is_floating_point()}
    assert dtypes == {torch.float32}
    one, two = (state["state_dict"]["bank.features"] for state in (plain, other))
    assert one.any(dim=1).all()
    torch.testing.assert_close(two.norm(dim=1), torch.ones(len(two)), rtol=0, atol=1e-6)
    assert not torch.equal(one, two)
    assert other["args"]["precision"] == "bf16" and plain["args"]["precision"] == "fp32"


def convolutions(state: dict) -> dict[str, torch.Tensor]:
    """What a checkpoint holds in the shape of a convolution's weight with several channels."""
    found = {name: value for name, value in tiny.tensors(state).items() if value.dim() == 4}
    return {name: value for name, value in found.items() if value.shape[1] > 1}


def test_a_resumed_run_has_the_layout_and_the_bits_of_one_that_was_not(
    call_script, image_tree, tmp_path
):
    """The momentum's layout too: SGD rounds otherwise where it is not that of the weights."""
    script, last = "self_supervised.train_msf_2q", "ckpt_epoch_2.pth"
    run(call_script, script, tmp_path / "once", "--epochs", 2, "--save_freq", 1, image_tree)
    run(call_script, script, tmp_path / "twice", image_tree)
    resumed = ("--epochs", 2, "--save_freq", 1, "--resume", "auto", image_tree)
    run(call_script, script, tmp_path / "twice", *resumed)
    tiny.assert_same_checkpoint(tmp_path / "once" / last, tmp_path / "twice" / last)
    for folder in ("once", "twice"):
        weights = convolutions(tiny.state(tmp_path / folder / last))
        assert len(weights) == 12  # of two encoders, and the momentum of one
        for name, value in weights.items():
            assert value.is_contiguous(memory_format=torch.channels_last), name
    settings = tiny.state(tmp_path / "twice" / last)["args"]
    assert settings["channels_last"] is True


def test_weights_go_from_one_layout_to_the_other(call_script, image_tree, tmp_path):
    """A run of plain layout goes on with the channels last; a network of either reads it."""
    script = "self_supervised.train_msf_2q"
    plain = run(call_script, script, tmp_path, "--no_channels_last", image_tree)
    assert plain["args"]["channels_last"] is False
    assert all(value.is_contiguous() for value in convolutions(plain).values())
    run(call_script, script, tmp_path, "--epochs", 2, "--resume", "auto", image_tree)
    backbone = build_backbone("conv4")
    state = checkpoint.load(tmp_path / "ckpt_epoch_2.pth", flag="--weights")
    checkpoint.load_backbone(backbone, state, what="--weights")
    for name, value in backbone.module.state_dict().items():
        assert value.is_contiguous()
        assert torch.equal(value, state["state_dict"][f"encoders.query_encoder.backbone.{name}"])


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_compiled_scripts(compiler, call_script, image_tree, tmp_path, script):
    torch._dynamo.reset()
    plain = run(call_script, script, tmp_path / "eager", image_tree)
    flags = ("--compile", "--knn_freq", 1)
    other = run(call_script, script, tmp_path / "compiled", *flags, image_tree)
    assert layout(plain) == layout(other)
    losses = []
    for name in ("eager", "compiled"):
        lines = map(json.loads, (tmp_path / name / "log.jsonl").open())
        losses.append(next(line["loss"] for line in lines if "loss" in line))
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


@pytest.mark.parametrize(("first", "then"), [("fp32", "bf16"), ("bf16", "fp32")])
def test_weights_go_from_one_precision_to_the_other(call_script, image_tree, tmp_path, first, then):
    script = "self_supervised.train_msf_2q"
    start = run(call_script, script, tmp_path / "first", "--precision", first, image_tree)
    path = tmp_path / "first" / "ckpt_epoch_1.pth"
    still = ("--learning_rate", 0, "--weight_decay", 0, "--momentum", 1, "--seed", 9)
    flags = ("--precision", then, "--channels_last", "--weights", path, *still)
    end = run(call_script, script, tmp_path / "then", *flags, image_tree)
    same = [n for n in start["state_dict"] if n.startswith("encoders.") and "running" not in n]
    same = [n for n in same if not n.endswith("num_batches_tracked")]
    assert len(same) > 40
    for name in same:
        assert torch.equal(start["state_dict"][name], end["state_dict"][name]), name

    resume = ("--resume", path, "--precision", then, "--epochs", 2)
    run(call_script, script, tmp_path / "first", *resume, image_tree)
    assert tiny.state(tmp_path / "first" / "ckpt_epoch_2.pth")["args"]["precision"] == then


def test_a_bf16_checkpoint_is_evaluated(call_script, image_tree, tmp_path):
    run(call_script, "self_supervised.train_msf_2q", tmp_path, "--precision", "bf16", image_tree)
    flags = ("--weights", tmp_path / "ckpt_epoch_1.pth", "--num_workers", 0, image_tree)
    code, stdout, stderr = call_script(importlib.import_module("eval.eval_knn"), *flags)
    assert code == 0 and "weighted" in stdout, stderr


@pytest.fixture
def args(monkeypatch, tmp_path):
    """Flags -> what the self-supervised script makes of them; TF32 is put back afterwards."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32

    def parse(*flags: object) -> argparse.Namespace:
        module = importlib.import_module("self_supervised.train_msf_2q")
        monkeypatch.setattr("sys.argv", ["train_msf_2q.py", *map(str, (*TINY, *flags, tmp_path))])
        return module.parse_args()

    yield parse
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


def test_tf32_only_when_asked_for(args):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch is about to give these settings new names
        for flags, matmul in ((("--tf32",), "high"), ((), "highest")):
            build_training.build_encoders(args(*flags))
            assert torch.get_float32_matmul_precision() == matmul
            assert torch.backends.cudnn.allow_tf32 == bool(flags)


@pytest.mark.parametrize("flags", [(), ("--deterministic",)])
def test_kernels_are_tried_out_unless_bits_must_be_the_same(args, monkeypatch, flags):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", bool(flags))
    build_training.build_encoders(args(*flags))
    assert torch.backends.cudnn.benchmark == (not flags)


def test_flags_reach_the_encoders(args, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: function)
    monkeypatch.setattr(
        QueryTargetEncoders, "compile", lambda self, cuda_graphs: compiled.append(self)
    )
    fast = build_training.build_encoders(
        args("--precision", "bf16", "--channels_last", "--compile")
    )
    assert (fast.autocast, fast.channels_last, compiled) == (torch.bfloat16, True, [fast])
    plain = build_training.build_encoders(args("--no_channels_last"))
    assert (plain.autocast, plain.channels_last, compiled) == (None, False, [fast])
    assert build_training.build_encoders(args()).channels_last  # on a CPU


@pytest.mark.parametrize("sole", [False, True])
def test_a_step_begins_with_the_query_where_it_runs_as_cuda_graphs(monkeypatch, sole):
    """Once, whatever the number of passes: what an earlier pass made is still needed."""
    events, graphs = [], {"mode": "reduce-overhead", "dynamic": False}
    mark = torch.compiler, "cudagraph_mark_step_begin"
    monkeypatch.setattr(*mark, lambda: events.append("begin"))

    def compiler(function, **options):
        assert options == (graphs if cuda_graphs else {})
        return lambda *given: events.append("pass") or function(*given)

    monkeypatch.setattr(torch, "compile", compiler)
    images, small = torch.randn(4, 3, 16, 16), torch.randn(2, 4, 3, 8, 8)
    for cuda_graphs in (False, True):
        model = SoleBackbone(build_backbone("conv4").module) if sole else encoders()
        model.compile(cuda_graphs=cuda_graphs)
        if sole:
            model(images)
        else:
            model.query(images, small)
            model.target(images)
        assert events == ["begin"] * cuda_graphs + ["pass"] * (1 if sole else 5)
        events.clear()


def test_cuda_graphs_need_a_gpu_and_a_compiler(args, monkeypatch):
    for flags, missing in (((), "with --compile"), (("--compile",), "on a GPU, not on cpu")):
        with pytest.raises(InputError, match=f"^--cuda_graphs: only {missing}$"):
            build_training.build_encoders(args("--cuda_graphs", "--device", "cpu", *flags))


def test_gradients_are_gone_when_the_next_step_begins(tmp_path):
    """Those of CUDA graphs lie in memory that its forward pass uses anew."""
    run, seen = test_engine.make_run(tmp_path, epochs=1), []
    with run:
        for batch in run.batches(test_engine.Loader()):
            seen.append(run.model.weight.grad)
            run.step(*run.model(batch))
    assert seen == [None] * 4


def test_without_a_compiler_compile_is_refused(run_script, image_tree, tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", "/nonexistent/g++")
    flags = (*TINY, "--compile", "--checkpoint_path", tmp_path / "run", image_tree)
    done = run_script("self_supervised/train_msf_2q.py", *flags)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()
    assert last.startswith("train_msf_2q.py: error: --compile: does not work here (")


def test_a_gpu_without_bfloat16_is_told_at_once(args, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    given = args("--precision", "bf16")
    given.device = torch.device("cuda")
    with pytest.raises(InputError, match="^--precision bf16: this GPU"):
        build_training.build_encoders(given)
