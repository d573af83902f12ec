"""The classifier head and its rounds against a plain loop with torch's own parts."""

import numpy as np
import pytest
import torch
from torch import nn

from semi_supervised.pseudo_label import PseudoLabelHead, train_head
from utils.runtime.errors import RunError

ROUND = {
    "epochs": 4,
    "batch_size": 7,
    "learning_rate": 0.5,
    "decay_epochs": [2, 3],
    "momentum": 0.9,
    "weight_decay": 1e-2,
}


def embeddings(count=30, dim=6):
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (count,), generator=generator)
    centers = torch.eye(dim, dtype=torch.float64)[labels]
    noise = torch.randn(count, dim, generator=generator, dtype=torch.float64) / 3
    return nn.functional.normalize(centers + noise, dim=1), labels


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("linear", [(3, 6)]), ("mlp", [(12, 6), (3, 12)]), ("mlp_3l", [(12, 6), (12, 12), (3, 12)])],
)
def test_heads_have_the_published_sizes(kind, sizes):
    layers = PseudoLabelHead(kind, 6, 3).layers
    assert [tuple(layer.weight.shape) for layer in layers[::3]] == sizes
    assert len(layers) == 3 * len(sizes) - 2


@pytest.mark.parametrize("kind", ["linear", "mlp", "mlp_3l"])
def test_a_round_is_plain_sgd_with_a_fresh_optimizer(kind):
    """Two rounds, so that momentum carried over from one to the next would show."""
    torch.manual_seed(0)
    head = PseudoLabelHead(kind, 6, 3).double()
    reference = PseudoLabelHead(kind, 6, 3).double()
    reference.load_state_dict(head.state_dict())
    rows, labels = embeddings()
    for round_seed in ([0, 5], [0, 9]):
        figures = train_head(head, rows, labels, seed=round_seed, **ROUND)
        random = np.random.default_rng(round_seed)
        velocity = {}
        for epoch in range(4):
            rate = 0.5 * 0.1 ** sum(epoch >= decay for decay in (2, 3))
            order = random.permutation(30).tolist()
            losses, right = [], 0
            for start in range(0, 30, 7):
                part = order[start : start + 7]
                reference.train()
                logits = reference(rows[part])
                picked = logits.log_softmax(dim=1)[range(len(part)), labels[part]]
                gradients = torch.autograd.grad(-picked.mean(), list(reference.parameters()))
                losses += (-picked).tolist()
                right += (logits.argmax(dim=1) == labels[part]).sum().item()
                with torch.no_grad():
                    for i, (p, g) in enumerate(zip(reference.parameters(), gradients, strict=True)):
                        velocity[i] = 0.9 * velocity.get(i, 0) + g + 1e-2 * p
                        p -= rate * velocity[i]
        assert figures["head_loss"] == pytest.approx(sum(losses) / 30, rel=1e-6)
        assert figures["head_accuracy"] == pytest.approx(100 * right / 30)
        assert figures["head_rows"] == 30
        for (name, mine), other in zip(
            head.state_dict().items(), reference.state_dict().values(), strict=True
        ):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-9, msg=name)


def test_prediction_is_made_in_eval_mode():
    torch.manual_seed(0)
    head = PseudoLabelHead("mlp", 6, 3).double()
    rows, labels = embeddings()
    train_head(head, rows, labels, seed=[0], **ROUND)
    head.train()
    label, confidence = head.predict(rows[:1])  # one row, which a batch norm in train mode refuses
    before = {n: b.clone() for n, b in head.named_buffers()}
    all_labels, all_confidences = head.predict(rows)
    assert label[0] == all_labels[0]
    assert confidence[0].item() == pytest.approx(all_confidences[0].item())
    for name, buffer in head.named_buffers():
        assert torch.equal(buffer, before[name])
    scores = head(rows).exp()
    expected = scores.max(dim=1).values / scores.sum(dim=1)
    torch.testing.assert_close(all_confidences, expected)


def test_a_last_batch_of_one_row_joins_the_one_before():
    """8 rows in batches of 7 are one batch: what one batch of 8 makes of them."""
    rows, labels = embeddings(count=8)
    for kind in ("linear", "mlp"):
        heads = []
        for batch_size in (7, 8):
            torch.manual_seed(0)
            heads.append(PseudoLabelHead(kind, 6, 3).double())
            options = ROUND | {"batch_size": batch_size}
            figures = train_head(heads[-1], rows, labels, seed=[0], **options)
            assert figures["head_rows"] == 8 and figures["head_loss"] > 0
        for one, two in zip(*(head.state_dict().values() for head in heads), strict=True):
            assert torch.equal(one, two)


def test_batches_of_one_row_train_a_head_without_batch_norm():
    """Each row a step of its own; figures over all of them."""
    torch.manual_seed(0)
    head = PseudoLabelHead("linear", 6, 3).double()
    weight, bias = (value.detach().clone() for value in head.parameters())
    rows, labels = embeddings(count=5)
    options = ROUND | {"batch_size": 1, "epochs": 1, "momentum": 0, "weight_decay": 0}
    figures = train_head(head, rows, labels, seed=[3], **options)
    losses, right = [], 0
    for row in np.random.default_rng([3]).permutation(5):
        scores = (weight @ rows[row] + bias).exp()
        share = scores / scores.sum()
        losses.append(-share[labels[row]].log().item())
        right += scores.argmax().item() == labels[row].item()
        error = share - nn.functional.one_hot(labels[row], 3)
        weight -= 0.5 * error[:, None] * rows[row]
        bias -= 0.5 * error
    torch.testing.assert_close(head.layers[0].weight, weight, rtol=0, atol=1e-12)
    assert figures["head_loss"] == pytest.approx(sum(losses) / 5, rel=1e-6)
    assert figures["head_accuracy"] == pytest.approx(100 * right / 5)


@pytest.mark.parametrize("epochs", [1, 4])
def test_a_head_that_diverges_is_named(epochs):
    """After one epoch its loss is still that of the start; the weights alone tell."""
    rows, labels = (value.float() if value.is_floating_point() else value for value in embeddings())
    head = PseudoLabelHead("linear", 6, 3)
    options = ROUND | {"batch_size": 30, "epochs": epochs}
    options |= {"learning_rate": 1e38, "weight_decay": 1e4}
    with pytest.raises(RunError, match=r"--pseudo_lbl_lr 1e\+38.*diverged.* 30 rows"):
        train_head(head, rows, labels, seed=[0], **options)
