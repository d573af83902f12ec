"""Changes that make a well-formed file odd: any value in any field, at any depth."""

import math
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

VALUES = [
    *(None, True, False, 0, -1, 3, 10**30, 1.5, math.nan, math.inf, "", "x", "a\nb", "x" * 300),
    *([], [1], ["x"], {}, {1: 2}, {"x": None}, {"x": {"y": []}}, (1, 2), {1}, b"x"),
    *(torch.zeros(0), torch.zeros(3), torch.zeros(2, 3), torch.tensor(7), torch.tensor(2.5)),
    *(torch.tensor([-1, 5]), torch.full((3,), math.nan), torch.ones(3, dtype=torch.bool)),
    *(torch.eye(3).to_sparse(), torch.zeros(3, device="meta"), torch.zeros(2) * 1j),
    torch.zeros(1).expand(10**12),  # four bytes
]


def _quantized(value: Tensor) -> Tensor:
    return torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8)


# Of a tensor that is there, another that is a little wrong.
TENSORS = [
    *(Tensor.double, Tensor.half, Tensor.long, Tensor.bool, Tensor.t_, Tensor.neg),
    *(lambda v: v.flatten()[:-1], lambda v: v.unsqueeze(0), lambda v: v.flatten()[:0]),
    *(lambda v: v + 1000, lambda v: v - 1000, lambda v: v * math.nan, lambda v: v * 1e30),
    *(Tensor.to_sparse, _quantized, lambda v: v.to("meta"), lambda v: v + 0j, Tensor.zero_),
    lambda v: torch.full_like(v, 2**62) if not v.is_floating_point() else v,
]


def _other(draw, value: Any) -> Any:
    """Something else in a value's place."""
    if isinstance(value, Tensor) and draw(st.booleans()):
        change = draw(st.sampled_from(TENSORS))
        try:
            return change(value.clone())
        except RuntimeError:  # there is no such thing of this tensor
            return None
    return draw(st.sampled_from(VALUES))


@st.composite
def changed(draw, content: Any) -> Any:
    """Content with one field, at any depth, of another value, gone, or there beside the others."""
    items = list(content.items()) if isinstance(content, dict) else list(enumerate(content))
    how = draw(st.sampled_from(["inside", "inside", "inside", "other", "gone", "new"]))
    if not items or how == "new":
        items.append((draw(st.sampled_from(["new", 7, "", "a\nb", "_extra"])), _other(draw, None)))
    else:
        place = draw(st.integers(0, len(items) - 1))
        name, value = items[place]
        inside = isinstance(value, (dict, list, tuple)) and how == "inside"
        if how == "gone":
            del items[place]
        else:
            items[place] = (name, draw(changed(value)) if inside else _other(draw, value))
    if isinstance(content, dict):
        return dict(items)
    return type(content)(value for _, value in items)
