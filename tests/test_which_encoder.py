"""Which of several encoders in a checkpoint is taken: by words in their names, or by a prefix."""

import pytest
import torch
from other_layouts import TWO, assert_same, changed, named, network, read

from utils.runtime.errors import InputError


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
    state = changed(
        state, lambda _, v: None if isinstance(v, torch.Tensor) and v.equal(lost) else v
    )
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


@pytest.mark.parametrize(
    "names",
    [
        *(("init", "t100"), ("base", "model"), ("encoder_t", "encoder_f"), ("net_avg", "net_max")),
        *(("a.k", "b.q"), ("visual_encoder", "visual_encoder_m")),
    ],
)
def test_words_that_do_not_tell(names):
    state = {name: named(network(seed)) for seed, name in enumerate(names)}
    with pytest.raises(InputError, match=f"which is its query encoder. it has {names[0]}, "):
        read(state, network())


@pytest.mark.parametrize(
    ("trained", "averaged"),
    [
        *(("encoder_s", "encoder_t"), ("net", "netEMA"), ("net", "emaModel"), ("net", "ema2")),
        *(("query_encoder", "key_encoder"), ("0", "1.ema"), ("encoder_q.module", "encoder_k")),
        ("encoder_q._orig_mod", "encoder_t"),
    ],
)
def test_words_that_tell(trained, averaged):
    state = {averaged: named(network(2)), trained: named(network())}
    assert f"{read(state, network())[1].prefix}." in (f"{trained}.", f"{trained.split('.')[0]}.")
    assert read(state, network(2), encoder="target")[1].prefix == averaged


def test_what_an_optimizer_keeps_is_no_network():
    kept = {"momentum_buffer": named(network(2)), "exp_avg": named(network(3))}
    for state in (
        {"model": named(network()), "optimizer": kept},
        {"model": named(network()), "state": {"exp_avg": kept["exp_avg"]}},
    ):
        weights, found = read(state, network())
        assert_same(weights, network())
        assert found.prefix == "model"
        with pytest.raises(InputError, match="no target encoder in it"):
            read(state, network(), encoder="target")
    weights, _ = read({"optimizer": kept}, network(), prefix="momentum_buffer")
    assert_same(weights, network(2))
    broken = {**named(network()), "conv1.weight": torch.ones(2)}
    for state in ({"model": broken}, {"student": broken}, {}):
        with pytest.raises(InputError, match="only what an optimizer keeps fits, optimizer.mom"):
            read(state | {"optimizer": kept}, network())
    with pytest.raises(InputError, match="only ema fits, an averaged one .*nearest is student: "):
        read({"student": broken, "ema": named(network(2)), "optimizer": kept}, network())


@pytest.mark.parametrize(
    "others",
    [
        {"teacher": 2, "teacher_ema": 3},
        {"teacher": 2, "teacher_copy": 2},
        {"teacher": 2, "init": 3},
        {"init": 2},
        {"encoder_k": 2},
    ],
)
def test_what_is_left_of_a_file_is_not_taken_for_a_broken_student(others):
    name = "encoder_q" if "encoder_k" in others else "student"
    state = {name: {**named(network()), "conv1.weight": torch.ones(2)}}
    state |= {other: named(network(seed)) for other, seed in others.items()}
    for around in (lambda table: table, lambda table: {f"module.{n}": v for n, v in table.items()}):
        with pytest.raises(InputError, match=f"only .* fits, .*; nearest is {name}: "):
            read({**state, name: around(state[name])}, network())


def test_averages_alone():
    for states in ({"teacher": 2}, {"teacher": 2, "teacher_copy": 2}):
        state = {name: named(network(seed)) for name, seed in states.items()}
        for encoder in ("query", "target"):
            assert read(state, network(), encoder=encoder)[1].role == "target"


def test_an_average_alone_is_called_so():
    """Nothing tells that the file had a trained one, or that it is near enough to be one."""
    few = dict([*named(network()).items()][:5])
    for state in ({"ema": named(network(2))}, {"ema": named(network(2)), "student": few}):
        _, found = read(state, network())
        assert found.words == "ema, a moving average"
    some = dict([*named(network()).items()][:50])
    with pytest.raises(InputError, match="only ema fits, an averaged one .*nearest is student: "):
        read({"ema": named(network(2)), "student": some}, network())


def test_parts_of_a_prefix():
    state = {"a": {"student.backbone": named(network()), "teacher.backbone": named(network(2))}}
    for given in ("student", "a.student", "student.backbone", "module.a.student.backbone"):
        assert read(state, network(), prefix=given)[1].prefix == "a.student.backbone"
    for given, count in (("backbone", "more than one"), ("a", "more than one"), ("", "no")):
        with pytest.raises(
            InputError, match=f"--prefix {given or repr(given)}: {count} backbone of this name"
        ):
            read(state, network(), prefix=given)
    with pytest.raises(InputError, match="--prefix student: not together with the target encoder"):
        read(state, network(), prefix="student", encoder="target")


def test_a_counterpart_of_another_network():
    """The letter k is told by encoder_q, whatever that is."""
    state = {"encoder_q": {"fc.weight": torch.ones(2, 2)}, "encoder_k": named(network())}
    assert read(state, network())[1].role == "target"
