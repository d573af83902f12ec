"""Where a classifier gets features and labels from: images read anew each epoch, or kept features.

Both have the same five: `for_statistics`, `epoch`, `val`, `labels` and `val_labels`. F is the
feature size.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from utils.data.batches import epoch_batches
from utils.data.eval_loader import EvalLoader, LabeledLoader
from utils.evaluation.feature_cache import Features
from utils.evaluation.features import extract_features
from utils.runtime import distributed
from utils.runtime.streams import upload


def _readable(loader: EvalLoader) -> np.ndarray:
    """Labels (N,) of the images that could be read, as far as known."""
    return np.delete(loader.images.labels, sorted(loader.left_out))


class FromImages:
    """Labeled features of images that are read anew in every epoch.

    views: the random crops to train on; train and val: the evaluation views. With fine_tune the
    encoder trains: it is in train mode and features of `epoch` have gradients. Otherwise it is in
    eval mode, nothing of it changes, and val features are computed once.

    Of several processes each passes its part of the images through; all get the features of
    `for_statistics` and `epoch`, the main one those of `val`. To train, the encoder's batch norm is
    that of `batch_norm.synchronized`, and its gradients are to be summed over the processes.
    """

    def __init__(
        self,
        encoder: nn.Module,
        views: LabeledLoader,
        train: EvalLoader,
        val: EvalLoader,
        *,
        fine_tune: bool,
    ) -> None:
        self.encoder = encoder.requires_grad_(fine_tune)
        self.views, self._train, self._val = views, train, val
        self.fine_tune = fine_tune
        self._val_features: tuple[Tensor, Tensor] | None = None
        self._val_is_known = False

    @property
    def labels(self) -> np.ndarray:
        """Labels (N,) of the training images that could be read in the evaluation view."""
        return _readable(self._train)

    @property
    def val_labels(self) -> np.ndarray:
        """Labels (N,) of the val images that could be read."""
        return _readable(self._val)

    def for_statistics(self) -> Iterator[Tensor]:
        """Features (b, F) of all training images in the evaluation view."""
        self.encoder.eval()
        hidden = not distributed.shows_bars()
        batches = iter(tqdm(self._train, "statistics", leave=False, disable=hidden))
        none = torch.empty(0, device=self._train.device)
        while True:
            with torch.no_grad():
                batch = next(batches, None)
                features = none if batch is None else self.encoder(batch.images)
                features = distributed.gather_uneven(features)
            if not len(features):
                return
            yield features

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (b, F) and labels (b,) of every training image once, on the device."""
        self.encoder.train(self.fine_tune)
        hidden = not distributed.shows_bars()
        bar = {"total": len(self.views), "leave": False, "disable": hidden}
        for images, _, label in tqdm(self.views.epoch(epoch), f"epoch {epoch}", **bar):
            with torch.set_grad_enabled(self.fine_tune):
                features = distributed.gather_uneven(self.encoder(images))
            label = distributed.gather_uneven(label)
            yield features, upload(label, images.device)

    def val(self) -> tuple[Tensor, Tensor] | None:
        """Features (N, F) and labels (N,) of the val images in the evaluation view."""
        if self.fine_tune or not self._val_is_known:
            self._val_is_known = True
            self._val_features = extract_features(self.encoder, self._val, "val")
        return self._val_features


class FromFeatures:
    """Labeled features extracted once; batches are taken from one tensor on the device."""

    def __init__(
        self, features: Features, *, batch_size: int, seed: int, device: torch.device
    ) -> None:
        self._features, self._labels = (part.to(device) for part in features["train"])
        self._val = features["val"]
        self.labels, self.val_labels = (features[split][1].numpy() for split in ("train", "val"))
        self.batch_size, self.seed = batch_size, seed

    def for_statistics(self) -> Iterator[Tensor]:
        """Features (b, F) of all training images."""
        yield from self._features.split(self.batch_size)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Features (b, F) and labels (b,) of every training image once, on the device."""
        for batch in epoch_batches(len(self._labels), self.batch_size, seed=self.seed, epoch=epoch):
            index = upload(torch.from_numpy(batch), self._labels.device)
            yield self._features[index], self._labels[index]

    def val(self) -> tuple[Tensor, Tensor]:
        """Features (N, F) and labels (N,) of the val images."""
        return self._val
