"""Backbones in a checkpoint of any layout: where they stand, and which of several is meant.

A backbone stands under a prefix if all its weights do, by name and shape, and beside them nothing
but heads. So files of other methods and libraries are read without a list of their layouts. Only
how several backbones are told apart goes by words.
"""

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.method.encoders import Backbone
from utils.runtime import torch_file
from utils.runtime.errors import InputError

# What wrappers add to a parameter's name: DataParallel, torch.compile, FSDP and its checkpointing.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
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
_AVERAGED = {"target", "teacher", "momentum", "ema", "swa", "averaged", "key", "slow", "shadow"}
_TRAINED = {"query", "student", "online"}
# Letters that do so where both are there, as in encoder_q and encoder_k.
_PAIRS = (("q", "k"), ("q", "t"), ("s", "t"))
# What an optimizer keeps of weights, and has under their names.
_OPTIMIZER = re.compile(r"(?:^|\.)optim(?:izer)?s?(?:\.|$)|exp_avg|momentum_buffer")
# Words in the name of what stands beside a backbone and is no part of it.
_HEAD = {"head", "heads", "classifier", "projector", "projection", "predictor", "prediction"}
_HEAD |= {"prototypes", "queue", "decoder", "mask", "optimizer", "optimizers", "optim"}
_SHOWN = 8  # names in a message
_DEEPEST = 100  # dicts in one another


class Found(NamedTuple):
    """A backbone in a checkpoint.

    prefix: what its names begin with there, the names of dicts in front, "" for none; without what
    wrappers add. weights: under the backbone's own names. aside: what stands beside them and is
    none of its weights. hints: words in the prefix. role: "query" or "target", or the prefix where
    that was asked for. others: which it was chosen from.
    """

    prefix: str
    weights: dict[str, Tensor]
    aside: list[str]
    hints: set[str]
    role: str = ""
    others: Sequence["Found"] = ()

    @property
    def words(self) -> str:
        """Which it is, what else there is, in one line."""
        parts = {"also there": self.others, "left aside": map(torch_file.one_line, self.aside)}
        texts = (f"; {name}: {_listed(some)}" for name, some in parts.items())
        average = ", a moving average" * (self.role == "target")
        return f"{self}{average}{''.join(text for text in texts if not text.endswith(': '))}"

    def __str__(self) -> str:
        """The prefix in one line."""
        return torch_file.one_line(self.prefix) if self.prefix else "the top level"


class _Stored(NamedTuple):
    """A tensor in a checkpoint, the name of the dict that holds it; twice: others have its name."""

    value: Tensor
    table: str
    twice: bool = False


class _Place(NamedTuple):
    """Where a backbone may stand: a prefix, with its dot, and the number of a table of names.

    The prefix has what wrappers add: what one of them holds is another network than what lies
    beside it.
    """

    prefix: str
    layout: int


def _flatten(checkpoint: dict, *, what: str) -> dict[str, _Stored]:
    """The tensors in dicts and lists of any nesting, by their names with those in front.

    InputError, begun by `what`, for dicts too deep in one another.
    """
    stored: dict[str, _Stored] = {}
    seen, to_do = set(), [((), checkpoint)]
    for prefix, table in to_do:  # grows meanwhile; a dict can hold itself
        if id(table) in seen:
            continue
        seen.add(id(table))
        if len(prefix) > _DEEPEST:
            raise InputError(f"{what}: more than {_DEEPEST} dicts in one another")
        for key, value in table.items() if isinstance(table, dict) else enumerate(table):
            parts = (*prefix, str(key))
            if isinstance(value, (dict, list, tuple)):
                to_do.append((parts, value))
            elif isinstance(value, Tensor):
                name = ".".join(parts)
                stored[name] = _Stored(value, ".".join(prefix), twice=name in stored)
    return stored


def unwrapped(checkpoint: dict, *, what: str) -> dict[str, Tensor]:
    """All tensors of a checkpoint by their names, without what wrappers add to these.

    A name that several have is left out. InputError as of `find`.
    """
    found: dict[str, list[_Stored]] = defaultdict(list)
    for name, one in _flatten(checkpoint, what=what).items():
        found[_unwrapped(name)].append(one)
    single = {name: some[0] for name, some in found.items() if len(some) == 1}
    return {name: one.value for name, one in single.items() if not one.twice}


def spellings(names: Iterable[str]) -> dict[str, str]:
    """Every name that these weights have had, or have in other libraries -> the name here."""
    now = {name: name for name in names}
    for name in list(now):
        for pattern, older in _OLDER:
            now.setdefault(pattern.sub(older, name), name)
    return now


def faults(own: dict[str, Tensor], weights: dict[str, Tensor]) -> str:
    """How weights do not fit a network's own, of the same names, in words; "" if they do.

    As in PyTorch's own strict load only the batch norms' batch counters may be missing; here they
    may also be of another kind.
    """
    counted = [name for name in own if name in weights and not name.endswith(_COUNTER)]
    both = [(name, own[name], weights[name]) for name in counted]
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


def with_counters(own: dict[str, Tensor], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights, with a network's own batch counters for those that are missing or no such number."""
    fitting = {n: v for n, v in weights.items() if not n.endswith(_COUNTER) or is_like(own[n], v)}
    return {name: value for name, value in own.items() if name.endswith(_COUNTER)} | fitting


def find(checkpoint: dict, backbone: Backbone, *, what: str) -> tuple[list[Found], str]:
    """All backbones of this build in a checkpoint, in the order of its names.

    And of a single one, a moving average, in words what the nearest to one that is trained lacks,
    "" where none has a tenth of the weights. InputError that begins with `what`, and says that of
    the nearest, where there is none, and for dicts too deep in one another.
    """
    stored, own = _flatten(checkpoint, what=what), backbone.module.state_dict()
    layouts = _layouts(backbone.module)
    places = _places(stored, layouts)
    needed = {name for name in own if not name.endswith(_COUNTER)}
    complete = [place for place, names in places.items() if needed <= names.keys()]
    prefixes = {place.prefix for place in complete}
    numbers = {name: number for number, name in enumerate(stored)}
    ordered = sorted(stored)  # so that a prefix is a range of them
    pairs = {frozenset(_words(place.prefix)) for place in places}

    def right(place: _Place) -> int:
        return sum(is_like(own[n], stored[name].value) for n, name in places[place].items())

    def examine(place: _Place) -> tuple[Found, str]:
        """What stands at a place, and how it does not fit, "" if it does."""
        names, prefix = places[place], place.prefix
        weights = {n: stored[name].value for n, name in names.items()}
        ends = [bisect_left(ordered, end) for end in (prefix, f"{prefix}\U0010ffff")]
        below = set(ordered[slice(*ends)]) - set(names.values())
        rest = {name: stored[name] for name in sorted(below, key=numbers.get)}
        if len({stored[name].table for name in names.values()}) == 1:  # not a dict for each module
            rest = {name: one for name, one in rest.items() if len(one.table) < max(1, len(prefix))}
        tops = {name.partition(".")[0] for name in layouts[place.layout]}
        unknown, aside = _beside(rest, prefix, tops, backbone.classifier, prefixes)
        twice = [name for name in names.values() if stored[name].twice]
        text = f"two weights are called {torch_file.one_line(twice[0])}" if twice else ""
        hints = _words(prefix) | _roles(prefix, pairs)
        one = Found(_unwrapped(prefix.removesuffix(".")), weights, aside, hints)
        return one, text or faults(own, weights | unknown)

    def nearest(some: Iterable[_Place], *, least: float = 0) -> str:
        best = max(some, key=right, default=None)
        if best is None or right(best) < least:
            return ""
        return "nearest is {}: {}".format(*examine(best))

    found = {place: one for place in complete for one, text in [examine(place)] if not text}
    if not found:
        keys = _listed(torch_file.one_line(str(key)) for key in checkpoint)
        near = nearest(places) or "no weight of its names"
        raise InputError(f"{what}: does not fit: {near} (its top-level keys: {keys})")
    near = ""
    if len(found) == 1 and next(iter(found.values())).hints & _AVERAGED:
        (prefix,) = (place.prefix for place in found)
        others = (place for place in places if not place.prefix.startswith(prefix))
        others = (p for p in others if not _AVERAGED & (_words(p.prefix) | _roles(p.prefix, pairs)))
        near = nearest(others, least=len(needed) / 10)
    several = Counter(one.prefix for one in found.values())
    return [
        one if several[one.prefix] == 1 else one._replace(prefix=place.prefix.removesuffix("."))
        for place, one in found.items()
    ], near


def choose(
    found: list[Found], *, averaged: bool, prefix: str | None = None, near: str = "", what: str
) -> Found:
    """The backbone of a prefix, or of a part of one; by default the trained or the averaged one.

    One alone is it in any case, unless it is not what is asked for: an averaged one must be called
    so; and where one is and something is near to be another, that may be the trained one. Equal
    ones count once, what an optimizer keeps does not. InputError that begins with `what` where
    names do not tell.
    """
    if prefix is not None:
        chosen = _of_prefix(found, prefix, what=what)
    else:
        networks = [one for one in found if not _OPTIMIZER.search(one.prefix)]
        chosen = _chosen(networks or found, averaged=averaged, near=near, what=what)
    return chosen._replace(others=[one for one in found if one.weights is not chosen.weights])


def _of_prefix(found: list[Found], prefix: str, *, what: str) -> Found:
    """The one whose prefix it is, or the end of it, or else a part."""
    given, exact = _unwrapped(prefix.rstrip(".")), prefix.rstrip(".")
    ways = (
        lambda one: one.prefix == exact,
        lambda one: one.prefix == given,
        lambda one: given and one.prefix.endswith(f".{given}"),
        lambda one: given and f".{given}." in f".{one.prefix}.",
    )
    same = next((some for way in ways if (some := [*filter(way, found)])), [])
    if len(_distinct(same)) != 1:
        count, asked = "more than one" if same else "no", torch_file.one_line(prefix) or "''"
        names = f"{count} backbone of this name; it has {_listed(found)}"
        raise InputError(f"{what}: --prefix {asked}: {names}")
    return same[0]._replace(role=same[0].prefix)


def _chosen(found: list[Found], *, averaged: bool, near: str, what: str) -> Found:
    names = f"it has {_listed(found)}"
    role = "target" if averaged else "query"
    if len(found) == 1:
        is_average = bool(found[0].hints & _AVERAGED)
        if is_average and not averaged and near:
            raise InputError(
                f"{what}: only {found[0]} fits, an averaged one (--use_target); {near}"
            )
        if is_average or not averaged:
            return found[0]._replace(role="target" if is_average else "query")
    common = set.intersection(*(one.hints for one in found))
    own = [(one, one.hints - common) for one in found]
    fitting = [(one, some) for one, some in own if bool(some & _AVERAGED) == averaged]
    for some in ([one for one, _ in fitting], [one for one, some in fitting if some & _TRAINED]):
        if len(_distinct(some)) == 1:
            return some[0]._replace(role=role)
    if not fitting:
        raise InputError(f"{what}: no {role} encoder in it; {names}")
    raise InputError(f"{what}: which is its {role} encoder? {names} (name one: --prefix)")


def _unwrapped(name: str) -> str:
    """A name without what wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _layouts(module: nn.Module) -> list[dict[str, str]]:
    """Tables of names in files -> the network's own: by its names, or by its children's numbers.

    The numbers are those of nn.Sequential(*children), of all children or of those that do anything.
    A child left out that does something, as an activation, would make another network of it.
    """
    own = {_unwrapped(n): name for n, name in spellings(module.state_dict()).items()}
    children = list(module.named_children())
    tables = [own]
    for some in (children, [c for c in children if not isinstance(c[1], nn.Identity)]):
        numbers = {name: str(number) for number, (name, _) in enumerate(some)}
        parts = {name: name.partition(".") for name in own}
        if all(first in numbers for first, _, _ in parts.values()):
            table = {f"{numbers[a]}.{c}": own[name] for name, (a, _, c) in parts.items()}
            tables += [table] if table not in tables else []
    return tables


def _places(
    stored: dict[str, _Stored], layouts: list[dict[str, str]]
) -> dict[_Place, dict[str, str]]:
    """Where any weight of the backbone's names stands: own name -> the name in the file."""
    places: dict[_Place, dict[str, str]] = defaultdict(dict)
    most = max(name.count(".") for table in layouts for name in table) + 1
    for name in stored:
        parts = name.split(".")
        starts = [i for i, part in enumerate(parts) if part not in _WRAPPERS][-most:]
        for number, start in enumerate(starts):
            suffix = ".".join(parts[i] for i in starts[number:])
            for layout, table in enumerate(layouts):
                if suffix in table:
                    prefix = "".join(f"{part}." for part in parts[:start])
                    places[_Place(prefix, layout)].setdefault(table[suffix], name)
    return places


def _beside(
    rest: dict[str, _Stored], prefix: str, tops: set[str], classifier: str, complete: set[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """What stands beside a backbone's weights: such as may be weights of it, and names of others.

    rest: all of the prefix but these weights. tops: first parts of the backbone's names. complete:
    prefixes of backbones, with their dots; what is of another one is left out.
    """
    unknown, groups = {}, defaultdict(dict)
    others = tuple(other for other in complete if len(other) > len(prefix))
    for name, one in rest.items():
        if name.startswith(others):
            continue
        short = _unwrapped(name.removeprefix(prefix))
        top = short.partition(".")[0]
        if f"{short}.".startswith(f"{classifier}."):
            groups[classifier][short] = one.value
        elif top in tops:
            unknown[short] = one.value
        else:
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
    """The words of a name in small letters, without numbers behind them: modelEMA, net_q.head2."""
    words = re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z0-9]+", name)
    return {re.sub(r"(?<=[a-z]{2})\d+$", "", word.lower()) for word in words}


def _roles(prefix: str, pairs: set[frozenset[str]]) -> set[str]:
    """What a single letter says, if there is a prefix with its counterpart; pairs: their words."""
    words, roles = _words(prefix), set()
    for trained, averaged in _PAIRS:
        if trained in words and words - {trained} | {averaged} in pairs:
            roles.add("query")
        if averaged in words and words - {averaged} | {trained} in pairs:
            roles.add("target")
    return roles


def _has_type_of(own: Tensor, value: Tensor) -> bool:
    """Whether a weight out of a file can stand for one: of one floating type for any other."""
    floats = own.is_floating_point() == value.is_floating_point()
    bools = (own.dtype == torch.bool) == (value.dtype == torch.bool)
    return torch_file.is_dense(value) and floats and bools


def is_like(own: Tensor, value: Tensor) -> bool:
    """Whether a weight out of a file has the type and the shape of one."""
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
