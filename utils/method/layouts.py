"""Backbones in a checkpoint of any layout: where they stand, and which of several is meant.

A backbone stands under a prefix if all its weights do, by name and shape, and beside them nothing
but heads. So files of other methods and libraries are read without a list of their layouts. Only
how several backbones are told apart goes by words.
"""

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.method.encoders import Backbone
from utils.runtime import torch_file
from utils.runtime.errors import InputError

# What DataParallel and torch.compile add to a parameter's name.
_WRAPPERS = {"module", "_orig_mod"}
# Today's names in torchvision -> its older ones (densenet.py, vision_transformer.py), and those of
# the ResNets for CIFAR that SupCon and others took over.
_OLDER = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))([12]\.)"), r"\1.\2"),
    (re.compile(r"\.mlp\.0\."), ".mlp.linear_1."),
    (re.compile(r"\.mlp\.3\."), ".mlp.linear_2."),
    (re.compile(r"\.downsample\."), ".shortcut."),
)
# Batch norms' batch counters, which files from before 2018 lack.
_COUNTER = "num_batches_tracked"
# Words in a prefix that tell encoders apart: a moving average, or what is trained by gradient.
_AVERAGED = {"target", "teacher", "momentum", "ema", "swa", "avg", "average", "averaged"}
_AVERAGED |= {"key", "k", "t", "slow", "shadow"}
_TRAINED = {"query", "q", "student", "online", "base"}
# Words in the name of what stands beside a backbone and is no part of it.
_HEAD = {"head", "heads", "classifier", "projector", "projection", "predictor", "prediction"}
_HEAD |= {"prototypes", "queue", "decoder", "mask"}
_SHOWN = 8  # names in a message


class Found(NamedTuple):
    """A backbone in a checkpoint.

    prefix: what its names begin with there, the names of dicts in front, "" for none. weights:
    under the backbone's own names. aside: what stands beside them and is none of its weights.
    role: "query" or "target", or the prefix where that was asked for. others: which it was chosen
    from.
    """

    prefix: str
    weights: dict[str, Tensor]
    aside: list[str]
    role: str = ""
    others: Sequence["Found"] = ()

    @property
    def words(self) -> str:
        """Which it is, what else there is, in one line."""
        parts = {"also there": self.others, "left aside": map(torch_file.one_line, self.aside)}
        texts = (f"; {name}: {_listed(some)}" for name, some in parts.items())
        return f"{self}{''.join(text for text in texts if not text.endswith(': '))}"

    def __str__(self) -> str:
        """The prefix in one line."""
        return torch_file.one_line(self.prefix) if self.prefix else "the top level"


class _Stored(NamedTuple):
    """A tensor in a checkpoint, and the prefix of the dict that holds it."""

    value: Tensor
    table: str


class _Place(NamedTuple):
    """Where a backbone may stand: a prefix, with its dot, and the number of a table of names."""

    prefix: str
    layout: int


def flatten(checkpoint: dict, *, what: str) -> dict[str, _Stored]:
    """The tensors in dicts of any nesting, by their names with those of the dicts in front.

    What wrappers add to names is left out. InputError, begun by `what`, where two tensors that
    differ have one name.
    """
    stored: dict[str, _Stored] = {}
    seen, to_do = set(), [((), checkpoint)]
    for prefix, table in to_do:  # grows meanwhile; a dict can hold itself
        if id(table) in seen:
            continue
        seen.add(id(table))
        for key, value in table.items():
            parts = (*prefix, *_without_wrappers(str(key)))
            name = ".".join(parts)
            if isinstance(value, dict):
                to_do.append((parts, value))
            elif isinstance(value, Tensor):
                if name in stored and not stored[name].value.is_set_to(value):
                    raise InputError(f"{what}: two weights are called {torch_file.one_line(name)}")
                stored[name] = _Stored(value, ".".join(prefix))
    return stored


def spellings(names: Iterable[str]) -> dict[str, str]:
    """Every name that these weights have had, or have in other libraries -> the name here."""
    now = {name: name for name in names}
    for name in list(now):
        for pattern, older in _OLDER:
            now.setdefault(pattern.sub(older, name), name)
    return now


def faults(own: dict[str, Tensor], weights: dict[str, Tensor]) -> str:
    """How weights do not fit a network's own, of the same names, in words; "" if they do.

    As in PyTorch's own strict load only the batch norms' batch counters may be missing.
    """
    both = [(name, own[name], weights[name]) for name in own if name in weights]
    shapes = [(n, a, b) for n, a, b in both if torch_file.is_dense(b) and a.shape != b.shape]
    problems = {
        "missing": [name for name in own if name not in weights and not name.endswith(_COUNTER)],
        "unknown": [name for name in weights if name not in own],
        "of another shape": [f"{n} {tuple(b.shape)}, not {tuple(a.shape)}" for n, a, b in shapes],
        "of another type": [name for name, a, b in both if not _has_type_of(a, b)],
    }
    texts = (
        f"{len(names)} weights {kind}, first {torch_file.one_line(names[0])}"
        for kind, names in problems.items()
        if names
    )
    return "; ".join(texts)


def find(checkpoint: dict, backbone: Backbone, *, what: str) -> tuple[list[Found], str]:
    """All backbones of this build in a checkpoint, in the order of its names.

    And in words what the nearest of others lacks, "" where none has half of the weights. InputError
    that begins with `what`, and says that too, where there is none.
    """
    stored, own = flatten(checkpoint, what=what), backbone.module.state_dict()
    layouts = _layouts(backbone.module)
    places = _places(stored, layouts)
    needed = {name for name in own if not name.endswith(_COUNTER)}
    complete = [place for place, names in places.items() if needed <= names.keys()]
    numbers = {name: number for number, name in enumerate(stored)}
    ordered = sorted(stored)  # so that a prefix is a range of them

    def right(place: _Place) -> int:
        return sum(_is_like(own[n], stored[name].value) for n, name in places[place].items())

    def examine(place: _Place) -> tuple[Found, str]:
        """What stands at a place, and how it does not fit, "" if it does."""
        weights = {n: stored[name].value for n, name in places[place].items()}
        ends = [bisect_left(ordered, end) for end in (place.prefix, f"{place.prefix}\U0010ffff")]
        below = set(ordered[slice(*ends)]) - set(places[place].values())
        rest = {name: stored[name] for name in sorted(below, key=numbers.get)}
        tops = {name.partition(".")[0] for name in layouts[place.layout]}
        others = {other.prefix for other in complete}
        unknown, aside = _beside(rest, place.prefix, tops, backbone.classifier, others)
        one = Found(place.prefix.removesuffix("."), weights, aside)
        return one, faults(own, weights | unknown)

    found = {one.prefix: one for one, text in map(examine, complete) if not text}
    others = [place for place in places if place.prefix.removesuffix(".") not in found]
    nearest = max(others, key=right, default=None)
    near = nearest and "nearest is {}: {}".format(*examine(nearest))
    if not found:
        keys = _listed(map(torch_file.one_line, checkpoint))
        near = near or "no weight of its names"
        raise InputError(f"{what}: does not fit: {near} (its top-level keys: {keys})")
    return list(found.values()), near if near and right(nearest) > len(needed) / 2 else ""


def choose(
    found: list[Found], *, averaged: bool, prefix: str | None = None, near: str = "", what: str
) -> Found:
    """The backbone of a prefix, or the end of one; by default the trained or the averaged one.

    One alone is it in any case, unless it is not what is asked for: an averaged one must be called
    so; and where one is and something is near to be another, that may be the trained one. Equal
    ones count once. InputError that begins with `what` where names do not tell.
    """
    chosen = _chosen(found, averaged=averaged, prefix=prefix, near=near, what=what)
    return chosen._replace(others=[one for one in found if one.prefix != chosen.prefix])


def _chosen(
    found: list[Found], *, averaged: bool, prefix: str | None, near: str, what: str
) -> Found:
    names = f"it has {_listed(found)}"
    if prefix is not None:
        given = ".".join(_without_wrappers(prefix.rstrip(".")))
        same = [one for one in found if one.prefix == given]
        same = same or [one for one in found if given and one.prefix.endswith(f".{given}")]
        if len(_distinct(same)) != 1:
            count = "more than one" if same else "no"
            asked = torch_file.one_line(prefix)
            raise InputError(f"{what}: --prefix {asked}: {count} backbone of this name; {names}")
        return same[0]._replace(role=same[0].prefix)
    role = "target" if averaged else "query"
    words = [_words(one.prefix) for one in found]
    if len(found) == 1 and not averaged and words[0] & _AVERAGED and near:
        raise InputError(f"{what}: only {found[0]} fits, an averaged one (--use_target); {near}")
    if len(found) == 1 and (not averaged or words[0] & _AVERAGED):
        return found[0]._replace(role="target" if words[0] & _AVERAGED else "query")
    own = [(one, some - set.intersection(*words)) for one, some in zip(found, words, strict=True)]
    fitting = [(one, some) for one, some in own if bool(some & _AVERAGED) == averaged]
    for some in ([one for one, _ in fitting], [one for one, some in fitting if some & _TRAINED]):
        if len(_distinct(some)) == 1:
            return some[0]._replace(role=role)
    if not fitting:
        raise InputError(f"{what}: no {role} encoder in it; {names}")
    raise InputError(f"{what}: which is its {role} encoder? {names} (name one: --prefix)")


def _without_wrappers(name: str) -> list[str]:
    return [part for part in name.split(".") if part not in _WRAPPERS]


def _layouts(module: nn.Module) -> list[dict[str, str]]:
    """Tables of names in files -> the network's own: by its names, or by its children's numbers.

    The numbers are those of nn.Sequential(*children), of all children or of those that do anything.
    A child left out that does something, as an activation, would make another network of it.
    """
    own = spellings(module.state_dict())
    children = list(module.named_children())
    tables = [own]
    for some in (children, [c for c in children if not isinstance(c[1], nn.Identity)]):
        numbers = {name: str(number) for number, (name, _) in enumerate(some)}
        parts = {name: name.partition(".") for name in own}
        if all(first in numbers for first, _, _ in parts.values()):
            tables.append({f"{numbers[a]}.{c}": own[name] for name, (a, _, c) in parts.items()})
    return tables


def _places(
    stored: dict[str, _Stored], layouts: list[dict[str, str]]
) -> dict[_Place, dict[str, str]]:
    """Where any weight of the backbone's names stands: own name -> the name in the file."""
    places: dict[_Place, dict[str, str]] = defaultdict(dict)
    most = max(name.count(".") for table in layouts for name in table) + 1
    for name in stored:
        parts = name.rsplit(".", most)
        for count in range(1, min(len(parts), most) + 1):
            suffix = ".".join(parts[-count:])
            for number, table in enumerate(layouts):
                if suffix in table:
                    place = _Place(name.removesuffix(suffix), number)
                    places[place].setdefault(table[suffix], name)
    return places


def _beside(
    rest: dict[str, _Stored], prefix: str, tops: set[str], classifier: str, complete: set[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """What stands beside a backbone's weights: such as may be weights of it, and names of others.

    rest: all of the prefix but these weights. tops: first parts of the backbone's names. complete:
    prefixes of backbones. What lies in a dict of its own, or in another backbone, is left out.
    """
    unknown, groups = {}, defaultdict(dict)
    others = tuple(other for other in complete if len(other) > len(prefix))
    for name, one in rest.items():
        short = name.removeprefix(prefix)
        top = short.partition(".")[0]
        if f"{short}.".startswith(f"{classifier}."):
            groups[classifier][short] = one.value
        elif top in tops:
            unknown[short] = one.value
        elif (not one.table or len(one.table) < len(prefix)) and not name.startswith(others):
            groups[top][short] = one.value
    aside = []
    for top, weights in groups.items():
        if top == classifier or _is_head(top, weights.values()):
            aside.append(top)
        else:
            unknown |= weights
    return unknown, aside


def _is_head(name: str, weights: Iterable[Tensor]) -> bool:
    """Whether its name says so, or its weights: linear layers, 1x1 convolutions, or none.

    Matrices can be a queue too. A bare vector, or a token of three dimensions, may be part of a
    backbone of another build.
    """
    if _words(name) & _HEAD:
        return True
    if not all(map(torch_file.is_dense, weights)):
        return False
    shapes = [v.shape for v in weights if v.is_floating_point() and v.numel() > 1]
    flat = all(len(shape) < 3 or (len(shape) == 4 and shape[2:] == (1, 1)) for shape in shapes)
    return not shapes or (flat and any(len(shape) > 1 for shape in shapes))


def _listed(names: Iterable[object]) -> str:
    """The first of them between commas, and how many more there are."""
    shown = list(map(str, names))
    more = [f"and {len(shown) - _SHOWN} more"] if len(shown) > _SHOWN else []
    return ", ".join(shown[:_SHOWN] + more)


def _words(name: str) -> set[str]:
    return set(re.split(r"[._\d]+", name.lower()))


def _has_type_of(own: Tensor, value: Tensor) -> bool:
    """Whether a weight out of a file can stand for one: of one floating type for any other."""
    floats = own.is_floating_point() == value.is_floating_point()
    bools = (own.dtype == torch.bool) == (value.dtype == torch.bool)
    return torch_file.is_dense(value) and floats and bools


def _is_like(own: Tensor, value: Tensor) -> bool:
    return _has_type_of(own, value) and own.shape == value.shape


def _distinct(found: list[Found]) -> list[Found]:
    """Those whose weights are not those of one before."""
    kept: list[Found] = []
    for one in found:
        if not any(_are_equal(one.weights, other.weights) for other in kept):
            kept.append(one)
    return kept


def _are_equal(some: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    return some.keys() == others.keys() and all(torch.equal(v, others[n]) for n, v in some.items())
