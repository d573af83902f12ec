"""Backbones in a checkpoint of any layout: where they stand.

A backbone stands under a prefix if all its weights do, by name and shape, and beside them nothing
but heads. So files of other methods and libraries are read without a list of their layouts. Only
how several backbones are told apart goes by words (`which_encoder`).
"""

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from utils.method import which_encoder
from utils.method.encoders import Backbone
from utils.method.which_encoder import COUNTER, Found, Near, listed, unwrapped_name, words_of
from utils.runtime import torch_file
from utils.runtime.errors import InputError

# Today's names in torchvision -> its older ones (densenet.py, vision_transformer.py), and those of
# the ResNets for CIFAR that SupCon and others took over.
_OLDER = (
    (re.compile(r"(denselayer\d+\.(?:norm|conv))([12]\.)"), r"\1.\2"),
    (re.compile(r"\.mlp\.0\."), ".mlp.linear_1."),
    (re.compile(r"\.mlp\.3\."), ".mlp.linear_2."),
    (re.compile(r"\.downsample\."), ".shortcut."),
)
# Words in the name of what stands beside a backbone and is no part of it.
_HEAD = {"head", "heads", "classifier", "projector", "projection", "predictor", "prediction"}
_HEAD |= {"prototypes", "queue", "decoder", "mask", "optimizer", "optimizers", "optim", "opt"}
_DEEPEST, _MOST = 100, 10**6  # dicts and lists in one another, and in all


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

    A dict that holds itself is passed once. InputError, begun by `what`, for dicts too deep in one
    another, or too many.
    """
    stored: dict[str, _Stored] = {}
    to_do = [((), (), checkpoint)]
    for prefix, around, table in to_do:  # grows meanwhile
        if id(table) in around:
            continue
        if len(prefix) > _DEEPEST or len(to_do) > _MOST:
            most = f"{_DEEPEST} dicts in one another, or {_MOST:,} in all"
            raise InputError(f"{what}: more than {most}")
        for key, value in table.items() if isinstance(table, dict) else enumerate(table):
            parts = (*prefix, str(key))
            if isinstance(value, (dict, list, tuple)):
                to_do.append((parts, (*around, id(table)), value))
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
        found[unwrapped_name(name)].append(one)
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
    counted = [name for name in own if name in weights and not name.endswith(COUNTER)]
    both = [(name, own[name], weights[name]) for name in counted]
    shapes = [(n, a, b) for n, a, b in both if torch_file.is_dense(b) and a.shape != b.shape]
    problems = {
        "missing": [name for name in own if name not in weights and not name.endswith(COUNTER)],
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
    fitting = {n: v for n, v in weights.items() if not n.endswith(COUNTER) or is_like(own[n], v)}
    return {name: value for name, value in own.items() if name.endswith(COUNTER)} | fitting


class _File:
    """The tensors of a checkpoint, and where the weights of a backbone may stand in it."""

    def __init__(self, checkpoint: dict, backbone: Backbone, *, what: str) -> None:
        self.stored = _flatten(checkpoint, what=what)
        self.backbone = backbone
        self.own = backbone.module.state_dict()
        self.layouts = _layouts(backbone.module)
        self.places = _places(self.stored, self.layouts)
        self.needed = {name for name in self.own if not name.endswith(COUNTER)}
        self.complete = [p for p, names in self.places.items() if self.needed <= names.keys()]
        self._numbers = {name: number for number, name in enumerate(self.stored)}
        self._ordered = sorted(self.stored)  # so that a prefix is a range of them
        self._words = {words_of(unwrapped_name(prefix)) for prefix in _prefixes(self.stored)}

    def hints(self, place: _Place) -> frozenset[str]:
        """What the prefix says of the encoder; see `which_encoder`."""
        return which_encoder.hints_of(unwrapped_name(place.prefix), self._words)

    def examine(self, place: _Place) -> tuple[Found, str]:
        """What stands at a place, and how it does not fit, "" if it does."""
        names, prefix = {n: found[0] for n, found in self.places[place].items()}, place.prefix
        weights = {n: self.stored[name].value for n, name in names.items()}
        ends = [bisect_left(self._ordered, end) for end in (prefix, f"{prefix}\U0010ffff")]
        below = set(self._ordered[slice(*ends)]) - set(names.values())
        rest = {name: self.stored[name] for name in sorted(below, key=self._numbers.get)}
        if len({self.stored[name].table for name in names.values()}) == 1:  # not one a module
            rest = {n: one for n, one in rest.items() if len(one.table) < max(1, len(prefix))}
        tops = {name.partition(".")[0] for name in self.layouts[place.layout]}
        others = {other.prefix for other in self.complete}
        unknown, aside = _beside(rest, prefix, tops, self.backbone.classifier, others)
        several = [n for n, found in self.places[place].items() if len(found) > 1]
        twice = several + [name for name in names.values() if self.stored[name].twice]
        text = f"two weights are called {torch_file.one_line(twice[0])}" if twice else ""
        one = Found(unwrapped_name(prefix.removesuffix(".")), weights, aside, self.hints(place))
        return one, text or faults(self.own, weights | unknown)

    def nearest(self, places: Iterable[_Place], *, least: float = 0) -> str:
        """The place of most weights of its name and shape, and how it does not fit, in words.

        "" where none has so many as `least`.
        """

        def right(place: _Place) -> int:
            names = self.places[place].items()
            return sum(is_like(self.own[n], self.stored[found[0]].value) for n, found in names)

        best = max(places, key=right, default=None)
        if best is None or right(best) < least:
            return ""
        return "nearest is {}: {}".format(*self.examine(best))


def find(checkpoint: dict, backbone: Backbone, *, what: str) -> tuple[list[Found], Near | None]:
    """All backbones of this build in a checkpoint, in the order of its names.

    And what is nearest to be another one, that is trained; None where nothing has a tenth of the
    weights. InputError that begins with `what`, and says how near the nearest is, where there is no
    backbone, and for dicts too deep in one another, or too many.
    """
    file = _File(checkpoint, backbone, what=what)
    examined = {place: file.examine(place) for place in file.complete}
    found = {place: one for place, (one, text) in examined.items() if not text}
    if not found:
        keys = listed(torch_file.one_line(str(key)) for key in checkpoint)
        near = file.nearest(file.places) or "no weight of its names"
        raise InputError(f"{what}: does not fit: {near} (its top-level keys: {keys})")
    several = Counter(one.prefix for one in found.values())
    whole = {
        place: one if several[one.prefix] == 1 else one._replace(prefix=place.prefix[:-1])
        for place, one in found.items()
    }
    return list(whole.values()), _near(file, tuple(place.prefix for place in found))


def _near(file: _File, found: tuple[str, ...]) -> Near | None:
    """What may be meant to be the trained encoder, outside of the prefixes that were found."""
    places: dict[bool, list[_Place]] = {True: [], False: []}
    for place in file.places:
        if not (place.prefix.startswith(found) or which_encoder.is_of_optimizer(place.prefix)):
            hints = file.hints(place)
            if not which_encoder.is_average(hints):
                places[which_encoder.says_trained(hints)].append(place)
    for is_trained, some in places.items():
        if words := file.nearest(some, least=len(file.needed) / 10):
            return Near(words, is_trained)
    return None


def _prefixes(names: Iterable[str]) -> set[str]:
    """All that names begin with, up to one of their dots."""
    prefixes: set[str] = set()
    for name in names:
        while (dot := name.rfind(".")) >= 0 and (name := name[:dot]) not in prefixes:
            prefixes.add(name)
    return prefixes


def _layouts(module: nn.Module) -> list[dict[str, str]]:
    """Tables of names in files -> the network's own: by its names, or by its children's numbers.

    The numbers are those of nn.Sequential(*children), of all children or of those that do anything.
    A child left out that does something, as an activation, would make another network of it.
    """
    own = {unwrapped_name(n): name for n, name in spellings(module.state_dict()).items()}
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
) -> dict[_Place, dict[str, list[str]]]:
    """Where any weight of the backbone's names stands: own name -> names in the file, best one."""
    places: dict[_Place, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    most = max(name.count(".") for table in layouts for name in table) + 1
    for name in stored:
        parts = name.split(".")
        starts = [i for i, part in enumerate(parts) if part not in which_encoder.WRAPPERS][-most:]
        for number, start in enumerate(starts):
            suffix = ".".join(parts[i] for i in starts[number:])
            for layout, table in enumerate(layouts):
                if suffix in table:
                    prefix = "".join(f"{part}." for part in parts[:start])
                    places[_Place(prefix, layout)][table[suffix]].append(name)
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
        short = name.removeprefix(prefix)
        plain = unwrapped_name(short)
        top = plain.partition(".")[0]
        if f"{plain}.".startswith(f"{classifier}."):
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
    if words_of(name) & _HEAD:
        return True
    if not all(map(torch_file.is_dense, weights)):
        return False
    shapes = [v.shape for v in weights if v.is_floating_point() and v.numel() > 1]
    flat = all(len(shape) < 3 or (len(shape) == 4 and shape[2:] == (1, 1)) for shape in shapes)
    return not shapes or (flat and any(len(shape) > 1 for shape in shapes))


def _has_type_of(own: Tensor, value: Tensor) -> bool:
    """Whether a weight out of a file can stand for one: of one floating type for any other."""
    floats = own.is_floating_point() == value.is_floating_point()
    bools = (own.dtype == torch.bool) == (value.dtype == torch.bool)
    return torch_file.is_dense(value) and floats and bools


def is_like(own: Tensor, value: Tensor) -> bool:
    """Whether a weight out of a file has the type and the shape of one."""
    return _has_type_of(own, value) and own.shape == value.shape
