"""The last embedding of every image (CMSF sec. 3.1, the source of M')."""

import torch
from torch import Tensor, nn

from utils.runtime import distributed
from utils.runtime.streams import HostCopy, upload


class PreviousEmbeddings(nn.Module):
    """Each image's last embedding, kept in host memory whatever device the model moves to.

    embeddings: (N, D), unit norm. seen: (N,) bool, whether the image was visited at all. On
    ImageNet this is 2.6 GB of float32. (The published code held two such stores on the GPU, started
    as noise.) What comes from a GPU is put into its place when the store is next asked or saved, so
    that no step waits for it.

    Of W processes the one of rank r holds the rows of images r, r + W, r + 2 W, ... only. To get
    all of them, or to swap, is something that all processes do together.
    """

    def __init__(self, num_images: int, dim: int) -> None:
        super().__init__()
        self.num_images = num_images
        held = len(range(distributed.rank(), num_images, distributed.world_size()))
        self.register_buffer("embeddings", torch.zeros(held, dim))
        self.register_buffer("seen", torch.zeros(held, dtype=torch.bool))
        self._coming: tuple[Tensor, HostCopy] | None = None  # the batch that `settle` puts in place

    @torch.no_grad()
    def swap(self, index: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Return the previous embeddings of a batch and put its present ones in their place.

        index: (B,) int64. embeddings: (B, D), unit norm, any device; both the same in every
        process. Of an image that comes twice the last row stays. Returns previous (B, D) (zeros for
        an image not seen before) and seen (B,) bool, on the device of `embeddings`. IndexError for
        an index out of range: -1 must not alias the last image.
        """
        index = index.cpu()
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.num_images:
            last = self.num_images - 1
            raise IndexError(f"image index out of range 0 to {last}: {index.tolist()}")
        self.settle()
        own, rows = self._held(index)
        previous = self.embeddings.new_zeros(embeddings.shape)
        previous[own] = self.embeddings[rows]
        seen = torch.zeros(len(index), dtype=torch.uint8)
        seen[own] = self.seen[rows].to(torch.uint8)
        device = embeddings.device
        # All but one of the terms are zero.
        previous = distributed.add_up(upload(previous, device))
        seen = distributed.add_up(upload(seen, device)).bool()
        self.remember(index, embeddings)
        return previous, seen

    @torch.no_grad()
    def remember(self, index: Tensor, embeddings: Tensor) -> None:
        """Keep a batch's embeddings, as for `swap`; not one that is not finite: the run stops."""
        self.settle()
        self._coming = index, HostCopy(embeddings.detach())
        if embeddings.device.type != "cuda":
            self.settle()

    @torch.no_grad()
    def settle(self) -> None:
        """Put the batch that came last in its place; waits for it."""
        if self._coming is None:
            return
        (index, copy), self._coming = self._coming, None
        embeddings = copy.get()
        if not embeddings.isfinite().all():
            return
        last = {image: place for place, image in enumerate(index.tolist())}
        if len(last) < len(index):  # a replaced image; the order of such writes is not defined
            places = torch.tensor(list(last.values()))
            index, embeddings = index[places], embeddings[places]
        own, rows = self._held(index)
        self.embeddings[rows] = embeddings[own].to(self.embeddings)
        self.seen[rows] = True

    def on_main(self) -> tuple[Tensor, Tensor]:
        """Embeddings (N, D) and seen (N,) of all images, on the host; all processes ask together.

        Only on the main process: on others tensors of that shape without memory.
        """
        self.settle()
        stores = self.embeddings, self.seen
        if distributed.world_size() == 1:
            return stores
        own = slice(distributed.rank(), None, distributed.world_size())
        return tuple(distributed.on_main(held, own, self.num_images) for held in stores)

    def _held(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Which of the images (B,) bool this process holds, and in which rows (n,)."""
        own = index % distributed.world_size() == distributed.rank()
        return own, index[own] // distributed.world_size()

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        """What `on_main` has."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        whole = zip(("embeddings", "seen"), self.on_main(), strict=True)
        destination.update({prefix + name: rows.detach() for name, rows in whole})

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *others) -> None:
        """Take the rows that this process holds."""
        self._coming = None
        own = slice(distributed.rank(), None, distributed.world_size())
        taken = {n: v[own] for n, v in state_dict.items() if n.startswith(prefix)}
        super()._load_from_state_dict(state_dict | taken, prefix, *others)

    def _apply(self, fn, recurse: bool = True) -> "PreviousEmbeddings":
        """Follow a change of dtype (`model.double()`), never one of device."""
        self.embeddings = self.embeddings.to(fn(self.embeddings[:0]).dtype)
        return self
