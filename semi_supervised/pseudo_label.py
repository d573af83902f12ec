"""The classifier head that gives pseudo-labels, and its rounds of training (CMSF sec. 3.2)."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from utils.data.batches import batch_ends
from utils.method.encoders import mlp
from utils.runtime import distributed
from utils.runtime.errors import RunError
from utils.runtime.streams import upload


class PseudoLabelHead(nn.Module):
    """A classifier on target embeddings.

    kind: "linear", "mlp" (one hidden layer) or "mlp_3l" (two); hidden layers have 2 D units, as
    published. dim: D.
    """

    def __init__(self, kind: str, dim: int, num_classes: int) -> None:
        super().__init__()
        hidden = {"linear": [], "mlp": [2 * dim], "mlp_3l": [2 * dim, 2 * dim]}[kind]
        self.layers = mlp([dim, *hidden, num_classes])

    def forward(self, embeddings: Tensor) -> Tensor:
        """(B, D) -> logits (B, C)."""
        return self.layers(embeddings)

    @torch.no_grad()
    def predict(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted class (B,) int64 and its confidence (B,), 0 to 1; in eval mode throughout."""
        self.eval()
        confidence, label = self(embeddings).softmax(dim=1).max(dim=1)
        return label, confidence


def train_head(
    head: PseudoLabelHead,
    embeddings: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    decay_epochs: Sequence[int],
    momentum: float,
    weight_decay: float,
    seed: Sequence[int],
) -> dict[str, float]:
    """One round: train the head further by cross-entropy, with an optimizer of its own.

    embeddings: (n, D), unit norm; labels: (n,) int64; on any device. The learning rate falls to a
    tenth after each of `decay_epochs`. seed: integers that the order of the rows follows from.
    Every epoch trains on all rows, in batches that end where `batch_ends` says; with batch norm
    they must be of two rows or more. (The published code drops a last batch that is not full.)
    Returns the last epoch's mean loss and accuracy (percent), and the number of rows.
    RunError if loss or head are not finite in the end.
    """
    first = head.layers[0].weight
    embeddings, labels = embeddings.to(first), labels.to(first.device)
    parameters = head.requires_grad_(True).parameters()
    optimizer = torch.optim.SGD(
        parameters, lr=learning_rate, momentum=momentum, weight_decay=weight_decay
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(decay_epochs), gamma=0.1)
    random = np.random.default_rng(seed)
    head.train()
    for _ in range(epochs):
        order = upload(torch.from_numpy(random.permutation(len(labels))), labels.device)
        batches = order.tensor_split(batch_ends(len(labels), batch_size))
        sums = _train_epoch(head, embeddings, labels, batches, optimizer)
        schedule.step()
    head.eval().requires_grad_(False)
    for value in head.state_dict().values():  # kernels may round differently on each GPU
        distributed.from_main(value)
    finite = torch.stack([value.isfinite().all() for value in head.state_dict().values()]).all()
    means = distributed.from_main((sums / len(labels)).where(finite, torch.nan))
    loss, accuracy = means.tolist()  # the only wait for a GPU in a round
    if not math.isfinite(loss):
        raise RunError(
            f"--pseudo_lbl_lr {learning_rate:g}: the classifier head has diverged (trained on "
            f"{len(labels)} rows); try a lower one"
        )
    return {"head_loss": loss, "head_accuracy": 100 * accuracy, "head_rows": len(labels)}


def _train_epoch(
    head: PseudoLabelHead,
    embeddings: Tensor,
    labels: Tensor,
    batches: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
) -> Tensor:
    """One pass over batches of row numbers: (2,), the sums over rows of loss and of hits."""
    sums = torch.zeros(2, device=labels.device)
    for rows in batches:
        logits = head(embeddings[rows])
        loss = cross_entropy(logits, labels[rows])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        right = (logits.argmax(dim=1) == labels[rows]).sum()
        sums += torch.stack([loss.detach() * len(rows), right])
    return sums
