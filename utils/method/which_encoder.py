"""Which of several backbones in a checkpoint is meant: by words in their names, or by a prefix."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from utils.runtime import torch_file
from utils.runtime.errors import InputError

# What wrappers add to a parameter's name: DataParallel, torch.compile, FSDP and its checkpointing.
WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
# Words in a prefix that tell encoders apart: a moving average, or what is trained by gradient.
_AVERAGED = {"target", "teacher", "momentum", "ema", "swa", "averaged", "key", "slow", "shadow"}
_TRAINED = {"query", "student", "online"}
# Letters that do so where both are there, as in encoder_q and encoder_k.
_PAIRS = (("q", "k"), ("q", "t"), ("s", "t"))
# Batch norms' batch counters, which files from before 2018 lack.
COUNTER = "num_batches_tracked"
# What an optimizer keeps of weights, and has under their names.
_OPTIMIZER = re.compile(r"(?:^|\.)optim(?:izer)?s?(?:\.|$)|exp_avg|momentum_buffer")
_SHOWN = 8  # names in a message


class Found(NamedTuple):
    """A backbone in a checkpoint.

    prefix: what its names begin with there, the names of dicts in front, "" for none; without what
    wrappers add. weights: under the backbone's own names. aside: what stands beside them and is
    none of its weights. hints: `hints_of` the prefix. role: "query" or "target", or the prefix
    where that was asked for. others: which it was chosen from.
    """

    prefix: str
    weights: dict[str, Tensor]
    aside: list[str]
    hints: frozenset[str]
    role: str = ""
    others: Sequence["Found"] = ()

    @property
    def words(self) -> str:
        """Which it is, what else there is, in one line."""
        parts = {"also there": self.others, "left aside": map(torch_file.one_line, self.aside)}
        texts = (f"; {name}: {listed(some)}" for name, some in parts.items())
        average = ", a moving average" * (self.role == "target")
        return f"{self}{average}{''.join(text for text in texts if not text.endswith(': '))}"

    def __str__(self) -> str:
        """The prefix in one line."""
        return torch_file.one_line(self.prefix) if self.prefix else "the top level"


class Near(NamedTuple):
    """What is no backbone but may be meant to be the trained one, and how it does not fit.

    is_trained: whether its name says that it is trained.
    """

    words: str
    is_trained: bool


def choose(
    found: list[Found],
    *,
    averaged: bool,
    prefix: str | None = None,
    near: Near | None = None,
    what: str,
) -> Found:
    """The backbone of a prefix, or of a part of one; by default the trained or the averaged one.

    One alone is it in any case, unless it is not what is asked for: an averaged one must be called
    so; and what is near to be another may be the trained one. Equal ones count once, what an
    optimizer keeps does not. InputError that begins with `what` where names do not tell.
    """
    if prefix is not None:
        chosen = _of_prefix(found, prefix, what=what)
    else:
        networks = [one for one in found if not is_of_optimizer(one.prefix)]
        if not networks:
            more = f"; {near.words}" if near else ""
            raise InputError(f"{what}: only what an optimizer keeps fits, {listed(found)}{more}")
        chosen = _chosen(networks, averaged=averaged, what=what)
        told = averaged or says_trained(chosen.hints)
        average = chosen.role == "target"
        if near and not told and (average or near.is_trained or len(networks) > 1):
            kind = "an averaged one (--use_target)" if average else "perhaps not the trained one"
            raise InputError(f"{what}: only {chosen} fits, {kind}; {near.words}")
    return chosen._replace(others=[one for one in found if one.weights is not chosen.weights])


def _of_prefix(found: list[Found], prefix: str, *, what: str) -> Found:
    """The one whose prefix it is, or the end of it, or else a part."""
    given, exact = unwrapped_name(prefix.rstrip(".")), prefix.rstrip(".")
    ways = (
        lambda one: one.prefix == exact,
        lambda one: one.prefix == given,
        lambda one: given and one.prefix.endswith(f".{given}"),
        lambda one: given and f".{given}." in f".{one.prefix}.",
    )
    same = next((some for way in ways if (some := [*filter(way, found)])), [])
    if len(_distinct(same)) != 1:
        count, asked = "more than one" if same else "no", torch_file.one_line(prefix) or "''"
        names = f"{count} backbone of this name; it has {listed(found)}"
        raise InputError(f"{what}: --prefix {asked}: {names}")
    return same[0]._replace(role=same[0].prefix)


def _chosen(found: list[Found], *, averaged: bool, what: str) -> Found:
    """The one that words tell; of averages alone one of them, which then is called so."""
    common = frozenset.intersection(*(one.hints for one in found))
    if not any(is_average(one.hints - common) for one in found):
        common = frozenset()
    fitting = [one for one in found if is_average(one.hints - common) == averaged]
    role = "target" if averaged else "query"
    if not (fitting or averaged):
        fitting, role = found, "target"
    names = f"it has {listed(found)}"
    for some in (fitting, [one for one in fitting if says_trained(one.hints - common)]):
        if len(_distinct(some)) == 1:
            return some[0]._replace(role=role)
    if not fitting:
        raise InputError(f"{what}: no {role} encoder in it; {names}")
    raise InputError(f"{what}: which is its {role} encoder? {names} (name one: --prefix)")


def unwrapped_name(name: str) -> str:
    """A name without what wrappers add."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def listed(names: Iterable[object]) -> str:
    """The first of them between commas, and how many more there are."""
    shown = list(map(str, names))
    more = [f"and {len(shown) - _SHOWN} more"] if len(shown) > _SHOWN else []
    return ", ".join(shown[:_SHOWN] + more)


def words_of(name: str) -> frozenset[str]:
    """The words of a name in small letters, without numbers behind them: modelEMA, net_q.head2."""
    words = re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", name)
    return frozenset(re.sub(r"(?<=[a-z]{2})\d+$", "", word.lower()) for word in words)


def hints_of(prefix: str, others: set[frozenset[str]]) -> frozenset[str]:
    """The words of a prefix, and what a letter says of which the counterpart is among others."""
    words = words_of(prefix)
    trained = any({q} <= words and words - {q} | {k} in others for q, k in _PAIRS)
    averaged = any({k} <= words and words - {k} | {q} in others for q, k in _PAIRS)
    return words | frozenset(["query"] * trained + ["target"] * averaged)


def is_of_optimizer(prefix: str) -> bool:
    """Whether this is no network, but what an optimizer keeps of one."""
    return bool(_OPTIMIZER.search(prefix))


def says_trained(hints: frozenset[str]) -> bool:
    """Whether one of these words says that an encoder is trained by gradient."""
    return bool(hints & _TRAINED)


def is_average(hints: frozenset[str]) -> bool:
    """Whether one of these words says that an encoder is a moving average."""
    return bool(hints & _AVERAGED)


def _distinct(found: list[Found]) -> list[Found]:
    """Those whose weights are not those of one before."""
    kept: list[Found] = []
    for one in found:
        if not any(_are_equal(one.weights, other.weights) for other in kept):
            kept.append(one)
    return kept


def _are_equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    names = [name for name in {**some, **others} if not name.endswith(COUNTER)]
    return all(torch.equal(some[name], others[name]) for name in names)
