"""What the fields of a checkpoint must be, whoever wrote it; `checkpoint.load` asks for it.

The files of a run have everything that a run needs to go on: `state_dict` of the method's module
(its encoders behind "encoders."), `optimizer`, `epoch`, `step` within it, `args`, and more below.
"""

from typing import Any

import torch
from torch import Tensor

from utils.runtime import checked, torch_file
from utils.runtime.checked import Kind
from utils.runtime.errors import InputError

FORMAT = "cmsf-2"
EXPORTED = "cmsf-backbone-1"  # a backbone by itself: "state_dict" and "metadata"

# What a checkpoint says of its network; the size has a limit, as an image of it is made.
NETWORK = {
    "arch": Kind("a name", lambda v: isinstance(v, str) and v.isprintable() and len(v) < 100),
    "image_size": checked.whole(1, 4096),
    "small_stem": checked.FLAG,
}
# Settings of an optimizer that say by which kernels it computes.
_KERNELS = {"foreach", "fused"}
_BYTES = torch_file.tensor("(n,)", lambda value: True, dims=1, dtype=torch.uint8)
_SUMS = checked.table_of(torch_file.tensor("(2,)", lambda value: len(value) == 2, dims=1))


def _are_means(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and _SUMS.holds(value.get("sums"))
        and checked.whole(0).holds(value.get("count"))
    )


def _are_rows(value: Any) -> bool:
    """Whether these are numbers of files, of 31 bits as `saved_in` holds them, and their rows."""
    number, rows = checked.whole(1, 2**31 - 1), checked.whole(0)
    return isinstance(value, dict) and all(
        number.holds(key) and rows.holds(count) for key, count in value.items()
    )


def _is_metadata(value: Any) -> bool:
    of_plain = checked.table_of(checked.PLAIN).holds(value)
    return of_plain and value.get("encoder", "query") in ("query", "target")


# The fields of files of ours, by format.
_FIELDS = {
    FORMAT: {
        "method": checked.TEXT,
        "epoch": checked.whole(1),
        "step": checked.or_none(checked.whole(0)),
        "state_dict": checked.TABLE,
        "optimizer": checked.TABLE,
        "rng_states": checked.list_of(checked.table_of(_BYTES)),
        "means": Kind("sums and their count", _are_means),
        "bad_images": checked.list_of(checked.TEXT),
        "seconds": checked.real(0),
        "data": checked.table_of(checked.TEXT),
        "args": checked.table_of(checked.PLAIN),
        "parts": checked.table_of(Kind("file numbers and their rows", _are_rows)),
    },
    EXPORTED: {
        "state_dict": checked.TABLE,
        "metadata": Kind("a table of plain values (encoder: query or target)", _is_metadata),
    },
}
RUN = tuple(name for name in _FIELDS[FORMAT] if name != "parts")  # what a run needs to go on


def check(state: dict, *, what: str) -> dict:
    """A file's content, if its fields are as they must be; InputError, begun by `what`, if not.

    An epoch that others have saved as a tensor or float becomes an int; of another kind it is left
    out of their files, and that is said.
    """
    for name in state:
        if not isinstance(name, str):
            raise InputError(f"{what}: its key {checked.shown(name)} is not text")
    epoch = state.get("epoch")
    if isinstance(epoch, Tensor) and not torch_file.unfit(epoch) and epoch.ndim == 0:
        epoch = epoch.item()
    if isinstance(epoch, float) and epoch.is_integer():
        epoch = int(epoch)
    if "epoch" in state:
        state = {**state, "epoch": epoch}
    if "format" not in state and not checked.or_none(checked.whole(0)).holds(epoch):
        print(f"{what}: its epoch is {checked.shown(epoch)}, which is not noted", flush=True)
        del state["epoch"]
    checked.take(state, "epoch", checked.or_none(checked.whole(0)), what=what, default=None)
    fields = _FIELDS.get(checked.take(state, "format", checked.TEXT, what=what, default=""), {})
    for name, kind in fields.items():
        if name in state or name == "metadata":  # of a run a reader asks for what it needs
            checked.take(state, name, kind, what=what)
    return state


def load_optimizer(
    optimizer: torch.optim.Optimizer, state: dict, *, what: str, finite: bool = True
) -> None:
    """Load the state of an SGD that has the groups, the settings and the shapes of this one.

    InputError that begins with `what` otherwise. finite: also for what is infinite or not a number.
    By which kernels it computes, and how momentum lies in memory, stays as it is here: a fused
    kernel takes no momentum that lies otherwise than its parameter.
    """
    what = f"{what}: optimizer"
    parameters = [value for group in optimizer.param_groups for value in group["params"]]
    own = optimizer.state_dict()["param_groups"]
    groups = checked.take(state, "param_groups", checked.list_of(checked.TABLE), what=what)
    if len(groups) != len(own):
        raise InputError(f"{what}: param_groups has {len(groups)} entries, not {len(own)}")
    for group, mine in zip(groups, own, strict=True):
        for name, value in mine.items():
            checked.take(group, name, _setting_like(value), what=what, default=value)
    # A setting that this torch has and that one had not is as it is now.
    groups = [
        mine | group | {name: mine[name] for name in _KERNELS & mine.keys()}
        for group, mine in zip(groups, own, strict=True)
    ]
    for number, slots in checked.take(state, "state", checked.TABLE, what=what).items():
        if not checked.whole(0, len(parameters) - 1).holds(number) or not isinstance(slots, dict):
            raise InputError(f"{what}: state has no parameter {checked.shown(number)}")
        shape = parameters[number].shape
        for name in slots:
            checked.take(slots, name, _slot_of(shape, finite), what=f"{what}: state {number}")
    optimizer.load_state_dict({**state, "param_groups": groups})
    for parameter, slots in optimizer.state.items():
        for name, value in slots.items():
            if value is not None and value.stride() != parameter.stride():
                slots[name] = torch.empty_like(parameter).copy_(value)


def _setting_like(value: Any) -> Kind:
    """What a setting of an optimizer's group may be, by what it is now."""
    if isinstance(value, list):  # the numbers of the group's parameters
        numbers = checked.list_of(checked.whole())
        same = f"the numbers of {len(value)} parameters"
        return Kind(same, lambda other: numbers.holds(other) and list(other) == value)
    if value is None or isinstance(value, bool):
        return checked.or_none(checked.FLAG)
    return checked.real()


def _slot_of(shape: torch.Size, finite: bool) -> Kind:
    """What SGD may keep of a parameter."""
    words = f"{tuple(shape)}{', finite,' * finite} or nothing"
    holds = torch_file.is_finite if finite else lambda value: True
    kind = torch_file.tensor(words, holds, dims=len(shape))
    return Kind(kind.words, lambda v: v is None or (kind.holds(v) and v.shape == shape))
