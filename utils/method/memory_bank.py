"""The memory bank: past targets, first in, first out, with what is known of each."""

import torch
from torch import Tensor, nn

from utils.runtime.distributed import gather
from utils.runtime.streams import upload

_UNIT = 1.01  # no entry of a unit vector is above, whatever the rounding


class MemoryBank(nn.Module):
    """First-in, first-out store of K embeddings with columns aligned to its rows.

    features: (K, D), unit norm. label, index: (K,) int64, of the image a row came from (-1:
    unknown). With `with_previous` also M' of CMSF-2Q: previous: (K, D), the embedding that the
    row's image had when it was visited before, and has_previous: (K,) bool. (The published code
    kept one previous embedding for each image, which two rows of an image shared; here each row
    keeps its own.)

    Rows are written from 0 upward and then over the oldest, so the rows in use are always [0,
    filled): an empty row is never searched. Any number of rows can be enqueued at once, also more
    than K.
    """

    def __init__(
        self, size: int, dim: int, *, with_previous: bool = False, with_true_label: bool = False
    ) -> None:
        super().__init__()
        self.size = size
        self.written = 0  # rows ever written: on the host, so that slicing never waits for a GPU
        self.register_buffer("features", torch.zeros(size, dim))
        self.register_buffer("label", torch.full((size,), -1))
        self.register_buffer("index", torch.full((size,), -1))
        if with_previous:
            self.register_buffer("previous", torch.zeros(size, dim))
            self.register_buffer("has_previous", torch.zeros(size, dtype=torch.bool))
        if with_true_label:
            self.register_buffer("true_label", torch.full((size,), -1))

    @property
    def filled(self) -> int:
        """How many rows hold an embedding, 0 to K."""
        return min(self.written, self.size)

    def in_use(self, *names: str) -> list[Tensor]:
        """The named columns, features among them, as far as they are filled: views, not copies."""
        return [getattr(self, name)[: self.filled] for name in names]

    def newest(self, count: int) -> Tensor:
        """Numbers (n,) of the rows written last, oldest of them first; n is at most `filled`."""
        count = min(count, self.filled)
        return torch.arange(self.written - count, self.written) % self.size

    def store_as(self, dtype: torch.dtype) -> None:
        """Keep embeddings in this dtype: float16 takes half the memory of float32.

        An entry of a unit vector then errs by at most 2^-12, a similarity by about 2^-11 / sqrt(D).
        """
        for name in {"features", "previous"} & dict(self.named_buffers()).keys():
            setattr(self, name, getattr(self, name).to(dtype))

    @torch.no_grad()
    def enqueue(self, features: Tensor, *, where: Tensor | None = None, **columns: Tensor) -> None:
        """Write a batch over the oldest rows; of several processes each gives its own part of it.

        features: (B, D), unit norm. columns: one (B, ...) tensor for every other column, by its
        name; a missing or unknown name is a TypeError. where: (B,) bool, on the host, the rows of
        the batch to take; all of them by default.
        """
        columns["features"] = features
        own = dict(self.named_buffers())
        if columns.keys() != own.keys():
            raise TypeError(f"enqueue got columns {sorted(columns)}, the bank has {sorted(own)}")
        values = dict(zip(columns, gather(*columns.values()), strict=True))
        if where is not None:
            chosen = gather(where)[0].nonzero().squeeze(1)
            values = {name: rows[upload(chosen, rows.device)] for name, rows in values.items()}
        count, device = len(values["features"]), self.features.device
        self.written += count
        places = self.newest(count)  # of a batch larger than the bank only the newest rows stay
        kept, places = len(places), upload(places, device)
        for name, rows in values.items():
            own[name][places] = upload(rows[count - kept :], device).to(own[name].dtype)

    def clear(self) -> None:
        """Forget every row: none is in use until new ones are written."""
        self.written = 0

    def fault(self, *, num_images: int, num_classes: int) -> str | None:
        """In words what cannot be in a bank out of a file, None if it is sound."""
        if not 0 <= self.written < 2**62:
            return f"{self.written} rows were written to it"
        last = {"index": num_images, "label": num_classes, "true_label": num_classes}
        for name in last.keys() & dict(self.named_buffers()).keys():
            (column,) = self.in_use(name)
            lowest, highest = 0 if name == "index" else -1, last[name] - 1
            if ((column < lowest) | (column > highest)).any():
                return f"{name} is not everywhere from {lowest} to {highest}"
        for name in {"features", "previous"} & dict(self.named_buffers()).keys():
            (column,) = self.in_use(name)
            if not (column.abs() < _UNIT).all():  # nor is nan
                return f"{name} are not of unit norm"
        return None

    def get_extra_state(self) -> Tensor:
        """Save `written` with the buffers: without it a resumed bank would start over at row 0."""
        return torch.tensor(self.written)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore `written`."""
        self.written = int(state)
